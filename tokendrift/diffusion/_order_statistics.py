"""The largest of many normal numbers without the many, as DUO's curriculum needs them over the vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def largest_normals(
    shape: tuple[int, ...], count: int, top: int, *, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Draw the ``top`` largest of ``count`` standard normal numbers, descending, float64 (*shape, top).

    The largest of n uniforms is U^(1/n), the next that of n - 1 below it, and so on; the normal quantile keeps order.
    In logarithms, and through the upper tail: 1 - U is near 1/n.
    """
    uniform = torch.rand((*shape, top), generator=generator, device=device, dtype=torch.float64)
    left = torch.arange(count, count - top, -1, device=device, dtype=torch.float64)
    log_rank = (uniform.clamp_min(torch.finfo(torch.float64).tiny).log() / left).cumsum(dim=-1)
    return -torch.special.ndtri(-torch.expm1(log_rank))


def distinct_ids(
    shape: tuple[int, ...], count: int, top: int, *, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Draw ``top`` different ids below ``count`` in random order, int64 (*shape, top): Floyd's algorithm, shuffled."""
    ids = torch.empty((*shape, top), dtype=torch.int64, device=device)
    for place, last in enumerate(range(count - top, count)):
        fresh = torch.randint(last + 1, shape, generator=generator, device=device)
        taken = (ids[..., :place] == fresh[..., None]).any(dim=-1)
        ids[..., place] = torch.where(taken, last, fresh)
    order = torch.rand(ids.shape, generator=generator, device=device).argsort(dim=-1)
    return ids.gather(-1, order)


def log_mean_exp_below(bound: Tensor, scale: Tensor) -> Tensor:
    r"""Return :math:`\log E[e^{sz} \mid z < b]` of a standard normal z for scales s above 0, without cancellation.

    It is :math:`s^2/2 + \log\Phi(b - s) - \log\Phi(b)`, where for s far above b the first two terms, both huge, are
    :math:`sb - b^2/2 + \log(\mathrm{erfcx}((s-b)/\sqrt 2)/2)`.
    """
    below = bound - scale
    near = scale**2 / 2 + torch.special.log_ndtr(below.clamp_min(-5))
    far = scale * bound - bound**2 / 2 + torch.log(torch.special.erfcx(-below.clamp_max(-5) / math.sqrt(2)) / 2)
    return torch.where(below > -5, near, far) - torch.special.log_ndtr(bound)
