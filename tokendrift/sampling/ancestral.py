"""Ancestral sampling, which follows the exact reverse process, and its tau-leaping form for score models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from tokendrift._checks import fail
from tokendrift.diffusion.process import Mixture
from tokendrift.sampling.chain import Chain


@dataclass(frozen=True)
class Ancestral:
    """Draw from q(x_s | x_t) with the denoiser's law in place of x_0: the sampler of MDLM and of DUO.

    Masked positions are filled in at the rate of the schedule and then stay; the fill is decided before the
    network is asked. Uniform-state tokens stay, follow the denoiser or turn random by the exact three-way mixture.

    Source: MDLM (arXiv 2406.07524), equation 7; DUO (arXiv 2506.10892), equation 4.
    """

    def __call__(self, chain: Chain, steps: int | None) -> Iterator[Mixture]:
        """Yield the posterior of each step."""
        for t, s in pairwise(chain.times(steps)):
            yield chain.posterior(t, s)


@dataclass(frozen=True)
class Analytic:
    r"""The same step as SEDD writes it: tau-leaping with concrete scores, final denoising included.

    With the score :math:`s_j = p_t(j)/p_t(x_t)` that the denoiser's law implies and
    :math:`\Delta = \sigma_t - \sigma_s`, the step draws from
    :math:`(e^{-\Delta Q} s)_j\,(e^{\Delta Q})_{x_t j}`. For a masked position that is
    :math:`s_j\,(e^\Delta - 1)` with :math:`s_j = p_j/(e^{\sigma_t}-1)`; for a uniform-state token it is again a
    three-way mixture. A denoiser's scores are exact functions of its law, so that the step *is* that of `Ancestral`;
    the last one, to time 0, is the denoising step. They differ with ``raw_scores`` alone.

    Attributes:
        raw_scores: The logits of a masked model are those of a score network, not normalised: SEDD's own sampler then
            leaves a mask with :math:`C` times the chance, :math:`C = \sum_{j \ne m} e^{\ell_j}/(V-1)` being what the
            network makes of the total score. It needs the network at every step. Uniform-state score networks come in
            as `ScoreDenoiser`, which normalises.

    Source: SEDD (arXiv 2310.16834), Tweedie tau-leaping; MDLM (diffusion.py ``_analytic_update``).
    """

    raw_scores: bool = False

    def __call__(self, chain: Chain, steps: int | None) -> Iterator[Mixture]:
        """Yield the tau-leaping law of each step."""
        if self.raw_scores and chain.process.mask_id is None:
            raise fail("raw_scores belongs to masked models.", "Wrap uniform-state score networks in ScoreDenoiser.")
        for t, s in pairwise(chain.times(steps)):
            law = chain.posterior(t, s)
            if self.raw_scores and s:  # the last step, SEDD's denoiser, leaves no mask whatever C is
                size = chain.process.vocab_size
                leave = (law.denoise * chain.log_norm.double().exp() / (size - 1)).clamp_max(1)
                law = Mixture(1 - leave, leave)
            yield law
