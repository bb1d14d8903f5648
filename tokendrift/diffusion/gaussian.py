r"""DUO's curriculum: uniform-state diffusion seen as the argmax of a Gaussian one (arXiv 2506.10892, section 4).

Noise a one-hot vector, :math:`w = \tilde\alpha\,x_0 + \tilde\sigma\,\epsilon` with
:math:`\tilde\alpha^2 = \mathrm{sigmoid}(-\gamma)` and :math:`\tilde\sigma^2 = \mathrm{sigmoid}(\gamma)`. Its largest
entry follows the uniform-state law exactly, at the signal level that `GaussianDuality` computes. A model may therefore
read the tempered softmax of w in place of its argmax and train against the same bound: the soft input contains
information that the hard one does not, which makes the gradient less noisy. As the temperature falls, this additional
information vanishes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import check_count, check_positive, check_takes, fail
from tokendrift.diffusion._order_statistics import distinct_ids, largest_normals, log_mean_exp_below
from tokendrift.diffusion.process import Corruption, Denoiser
from tokendrift.diffusion.schedules import Schedule
from tokendrift.diffusion.soft_inputs import soft_embedding
from tokendrift.diffusion.uniform import UniformDiffusion

REACH, STEP = 10.0, 1 / 16  # the trapezoid rule: deviations left and right, and width


@dataclass(frozen=True)
class GaussianDuality(Schedule):
    r"""The uniform-state schedule of the argmax of a Gaussian diffusion whose :math:`\gamma` is linear in t.

    .. math:: \alpha_t = \frac{V P - 1}{V - 1},\qquad
        P = \int \varphi(z - e^{-\gamma_t/2})\,\Phi(z)^{V-1}\,dz,\qquad \gamma_t = \gamma_0 + t(\gamma_1 - \gamma_0)

    P is the chance that the clean token's entry is the largest. Both integrals, that of P and that of its derivative,
    are computed by the trapezoid rule in float64 (321 points; exact to rounding, since the integrands are analytic
    and decay like a Gaussian) instead of being read from a table.

    Used with `UniformDiffusion` directly, it trains on the same noise levels with hard inputs.

    Args:
        vocab_size: V.
        gamma_min: Log noise-to-signal ratio at t = 0.
        gamma_max: The same at t = 1, above gamma_min.

    Raises:
        TokenDriftError: If gamma_max is not above gamma_min.

    Source: DUO, equation 10 and appendix (algo.py ``_gamma_to_alphat_integral``).

    >>> GaussianDuality(50257).alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    tensor([0.9283, 0.0383], dtype=torch.float64)
    """

    vocab_size: int
    gamma_min: float = -3.5
    gamma_max: float = -1.75

    def __post_init__(self) -> None:
        check_count("vocab_size", self.vocab_size, least=2)
        if not -math.inf < self.gamma_min < self.gamma_max < math.inf:
            raise fail("gamma_max must lie above gamma_min.", gamma_min=self.gamma_min, gamma_max=self.gamma_max)

    @classmethod
    def between(cls, vocab_size: int, first: float, last: float) -> GaussianDuality:
        """Return the schedule whose signal level falls from ``first`` at t = 0 to ``last`` at t = 1.

        The default range of gamma takes 50,000 tokens from 0.93 to 0.04; fewer tokens need more noise.

        >>> schedule = GaussianDuality.between(1024, 0.93, 0.04)
        >>> round(schedule.gamma_min, 2), round(schedule.gamma_max, 2)
        (-3.14, -0.69)
        """
        if not 0 < last < first < 1:
            raise fail("first and last must be signal levels with 0 < last < first < 1.", first=first, last=last)
        full_range = cls(vocab_size, -20.0, 20.0)
        ends = full_range.gamma(full_range.time(torch.tensor([first, last], dtype=torch.float64)))
        return cls(vocab_size, *ends.tolist())

    def gamma(self, t: Tensor) -> Tensor:
        """Return the log noise-to-signal ratio of the Gaussian diffusion."""
        return self.gamma_min + t * (self.gamma_max - self.gamma_min)

    def alpha(self, t: Tensor) -> Tensor:
        largest, *_ = self._integrals(t)
        return ((self.vocab_size * largest - 1) / (self.vocab_size - 1)).to(t.dtype)

    def noise(self, t: Tensor) -> Tensor:
        _, not_largest, _ = self._integrals(t)
        return (self.vocab_size / (self.vocab_size - 1) * not_largest).to(t.dtype)

    def dalpha(self, t: Tensor) -> Tensor:
        *_, slope = self._integrals(t)  # dP/dm with m = exp(-gamma/2), so dm/dt = -m/2 dgamma/dt
        rate = -torch.exp(-self.gamma(t.double()) / 2) / 2 * (self.gamma_max - self.gamma_min)
        return (self.vocab_size / (self.vocab_size - 1) * slope * rate).to(t.dtype)

    def _integrals(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return P, 1 - P and dP/dm in float64, m the mean of the clean token's entry in units of the noise."""
        offset = torch.arange(-REACH, REACH + STEP, STEP, dtype=torch.float64, device=t.device)
        mean = torch.exp(-self.gamma(t.double()) / 2)[..., None]
        density = torch.exp(-(offset**2) / 2) * (STEP / math.sqrt(2 * math.pi))
        log_largest = (self.vocab_size - 1) * torch.special.log_ndtr(mean + offset)
        largest, other = density * torch.exp(log_largest), -density * torch.expm1(log_largest)
        # The offset has mean 0, so that either form gives the slope; the smaller integrand keeps its digits.
        slope = torch.where(largest.sum(-1) < 0.5, (offset * largest).sum(-1), -(offset * other).sum(-1))
        return largest.sum(-1), other.sum(-1), slope


class SoftCorruption(Corruption):
    """A corrupted batch for denoisers that receive a soft input in addition to x_t.

    Attributes:
        soft: Input logits (B, L, V), whose softmax is embedded; with weights, ids int64 (B, L, K).
        weights: Softmax weights of those ids, float32 (B, L, K), or None.
    """

    soft: Tensor
    weights: Tensor | None

    def __new__(cls, hard: Corruption, soft: Tensor, weights: Tensor | None = None) -> SoftCorruption:
        self = super().__new__(cls, *hard)
        self.soft, self.weights = soft, weights
        return self

    def _replace(self, **fields: Any) -> SoftCorruption:
        return SoftCorruption(Corruption(*self)._replace(**fields), self.soft, self.weights)

    def denoise(self, denoiser: Denoiser, **options: Tensor) -> Tensor:
        """Return the denoiser's logits (B, L, V) for the soft input; options are passed to it.

        The denoiser must take the keyword ``embed``, as `tokendrift.models.DiT` does: a function that maps its
        embedding matrix (V, D) to the embeddings (B, L, D) which it then reads in place of those of x_t.
        """

        def embed(embedding: Tensor) -> Tensor:
            return soft_embedding(self.soft, self.weights, embedding)

        with check_takes("embed", "Pass a denoiser that takes embed, as DiT does, or train with another process."):
            return denoiser(self.x_t, self.sigma, embed=embed, **options)  # type: ignore[call-arg]


class GaussianUniformDiffusion(UniformDiffusion):
    r"""Uniform-state diffusion whose corruption also gives the tempered softmax of the Gaussian behind x_t.

    `corrupt` returns a `SoftCorruption`: :math:`x_t = \arg\max w` and the softmax of :math:`w/\tau`, which
    `SoftCorruption.denoise` hands to the denoiser. Objective and posterior are those of the hard x_t.

    In the plain form, the paper's, w is a tensor (B, L, V). With ``top_k`` only the entries of the clean token and of
    the k largest others are drawn, from the exact law of order statistics, and memory falls to (B, L, k). x_t keeps its
    law, and these ids their weights in the softmax (of the other entries, the mean mass counts); what the others would
    add to the embedding is left out. At V = 50258, :math:`\gamma = -2.5` and k = 32 that is 65 % of the mass for
    :math:`\tau = 0.1`, 0.3 % for 0.03, and a negligible share from 0.01 on.

    Args:
        vocab_size: V.
        temperature: :math:`\tau` of the softmax.
        gamma_min: Log noise-to-signal ratio at t = 0.
        gamma_max: The same at t = 1.
        top_k: k, or None for the plain form.

    Raises:
        TokenDriftError: If the temperature is not above 0, gamma_max not above gamma_min, or top_k not in [1, V).

    Source: DUO, section 4.2 (algo.py ``DUO.nll``); the efficient form is that of its main branch
    (``sample_tempered_softmax_topk``), where x_t is the clean token whenever that is among the k largest.
    """

    schedule: GaussianDuality

    def __init__(
        self,
        vocab_size: int,
        temperature: float,
        *,
        gamma_min: float = -3.5,
        gamma_max: float = -1.75,
        top_k: int | None = None,
    ) -> None:
        super().__init__(vocab_size, GaussianDuality(vocab_size, gamma_min, gamma_max))
        self.temperature = check_positive("temperature", temperature)
        if top_k is not None and check_count("top_k", top_k, least=1) >= vocab_size:
            raise fail(f"top_k must lie in [1, V) with V = {vocab_size}.", top_k=top_k)
        self.top_k = top_k

    def _corrupted(self, x0: Tensor, t: Tensor, generator: torch.Generator | None) -> Corruption:
        draw = self._dense if self.top_k is None else self._sparse
        gamma = self.schedule.gamma(t)[:, None, None]
        x_t, soft, weights = draw(x0, gamma.neg().sigmoid().sqrt(), gamma.sigmoid().sqrt(), generator)
        return SoftCorruption(Corruption(x_t, self.predicted(x_t), t, self.sigma(t)), soft, weights)

    def _dense(
        self, x0: Tensor, signal: Tensor, noise: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, None]:
        w = torch.randn((*x0.shape, self.vocab_size), generator=generator, device=x0.device).mul_(noise)
        w.scatter_add_(-1, x0[..., None], signal.to(w.dtype).expand(*x0.shape, 1))
        return w.argmax(dim=-1), w.div_(self.temperature), None

    def _sparse(
        self, x0: Tensor, signal: Tensor, noise: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        others, top = self.vocab_size - 1, int(self.top_k or 0)
        device = x0.device
        largest = largest_normals(x0.shape, others, top, generator=generator, device=device)
        ids = distinct_ids(x0.shape, others, top, generator=generator, device=device)
        ids += ids >= x0[..., None]  # the clean token is none of the others
        own = torch.randn((*x0.shape, 1), generator=generator, device=device, dtype=torch.float64) + signal / noise
        x_t = torch.where(own > largest[..., :1], x0[..., None], ids[..., :1])[..., 0]
        scale = noise.double() / self.temperature
        log_weight = scale * torch.cat([own, largest], dim=-1)
        if top < others:
            log_rest = log_mean_exp_below(largest[..., -1:], scale) + math.log(others - top)
            log_weight = torch.cat([log_weight, log_rest], dim=-1)
        weights = torch.softmax(log_weight, dim=-1)[..., : top + 1].float()
        return x_t, torch.cat([x0[..., None], ids], dim=-1), weights


class ArgmaxNoise(NamedTuple):
    """Gaussian noise over the vocabulary, as far as the argmax of a noised one-hot vector depends on it.

    One noise gives the tokens at every time, as in DUO's consistency distillation: a position that keeps its clean
    token at some time keeps it at all earlier ones, and every other position holds the same other token.

    Attributes:
        own: Noise of the clean token, (B, L).
        largest: Largest noise of all other tokens, (B, L).
        other: The token that has it, int64 (B, L).
    """

    own: Tensor
    largest: Tensor
    other: Tensor

    @classmethod
    def draw(cls, x0: Tensor, vocab_size: int, generator: torch.Generator | None = None) -> ArgmaxNoise:
        """Draw it for clean ids (B, L) from its exact law, in float64 and without a tensor (B, L, V)."""
        largest = largest_normals(x0.shape, vocab_size - 1, 1, generator=generator, device=x0.device)[..., 0]
        other = torch.randint(vocab_size - 1, x0.shape, generator=generator, device=x0.device)
        own = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=torch.float64)
        return cls(own, largest, other + (other >= x0))

    def ids(self, x0: Tensor, gamma: Tensor) -> Tensor:
        """Return the noisy ids (B, L) at log noise-to-signal ratios gamma (B,)."""
        return torch.where(self.own + torch.exp(-gamma.double() / 2)[:, None] > self.largest, x0, self.other)
