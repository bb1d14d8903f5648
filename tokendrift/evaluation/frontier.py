"""Sweeps over steps, temperature and nucleus: Gen.-PPL against entropy for several models, beside real text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.evaluation.bootstrap import Interval, interval_from
from tokendrift.evaluation.comparison import check_alike
from tokendrift.evaluation.draws import DrawSamples, MeasureSamples, Setting
from tokendrift.evaluation.guard import SAME_SIZE
from tokendrift.evaluation.matching import KINDS, entropy
from tokendrift.evaluation.measures import Measures, as_sample_set
from tokendrift.evaluation.samples import Samples, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """One set of samples of the sweep.

    Attributes:
        model: Its name.
        setting: How it was sampled.
        measures: The figures.
    """

    model: str
    setting: Setting
    measures: Measures


def sweep(
    models: Mapping[str, DrawSamples],
    settings: Iterable[Setting],
    measure: MeasureSamples,
    *,
    real: Samples | Measures,
    count: int,
    progress: Callable[[Point], object] | None = None,
) -> Frontier:
    """Sample and measure every model at every setting.

    Real text is cut to as many samples as each point has, spread over it: the entropy of all tokens together depends
    on their number.

    Args:
        models: Names and what draws from them.
        settings: Steps, temperatures and nuclei; `Setting` has all combinations of none, list those you want.
        measure: Measures a set.
        real: Real text of the same length, at least ``count`` samples; or the measures of as many. In ids of the
            models' vocabulary, or texts if ``measure`` counts in the judge's.
        count: Samples for each point.
        progress: Called with each point when it is done.

    Raises:
        TokenDriftError: If there is no model or no setting, or real text and points are not of one number or were not
            measured alike.
    """
    settings = list(settings)
    if not models or not settings:
        raise fail("sweep needs at least one model and one setting.", models=list(models), settings=settings)
    check_count("count", count, least=2)
    if isinstance(real, Measures):
        _check_number(real.samples, count)
    else:
        given = as_sample_set(real)
        _check_number(min(count, len(given)), count)
        real = measure(given.only(sorted(spread([0] * len(given), [0] * count))))
    points = []
    for name, draw in models.items():
        for setting in settings:
            points.append(Point(name, setting, measure(draw(setting, count))))
            check_alike(points[-1].measures, real)
            if progress is not None:
                progress(points[-1])
    return Frontier(tuple(points), real)


@dataclass(frozen=True)
class Frontier:
    """Gen.-PPL against entropy for several models, with the point of real text.

    Attributes:
        points: The sets of samples.
        real: Real text of the same length.
    """

    points: tuple[Point, ...]
    real: Measures

    def curve(self, model: str, steps: int, top_p: float = 1.0) -> list[Point]:
        """Return the points of a model at a number of steps, by rising temperature."""
        found = [p for p in self.points if (p.model, p.setting.steps, p.setting.top_p) == (model, steps, top_p)]
        if not found:
            raise fail(f"the frontier has no point of model {model!r} with {steps} steps and top_p {top_p}.")
        return sorted(found, key=lambda point: point.setting.temperature)

    def curves(self) -> list[list[Point]]:
        """Return every curve, in the order in which they were drawn."""
        keys = dict.fromkeys((p.model, p.setting.steps, p.setting.top_p) for p in self.points)
        return [self.curve(*key) for key in keys]

    def at_entropy_of_real_text(
        self, model: str, steps: int, *, kind: str = "sample", top_p: float = 1.0
    ) -> Interval | None:
        """Return Gen.-PPL of a model where its entropy is that of real text, or None where no temperature reaches it.

        The logarithm is interpolated between the two neighbouring temperatures; the interval resamples the samples
        of both and those of real text.

        Args:
            model: Name.
            steps: Steps of the sampler.
            kind: ``"sample"`` or ``"unigram"``.
            top_p: Nucleus.

        Raises:
            TokenDriftError: If real text and points were not measured alike, or are not of one number of samples.
        """
        target = entropy(self.real, kind).estimate
        bracket = _bracket([point.measures for point in self.curve(model, steps, top_p)], kind, target)
        if bracket is None:
            return None
        a, b = bracket
        for point in bracket:
            check_alike(point, self.real)
            _check_number(self.real.samples, point.samples)
        name = f"{kind}_entropy"
        logs = [torch.tensor(m.log_gen_ppl, dtype=torch.float64) for m in bracket]
        ends = [torch.tensor(entropy(m, kind).estimate, dtype=torch.float64) for m in bracket]
        estimate = _between(torch.tensor(target, dtype=torch.float64), *ends, *logs)
        drawn = _between(
            self.real.replicates[name],
            a.replicates[name],
            b.replicates[name],
            a.replicates["gen_ppl"],
            b.replicates["gen_ppl"],
        )
        bounds = torch.tensor(interval_from(float(estimate), drawn, self.real.level), dtype=torch.float64)
        return Interval(*bounds.exp().tolist())

    def to_dict(self) -> dict[str, Any]:
        """Return every number for JSON: those behind the plots, and Gen.-PPL at the entropies of real text."""
        matched = []
        for curve in self.curves():
            model, setting, _ = curve[0]
            for kind in KINDS:
                found = self.at_entropy_of_real_text(model, setting.steps, kind=kind, top_p=setting.top_p)
                key = {"model": model, "steps": setting.steps, "top_p": setting.top_p, "kind": kind}
                matched.append({**key, "gen_ppl": None if found is None else found._asdict()})
        points = [{"model": p.model, **p.setting._asdict(), **p.measures.summary()} for p in self.points]
        return {"points": points, "real": self.real.summary(), "at_entropy_of_real_text": matched}

    def plot(self, kind: str = "sample", axes: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw Gen.-PPL against an entropy, a line for each model and number of steps, a star for real text.

        Args:
            kind: ``"sample"`` or ``"unigram"``.
            axes: Where to draw; a new figure by default.

        Raises:
            TokenDriftError: If matplotlib is missing.
        """
        from tokendrift.evaluation.plots import draw_frontier

        return draw_frontier(self, kind, axes)


def _check_number(real: int, count: int) -> None:
    """Require as many samples of real text as of each point."""
    if abs(real - count) > SAME_SIZE * count:
        raise fail(
            f"real text has {real} samples and a point {count}: the entropy of all tokens depends on their number.",
            "Measure as many, or pass real text itself, which is cut; draw fewer where there is no more of it.",
        )


def _bracket(curve: list[Measures], kind: str, target: float) -> tuple[Measures, Measures] | None:
    """Return the neighbours on a curve, by falling temperature, between which an entropy lies."""
    for colder, warmer in reversed(list(pairwise(curve))):
        ends = entropy(colder, kind).estimate, entropy(warmer, kind).estimate
        if min(ends) <= target <= max(ends):
            return colder, warmer
    return None


def _between(at: Tensor, first: Tensor, last: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return the value at ``at`` of the line through (first, start) and (last, end); never beyond the two by much."""
    share = torch.where(last == first, 0.5, (at - first) / (last - first))
    return start + share.clamp(-1, 2) * (end - start)  # redrawn neighbours may nearly meet
