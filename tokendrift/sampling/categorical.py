"""Categorical draws that are right in the tails, at the chosen positions only."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(log_p: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw one index from each row.

    The exponential race :math:`\arg\max_j p_j / E_j` with :math:`E_j = -\log(1 - U_j)` in float64: a
    float32 uniform is a multiple of 2^-24, so the common float32 Gumbel never draws tokens that lie more
    than about 16.6 nats behind (the reason for Gen.-PPL near 41 in the first MDLM samples, against 105).

    Args:
        log_p: Log-probabilities (K, V), any float dtype; rows need not be normalised.
        generator: Source of randomness, on the device of log_p.

    Returns:
        Indices int64 (K,).
    """
    uniform = torch.rand(log_p.shape, generator=generator, device=log_p.device, dtype=torch.float64)
    race = torch.log1p(-uniform).neg_().clamp_min_(torch.finfo(torch.float64).tiny).log_()
    return torch.sub(log_p, race, out=race).argmax(dim=-1)
