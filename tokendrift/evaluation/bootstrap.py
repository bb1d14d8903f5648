"""Resampling over samples: how much a figure would vary with another draw of equally many samples.

Averages over samples are resampled by the percentile bootstrap. Figures that count whether something occurs at all
(distinct n-grams, duplicates) would count a sample that is drawn twice as a repetition. They are computed on random
halves instead, in which no sample occurs twice. The variance of a mean over halves of n samples is that of a draw of n.
The level of these figures depends on how many samples there are, and is set back to the estimate (``centred``).

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993); Shao and Wu, A General Theory for Jackknife
Variance Estimation (Annals of Statistics 1989), for the halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.evaluation.generative_perplexity import PerplexityResult
from tokendrift.evaluation.protocols import log_perplexity

BLOCK = 1 << 22  # resampled values held at a time


class Interval(NamedTuple):
    """A figure and its confidence interval.

    Attributes:
        estimate: The figure on all samples.
        low: Lower end.
        high: Upper end.
    """

    estimate: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Return whether a value lies outside. An interval that is not known (NaN) excludes nothing."""
        return value < self.low or value > self.high

    def exp(self) -> Interval:
        """Return the interval of the exponential of the figure; infinite where that is too large for a float."""
        return Interval(*torch.tensor(self, dtype=torch.float64).exp().tolist())

    def ends(self, spec: str = "") -> str:
        """Return the two ends as text, ``"0.9 to 1.2"``, each number in a format such as ``".1f"``."""
        return f"{self.low:{spec}} to {self.high:{spec}}"

    def __format__(self, spec: str) -> str:
        """Return the figure with its interval as text, each number in a format such as ``".1f"``.

        >>> f"{Interval(1.0, 0.91, 1.2):.1f}"
        '1.0 (0.9 to 1.2)'
        """
        return f"{self.estimate:{spec}} ({self.ends(spec)})"


def bootstrap_interval(
    statistic: Callable[..., Tensor],
    *per_sample: Tensor,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return a statistic with its percentile bootstrap interval.

    Samples are redrawn with replacement. All arrays are redrawn with the same indices, so that the values of one
    sample stay together.

    Args:
        statistic: Maps arrays (R, n) to values (R,): it reduces the last axis and nothing else.
        *per_sample: Arrays with one value for each sample, (n,), n at least 2.
        resamples: Number of redraws R. Default: 1000.
        level: Share of the resampled values inside the interval. Default: 0.95.
        seed: Random seed of the redraws; the global random state is not used. Default: 0.

    Raises:
        TokenDriftError: If the arrays do not agree or are too short, or an option is out of range.

    Source: Efron, Better Bootstrap Confidence Intervals (1987), the percentile method.

    >>> bootstrap_interval(lambda x: x.mean(dim=-1), torch.full((5,), 2.0))
    Interval(estimate=2.0, low=2.0, high=2.0)
    """
    check_resampling(level, resamples)
    arrays = _check_arrays(per_sample)
    generator = torch.Generator().manual_seed(seed)
    return interval_from(_estimate(statistic, arrays), _replicates(statistic, arrays, resamples, generator), level)


def mean_interval(values: Tensor, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean of one value a sample, (n,), with its interval; options as for `bootstrap_interval`."""
    return bootstrap_interval(lambda x: x.mean(dim=-1), values, resamples=resamples, level=level, seed=seed)


def perplexity_interval(
    scored: PerplexityResult, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return Gen.-PPL with its interval, averaged as its protocol does.

    Args:
        scored: A `PerplexityResult`.
        resamples: As for `bootstrap_interval`.
        level: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.
    """
    log = partial(log_perplexity, protocol=scored.protocol)
    per_sample = scored.sample_nll, scored.sample_tokens
    return bootstrap_interval(log, *per_sample, resamples=resamples, level=level, seed=seed).exp()


def perplexity_ratio_interval(
    a: PerplexityResult,
    b: PerplexityResult,
    *,
    paired: bool = False,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the ratio of Gen.-PPL of a to that of b with its interval; below 1, a is likelier to the judge.

    The difference lies beyond chance if the interval does not contain 1.

    Args:
        a: A `PerplexityResult`.
        b: Another, of the same protocol.
        paired: Redraw sample i of a together with sample i of b, because the two share a prompt or noise.
            Default: False.
        resamples: As for `bootstrap_interval`.
        level: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Raises:
        TokenDriftError: If the protocols differ, or, when paired, the numbers of samples.
    """
    check_resampling(level, resamples)
    if a.protocol != b.protocol:
        raise fail(
            f"a was scored under protocol {a.protocol!r} and b under {b.protocol!r}; the two cannot be compared.",
            "Score both under one protocol.",
        )
    log = partial(log_perplexity, protocol=a.protocol)
    first = _check_arrays((a.sample_nll, a.sample_tokens))
    second = _check_arrays((b.sample_nll, b.sample_tokens))
    generator = torch.Generator().manual_seed(seed)
    if paired:
        if first[0].shape != second[0].shape:
            raise fail(
                f"paired=True needs equally many samples of a and b, but there are {len(first[0])} and "
                f"{len(second[0])}.",
                "Leave paired out for samples that do not belong together.",
            )
        replicates = _replicates(lambda s, c, t, d: log(s, c) - log(t, d), first + second, resamples, generator)
    else:
        replicates = _replicates(log, first, resamples, generator) - _replicates(log, second, resamples, generator)
    return interval_from(_estimate(log, first) - _estimate(log, second), replicates, level).exp()


def redraws(n: int, resamples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield indices of redrawn samples, int64 (r, n), in blocks that make ``resamples`` rows in all."""
    block = max(1, BLOCK // n)
    for start in range(0, resamples, block):
        yield torch.randint(n, (min(block, resamples - start), n), generator=generator)


def draw_counts(index: Tensor, n: int) -> Tensor:
    """Return how often each of n things stands in each row of indices (R, K), float64 (R, n)."""
    counts = torch.zeros(len(index), n, dtype=torch.float64)
    return counts.scatter_add_(1, index, torch.ones(index.shape, dtype=torch.float64))


def halves(n: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Return random halves of n samples, none of them twice, bool (R, n) with n // 2 true in each row."""
    chance = torch.rand(resamples, n, generator=generator)
    return chance.argsort(dim=1).argsort(dim=1) < n // 2


def interval_from(estimate: float, replicates: Tensor, level: float = 0.95, *, centred: bool = False) -> Interval:
    """Return the interval that holds a share ``level`` of the replicates.

    Replicates on which the figure is not defined (NaN) are left out. Both ends are NaN if all are, or the estimate is.

    Args:
        estimate: The figure on all samples.
        replicates: The figure on resampled ones, (R,).
        level: Share of the replicates inside the interval. Default: 0.95.
        centred: Shift the replicates so that their mean is the estimate, for figures that depend on how many different
            samples there are. Default: False.

    >>> interval_from(2.0, torch.tensor([0.0, 1.0, 2.0]), level=0.5, centred=True)
    Interval(estimate=2.0, low=1.5, high=2.5)
    """
    values = replicates.double()
    if centred:
        values = values - values.nanmean() + estimate
    if math.isnan(estimate):
        return Interval(estimate, math.nan, math.nan)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(values, tails).tolist()
    return Interval(estimate, low, high)


def _replicates(
    statistic: Callable[..., Tensor], arrays: tuple[Tensor, ...], resamples: int, generator: torch.Generator
) -> Tensor:
    """Return the statistic on ``resamples`` redrawn corpora, (R,)."""
    parts = []
    for index in redraws(len(arrays[0]), resamples, generator):
        parts.append(_checked(statistic(*(array[index] for array in arrays)), len(index)))
    return torch.cat(parts)


def _estimate(statistic: Callable[..., Tensor], arrays: tuple[Tensor, ...]) -> float:
    return float(_checked(statistic(*(array[None] for array in arrays)), 1))


def _checked(values: Tensor, resamples: int) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (resamples,):
        raise fail(
            f"statistic must map arrays (R, n) to values (R,) = ({resamples},).",
            "Reduce the last axis: lambda x: x.mean(dim=-1).",
            values=values,
        )
    return values.double()


def check_resampling(level: float, resamples: int) -> None:
    """Require a level between 0 and 1 and at least one redraw."""
    check_count("resamples", resamples, least=1)
    if not 0 < level < 1:
        raise fail("level must lie between 0 and 1, both excluded.", level=level)


def _check_arrays(arrays: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not arrays:
        raise fail("bootstrap_interval needs at least one array of per-sample values.")
    arrays = tuple(torch.as_tensor(array, device="cpu").double() for array in arrays)
    for array in arrays:
        if array.ndim != 1 or array.shape != arrays[0].shape:
            raise fail("per-sample arrays must all have the same shape (n,).", first=arrays[0], other=array)
        if len(array) < 2:
            raise fail("an interval over samples needs at least 2 of them.", "Score more samples.", array=array)
    return arrays
