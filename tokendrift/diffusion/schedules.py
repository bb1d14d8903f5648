r"""Noise schedules: the signal level :math:`\alpha_t`, its derivative, and :math:`\sigma = -\log\alpha_t`.

Time runs from 0 (clean) to 1 (noise). Every method takes and returns float tensors of any one shape and
keeps their dtype. Sources: MDLM (`kuleshov-group/mdlm`, noise_schedule.py), DUO (`s-sahoo/duo`,
trainer_base.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Schedule(Protocol):
    """What a process needs to know of time."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal level, 1 where clean and near 0 at t = 1."""
        ...

    def dalpha(self, t: Tensor) -> Tensor:
        """Return d alpha / dt, negative."""
        ...


def sigma(schedule: Schedule, t: Tensor) -> Tensor:
    r"""Return :math:`\sigma = -\log \alpha_t`, the number that time-conditioned denoisers read."""
    if isinstance(schedule, LogLinear):
        return -torch.log1p(-(1 - schedule.eps) * t)
    return -torch.log(schedule.alpha(t))


@dataclass(frozen=True)
class LogLinear:
    r""":math:`\alpha_t = 1 - (1-\epsilon)t`: the default of MDLM and DUO."""

    eps: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.eps) * t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -(1 - self.eps))


@dataclass(frozen=True)
class Cosine:
    r"""MDLM's :math:`\alpha_t = \epsilon + (1-\epsilon)\cos(\pi t/2)^k`, k = 1, or 2 for cosine-squared."""

    eps: float = 1e-3
    power: int = 1

    def alpha(self, t: Tensor) -> Tensor:
        return self.eps + (1 - self.eps) * torch.cos(t * math.pi / 2) ** self.power

    def dalpha(self, t: Tensor) -> Tensor:
        angle = t * math.pi / 2
        slope = -(math.pi / 2) * torch.sin(angle) * self.power * torch.cos(angle) ** (self.power - 1)
        return (1 - self.eps) * slope


@dataclass(frozen=True)
class DuoCosine:
    r"""DUO's :math:`\alpha_t = 1 - \cos(\tfrac{\pi}{2}(1 - (1-\epsilon)t))`.

    Upstream's derivative lacks the factor :math:`1-\epsilon`; ``strict_upstream`` keeps it so.
    """

    eps: float = 1e-3
    strict_upstream: bool = False

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - (1 - self.eps) * t))

    def dalpha(self, t: Tensor) -> Tensor:
        slope = -(math.pi / 2) * torch.sin(math.pi / 2 * (1 - (1 - self.eps) * t))
        return slope if self.strict_upstream else (1 - self.eps) * slope


@dataclass(frozen=True)
class Linear:
    r"""MDLM's linear :math:`\sigma = \sigma_{min} + t(\sigma_{max} - \sigma_{min})`."""

    sigma_min: float = 0.0
    sigma_max: float = 10.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-(self.sigma_min + t * (self.sigma_max - self.sigma_min)))

    def dalpha(self, t: Tensor) -> Tensor:
        return -(self.sigma_max - self.sigma_min) * self.alpha(t)


@dataclass(frozen=True)
class Geometric:
    r"""MDLM's geometric :math:`\sigma = \sigma_{min}^{1-t}\,\sigma_{max}^{t}`."""

    sigma_min: float = 1e-3
    sigma_max: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-(self.sigma_min ** (1 - t)) * self.sigma_max**t)

    def dalpha(self, t: Tensor) -> Tensor:
        level = self.sigma_min ** (1 - t) * self.sigma_max**t
        return -level * math.log(self.sigma_max / self.sigma_min) * torch.exp(-level)


def sample_times(
    count: int,
    *,
    antithetic: bool = True,
    smallest: float = 1e-3,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Draw one diffusion time for each row.

    .. math:: t_i = (1-t_{min})\,u_i + t_{min},\qquad u_i = (r_i/n + i/n) \bmod 1

    with r uniform on [0, 1); ``antithetic=False`` takes ``u_i = r_i``.

    Args:
        count: n, the number of rows.
        antithetic: Put exactly one time into each of n equal strata (row i owns stratum i).
        smallest: t_min; the loss weight 1/t is unbounded at 0.
        generator: Source of randomness.
        device: Where the times are made.
        dtype: Their floating dtype.

    Returns:
        Shape ``(n,)``, in ``[smallest, 1]``.

    Source: MDLM, diffusion.py ``_sample_t``.
    """
    draw = torch.rand(count, generator=generator, device=device, dtype=dtype)
    return stratify(draw, smallest) if antithetic else (1 - smallest) * draw + smallest


def stratify(uniform: Tensor, smallest: float = 1e-3) -> Tensor:
    """Turn n independent uniforms (n,) into one time per stratum; the arithmetic of `sample_times`."""
    count = len(uniform)
    offset = torch.arange(count, device=uniform.device, dtype=uniform.dtype) / count
    return (1 - smallest) * ((uniform / count + offset) % 1) + smallest
