r"""Psi-samplers: the reverse step mixed with a predictor-corrector step, and their schedules.

With the posterior :math:`q_s`, its last step :math:`q_0` (alpha_s = 1) and the prior :math:`\pi`, a step draws from

.. math:: \kappa\, q_s + (1-\kappa)\,\big(\alpha_s q_0 + (1-\alpha_s)\,\pi\big).

At kappa = 1 that is ancestral sampling, at 0 every token is predicted and noised afresh; both have the right
marginals. Source: DUO (trainer_base.py ``_psi_update``, ``_get_kappas``, ``_get_sampling_time_profile``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tokendrift._checks import fail
from tokendrift.diffusion import LogLinear, Process
from tokendrift.diffusion.process import Mixture
from tokendrift.sampling.chain import LAST_TIME, Chain

MODES = ("pure-posterior", "pure-pc", "constant", "constant-remdm", "max-capped", "max-rescale")
PLATEAU = "linear-constant-linear-"


def psi_step(chain: Chain, t: float, s: float, kappa: float | Tensor) -> Mixture:
    """Return the law of one psi-step: ``kappa`` of the posterior, the rest predicted and noised afresh.

    Args:
        chain: The state of the batch.
        t: Current time.
        s: Next time, at most t; 0 means alpha_s = 1.
        kappa: At most 1: a number, or one a position (B, L).
    """
    there, _ = chain.process.levels(s, s) if s else (1.0, 1.0)
    onward, clean = chain.posterior(t, s), chain.posterior(t, 0.0)
    stay = kappa * onward.stay + (1 - kappa) * there * clean.stay
    return Mixture(stay, kappa * onward.denoise + (1 - kappa) * there * clean.denoise)


def remasking_kappa(process: Process, rule: str, eta: float, t: float, s: float) -> float:
    r"""Return the kappa at which a masked psi-step sends unmasked tokens back with chance sigma.

    .. math:: \kappa = 1 - \sigma / (1-\alpha_s), \qquad
        \sigma_{cap} = \min(\eta, c),\quad \sigma_{rescale} = \eta\min(1, c),\quad c = (1-\alpha_s)/\alpha_t

    A sigma above :math:`1-\alpha_s`, which the cap lets through in the last steps, asks for a kappa just below 0: the
    law is still one. `Psi` clips it to 0, as DUO does; `ReMDM` takes it as it is.

    Args:
        process: Gives the levels.
        rule: ``"constant"`` (sigma = eta), ``"cap"``, ``"rescale"``, or ``"rescale-duo"``, in which DUO's code
            takes eta times min(eta, c).
        eta: Chance of remasking, in [0, 1].
        t: Current time.
        s: Next time.
    """
    alpha_t, alpha_s = process.levels(t, s)
    if alpha_s == 1:
        return 1.0  # nothing is noised any more
    most = (1 - alpha_s) / alpha_t if alpha_t else math.inf  # no signal at all: nothing stands that could go back
    sigma = {
        "constant": eta,
        "cap": min(eta, most),
        "rescale": eta * min(1.0, most),
        "rescale-duo": eta * min(eta, most),
    }[rule]
    return 1 - sigma / (1 - alpha_s)


@dataclass(frozen=True)
class Psi:
    """Psi-sampler with three regions of time, each with its own kappa.

    Attributes:
        high: Kappa in the first region (most noise): ``"pure-posterior"`` (1), ``"pure-pc"`` (0),
            ``"constant-K"``, or after a remasking chance ``"constant-remdm-ETA"``, ``"max-capped-ETA"``,
            ``"max-rescale-ETA"``; see `remasking_kappa`. The last step of a remasking region has kappa 1.
        middle: Kappa in the second region.
        low: Kappa in the third.
        high_frac: Share of the N + 1 grid points in the first region.
        middle_frac: Share in the second.
        profile: ``"linear"``, or ``"linear-constant-linear-C"``: fall to time C, stay there through the middle
            region, fall to the end. With ``-inv`` at the end of the name C is a signal level instead.

    Source: DUO, flags ``sampling.psi.*``; "max-rescale" is eta times min(eta, c), as its code has it.
    """

    high: str = "pure-posterior"
    middle: str = "pure-posterior"
    low: str = "pure-posterior"
    high_frac: float = 0.2
    middle_frac: float = 0.6
    profile: str = "linear"

    def __post_init__(self) -> None:
        for name in ("high", "middle", "low"):
            _parse(name, getattr(self, name))
        if min(self.high_frac, self.middle_frac) < 0 or self.high_frac + self.middle_frac > 1:
            raise fail(
                "high_frac and middle_frac must be shares, together at most 1.",
                high_frac=self.high_frac,
                middle_frac=self.middle_frac,
            )
        self._plateau()

    def __call__(self, chain: Chain, steps: int | None) -> Iterator[Mixture]:
        """Yield one psi-step after another."""
        times = self.times(chain.process, len(chain.times(steps)) - 1)
        kappas = self.kappas(chain.process, times)
        for (t, s), kappa in zip(pairwise([*times[:-1], chain.end]), kappas, strict=False):
            yield psi_step(chain, t, s, kappa)

    def regions(self, points: int) -> list[range]:
        """Return the three regions of the grid's points."""
        high = round(self.high_frac * points)
        middle = min(round(self.middle_frac * points), points - high)  # both may have been rounded up
        return [range(high), range(high, high + middle), range(high + middle, points)]

    def times(self, process: Process, steps: int) -> list[float]:
        """Return the N + 1 times of the profile, from 1 on; the last step goes to `Chain.end`, whatever the last is."""
        plateau = self._plateau()
        if plateau is None:
            whole: list[float] = torch.linspace(1, LAST_TIME, steps + 1, dtype=torch.float64).tolist()
            return whole
        level, is_alpha = plateau
        if is_alpha:
            # DUO's inverse of the log-linear schedule leaves its eps out.
            schedule = LogLinear(eps=0.0) if isinstance(process.schedule, LogLinear) else process.schedule
            level = schedule.time(torch.tensor(level, dtype=torch.float64)).item()
        high, middle, low = (len(region) for region in self.regions(steps + 1))
        fall = torch.linspace(1, level, high, dtype=torch.float64).tolist()
        grid = [*fall, *[level] * middle, *torch.linspace(level, LAST_TIME, low, dtype=torch.float64).tolist()]
        return [1.0, *grid[1:]]  # with few steps, no point of the grid may be left for the first region

    def kappas(self, process: Process, times: list[float]) -> list[float]:
        """Return kappa for each point of the grid; the i-th belongs to the step from the i-th time."""
        found = []
        for name, region in zip(("high", "middle", "low"), self.regions(len(times)), strict=True):
            mode, number = _parse(name, getattr(self, name))
            rule = {"constant-remdm": "constant", "max-capped": "cap", "max-rescale": "rescale-duo"}.get(mode)
            if rule is None:
                found += [{"pure-posterior": 1.0, "pure-pc": 0.0, "constant": number}[mode]] * len(region)
            elif region:
                pairs = pairwise(times[region.start : region.stop])
                found += [*(max(remasking_kappa(process, rule, number, t, s), 0.0) for t, s in pairs), 1.0]
        return found

    def _plateau(self) -> tuple[float, bool] | None:
        """Return where the profile stays and whether that is a signal level; None for the straight line."""
        if self.profile == "linear":
            return None
        number = self.profile.removeprefix(PLATEAU).removesuffix("-inv")
        level = _number(number) if self.profile.startswith(PLATEAU) else None
        if level is None or not 0 < level < 1:
            raise fail(
                "profile must be 'linear', 'linear-constant-linear-C' or 'linear-constant-linear-C-inv' with C "
                "between 0 and 1.",
                profile=self.profile,
            )
        return level, self.profile.endswith("-inv")


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse(name: str, text: str) -> tuple[str, float]:
    """Return mode and number of a kappa mode such as ``"max-capped-0.05"``."""
    if text in MODES[:2]:
        return text, 0.0
    mode = max((each for each in MODES[2:] if text.startswith(f"{each}-")), key=len, default="")
    number = _number(text.removeprefix(f"{mode}-"))
    if not mode or number is None or not 0 <= number <= 1:
        raise fail(
            f"{name} must be 'pure-posterior', 'pure-pc', or one of 'constant-X', 'constant-remdm-X', 'max-capped-X', "
            "'max-rescale-X' with X from 0 to 1.",
            **{name: text},
        )
    return mode, number
