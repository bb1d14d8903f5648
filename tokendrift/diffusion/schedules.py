r"""Noise schedules: the signal level :math:`\alpha_t`, its derivative, and :math:`\sigma = -\log\alpha_t`.

Time runs from 0 (clean) to 1 (noise). Every method takes and returns float tensors of any one shape and
keeps their dtype. Sources: MDLM (`kuleshov-group/mdlm`, noise_schedule.py), DUO (`s-sahoo/duo`,
trainer_base.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendrift._checks import check_count, check_fraction, fail

BISECTIONS = 60  # halvings of [0, 1]: to the last bit of float64


class Schedule(ABC):
    r"""The signal level over time, from which a process computes everything that depends on time.

    A schedule of your own must define `alpha` and `dalpha`; the other methods use these. If one of the other methods
    has a closed form, define it too: ``1 - alpha`` loses four of float32's seven digits at t = 1e-3.

    >>> class Square(Schedule):
    ...     def alpha(self, t):
    ...         return 1 - t**2
    ...     def dalpha(self, t):
    ...         return -2 * t
    >>> Square().time(torch.tensor([0.75]))
    tensor([0.5000])
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal level: 1 where clean, near 0 at t = 1, falling."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """Return d alpha / dt, negative."""

    def noise(self, t: Tensor) -> Tensor:
        r"""Return :math:`1 - \alpha_t`, the chance that a token was replaced."""
        return 1 - self.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        r"""Return :math:`\sigma = -\log \alpha_t`, the number that time-conditioned denoisers read."""
        alpha = self.alpha(t)
        return torch.where(alpha > 0.5, -torch.log1p(-self.noise(t)), -torch.log(alpha))

    def time(self, alpha: Tensor) -> Tensor:
        """Return the time in [0, 1] at which the signal level is alpha; the nearer end for levels not reached."""
        wanted = alpha.double()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            late = self.alpha(middle) < wanted
            low, high = torch.where(late, low, middle), torch.where(late, middle, high)
        return ((low + high) / 2).to(alpha.dtype)


@dataclass(frozen=True)
class LogLinear(Schedule):
    r""":math:`\alpha_t = 1 - (1-\epsilon)t`: the default of MDLM and DUO.

    DUO's own inverse leaves :math:`\epsilon` out: it is ``LogLinear(eps=0).time``.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) + self.eps * t  # 1 - t is exact in the second half, where alpha is small

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -(1 - self.eps))

    def noise(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * t

    def time(self, alpha: Tensor) -> Tensor:
        return ((1 - alpha) / (1 - self.eps)).clamp(0, 1)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""MDLM's :math:`\alpha_t = \epsilon + (1-\epsilon)\cos(\pi t/2)^k`, k = 1, or 2 for cosine-squared."""

    eps: float = 1e-3
    power: int = 1

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        check_count("power", self.power, least=1)

    def alpha(self, t: Tensor) -> Tensor:
        return self.eps + (1 - self.eps) * self._cosine(t) ** self.power

    def dalpha(self, t: Tensor) -> Tensor:
        slope = -(math.pi / 2) * torch.sin(math.pi / 2 * t) * self.power * self._cosine(t) ** (self.power - 1)
        return (1 - self.eps) * slope

    def noise(self, t: Tensor) -> Tensor:
        one_minus_cosine = 2 * torch.sin(t * math.pi / 4) ** 2
        return -(1 - self.eps) * torch.expm1(self.power * torch.log1p(-one_minus_cosine))

    def time(self, alpha: Tensor) -> Tensor:
        cosine = ((alpha - self.eps) / (1 - self.eps)).clamp(0, 1) ** (1 / self.power)
        return torch.acos(cosine) * (2 / math.pi)

    @staticmethod
    def _cosine(t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # cos(pi t / 2), with its digits near t = 1


@dataclass(frozen=True)
class DuoCosine(Schedule):
    r"""DUO's :math:`\alpha_t = 1 - \cos(\tfrac{\pi}{2}(1 - (1-\epsilon)t))`.

    Upstream's derivative lacks the factor :math:`1-\epsilon`; ``strict_upstream`` keeps it so. Its inverse
    leaves :math:`\epsilon` out: it is ``DuoCosine(eps=0).time``.
    """

    eps: float = 1e-3
    strict_upstream: bool = False

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def alpha(self, t: Tensor) -> Tensor:
        return 2 * torch.sin(math.pi / 4 * ((1 - t) + self.eps * t)) ** 2  # 1 - cos, without its cancellation

    def dalpha(self, t: Tensor) -> Tensor:
        slope = -(math.pi / 2) * torch.sin(math.pi / 2 * ((1 - t) + self.eps * t))
        return slope if self.strict_upstream else (1 - self.eps) * slope

    def noise(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - self.eps) * t)

    def time(self, alpha: Tensor) -> Tensor:
        return (torch.asin((1 - alpha).clamp(0, 1)) * (2 / math.pi) / (1 - self.eps)).clamp(0, 1)


class SigmaSchedule(Schedule):
    r"""A schedule that is stated as :math:`\sigma`."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.sigma(t))

    def noise(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.sigma(t))


@dataclass(frozen=True)
class Linear(SigmaSchedule):
    r"""MDLM's linear :math:`\sigma = \sigma_{min} + t(\sigma_{max} - \sigma_{min})`."""

    sigma_min: float = 0.0
    sigma_max: float = 10.0

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max, above=False)

    def dalpha(self, t: Tensor) -> Tensor:
        return -(self.sigma_max - self.sigma_min) * self.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)


@dataclass(frozen=True)
class Geometric(SigmaSchedule):
    r"""The geometric :math:`\sigma = \sigma_{min}^{1-t}\,\sigma_{max}^{t}` of MDLM and SEDD.

    SEDD trains uniform-state models with ``sigma_max=20``; 1 leaves 37 % of the tokens clean at t = 1.
    """

    sigma_min: float = 1e-3
    sigma_max: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max, above=True)

    def dalpha(self, t: Tensor) -> Tensor:
        return -math.log(self.sigma_max / self.sigma_min) * self.sigma(t) * self.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min ** (1 - t) * self.sigma_max**t


def sample_times(
    count: int,
    *,
    antithetic: bool = True,
    smallest: float = 1e-3,
    levels: int | None = None,
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
        levels: T for discrete time: every t moves up to the end of its interval of length 1/T. Continuous
            by default.
        generator: Source of randomness.
        device: Where the times are made.
        dtype: Their floating dtype.

    Returns:
        Shape ``(n,)``, in ``[smallest, 1]``.

    Raises:
        TokenDriftError: If count or levels is below 1, or smallest not in [0, 1).

    Source: MDLM, diffusion.py ``_sample_t``.
    """
    check_count("count", count, least=1)
    check_fraction("smallest", smallest)
    # As torch.rand draws; but that takes no generator where the compiler does not know the count.
    draw = torch.empty(count, device=device, dtype=dtype).uniform_(generator=generator)
    times = stratify(draw, smallest) if antithetic else (1 - smallest) * draw + smallest
    if levels is None:
        return times
    check_count("levels", levels, least=1)
    return (((times * levels).floor() + 1) / levels).clamp_max(1)


def stratify(uniform: Tensor, smallest: float = 1e-3) -> Tensor:
    """Turn n independent uniforms (n,) into one time per stratum; the arithmetic of `sample_times`."""
    count = len(uniform)
    offset = torch.arange(count, device=uniform.device, dtype=uniform.dtype) / count
    return (1 - smallest) * ((uniform / count + offset) % 1) + smallest


def _check_eps(eps: float) -> None:
    if not 0 <= eps < 1:
        raise fail("eps, the signal left at t = 1, must lie in [0, 1).", eps=eps)


def _check_range(sigma_min: float, sigma_max: float, *, above: bool) -> None:
    least = "above 0" if above else "at least 0"
    if sigma_min < 0 or (above and sigma_min == 0) or not sigma_min < float(sigma_max) < math.inf:
        raise fail(f"sigma_min must be {least} and below sigma_max.", sigma_min=sigma_min, sigma_max=sigma_max)
