"""ReMDM: masked sampling in which tokens can be masked again (arXiv 2503.00307), written as psi-steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from tokendrift._checks import check_choice, check_fraction, fail
from tokendrift.diffusion.process import Mixture
from tokendrift.sampling.chain import Chain
from tokendrift.sampling.psi import Psi, psi_step, remasking_kappa

RULES = ("cap", "rescale", "conf")


@dataclass(frozen=True)
class ReMDM:
    r"""Masked sampling in which a token that was drawn returns to the mask with probability sigma.

    Attributes:
        rule: ``"cap"``: sigma = min(eta, c) with the largest possible c = (1 - alpha_s)/alpha_t;
            ``"rescale"``: eta * min(1, c); ``"conf"``: min(1, c) shared out over the standing tokens of a row by a
            softmax of -p, p being the probability each had when it was drawn. Masked positions then leave at the
            rate without remasking, as in the published code.
        eta: Chance of remasking; unused by ``"conf"``.

    Source: `kuleshov-group/remdm` (``remdm-cap``, ``-rescale``, ``-conf``); `remdm_loop` is its
    fourth.
    """

    rule: str = "cap"
    eta: float = 0.02

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_fraction("eta", self.eta, ": it is a probability", closed=True)

    def __call__(self, chain: Chain, steps: int | None) -> Iterator[Mixture]:
        """Yield steps that remask."""
        if chain.process.mask_id is None:
            raise fail(
                "ReMDM requires a masked process: it replaces tokens by the mask.",
                "For uniform-state models use Psi.",
                process=chain.process,
            )
        for t, s in pairwise(chain.times(steps)):
            if self.rule == "conf":
                yield self._by_confidence(chain, t, s)
            else:
                yield psi_step(chain, t, s, remasking_kappa(chain.process, self.rule, self.eta, t, s))

    def _by_confidence(self, chain: Chain, t: float, s: float) -> Mixture:
        alpha_t, alpha_s = chain.process.levels(t, s)
        standing = chain.free & ~chain.process.predicted(chain.ids)
        score = (-chain.drawn_log_p.exp()).masked_fill(~standing, -torch.inf)
        share = torch.softmax(score, dim=-1).nan_to_num(0.0)  # NaN in rows where nothing stands
        most = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 1.0
        sigma = most * share
        posterior = chain.posterior(t, s)
        return Mixture(posterior.stay - sigma, posterior.denoise)


def remdm_loop(eta: float = 0.02, *, t_on: float = 0.55, t_off: float = 0.05, alpha_on: float = 0.9) -> Psi:
    """Return ReMDM's loop: draw most tokens, then remask and redraw at a constant signal level, then finish.

    Args:
        eta: Chance of remasking, capped, inside the loop.
        t_on: Share of the steps left when the loop begins.
        t_off: Share of the steps left when it ends.
        alpha_on: Signal level of the loop.

    Raises:
        TokenDriftError: If eta or alpha_on is out of range, or not 0 <= t_off <= t_on <= 1.

    Source: ReMDM, ``remdm-loop``; the grid is that of `Psi`, whose regions are whole points.
    """
    check_fraction("eta", eta, ": it is a probability", closed=True)
    if not 0 < alpha_on < 1:
        raise fail("alpha_on must lie between 0 and 1: it is a signal level.", alpha_on=alpha_on)
    if not 0 <= t_off <= t_on <= 1:
        raise fail("t_on and t_off must be shares of the steps, t_off at most t_on.", t_on=t_on, t_off=t_off)
    return Psi(
        middle=f"max-capped-{eta}",
        high_frac=round(1 - t_on, 12),  # 0.45, whose share of the points rounds as upstream's
        middle_frac=round(t_on - t_off, 12),
        profile=f"linear-constant-linear-{alpha_on}-inv",
    )
