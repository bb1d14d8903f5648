"""Sweeps over steps, temperature and nucleus: Gen.-PPL against entropy for several models, beside real text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.comparison import check_alike, log_figure, ratio_interval
from tokendrift.evaluation.guard import SAME_SIZE
from tokendrift.evaluation.matching import KINDS, DrawSamples, MeasureSamples, check_one_size, entropy, entropy_name
from tokendrift.evaluation.measures import Measures, as_sample_set
from tokendrift.evaluation.plots import canvas, error_bars
from tokendrift.evaluation.samples import SampleInput, spread
from tokendrift.sampling import SamplingSetting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_STYLES = ("-", "--", ":", "-.")


class Point(NamedTuple):
    """One set of samples of a sweep.

    Attributes:
        model: Name of the model.
        setting: How the set was sampled.
        measures: Figures of the set.
    """

    model: str
    setting: SamplingSetting
    measures: Measures


def sweep(
    models: Mapping[str, DrawSamples],
    settings: Iterable[SamplingSetting],
    measure: MeasureSamples,
    *,
    real: SampleInput | Measures,
    count: int,
    progress: Callable[[Point], object] | None = None,
) -> Frontier:
    """Sample and measure every model at every setting.

    Real text is cut to as many samples as each point has, spread over it: the entropy of all tokens together depends
    on their number.

    Args:
        models: For each name of a model a function that draws samples from it, such as `denoiser_samples` returns.
        settings: Steps, temperature and nucleus of each point.
        measure: Measures a set of samples.
        real: Real text of the same length, at least ``count`` samples: ids of the models' vocabulary, or texts if
            ``measure`` counts in the judge's tokens. The measures of ``count`` samples of real text may be passed
            instead.
        count: Samples for each point.
        progress: Called with each point when it is done. Default: None.

    Raises:
        TokenDriftError: If there is no model or no setting, if real text has another number of samples than the
            points, or if it was not measured with the same options.
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
            model: Name of the model.
            steps: Steps of the sampler.
            kind: Entropy to compare at, ``"sample"`` or ``"unigram"``. Default: ``"sample"``.
            top_p: Nucleus of the points. Default: 1.0.

        Raises:
            TokenDriftError: If real text and the points were not measured with the same options, or differ in their
                number of samples.
        """
        # 1. The neighbouring temperatures between whose entropies that of real text lies.
        target = entropy(self.real, kind).estimate
        bracket = _bracket([point.measures for point in self.curve(model, steps, top_p)], kind, target)
        if bracket is None:
            return None
        for measures in bracket:
            check_alike(measures, self.real)
            _check_number(self.real.samples, measures.samples)
        # 2. log Gen.-PPL between the two, for the estimates and again on every redraw.
        return ratio_interval(_between(bracket, self.real, kind, "gen_ppl"), self.real.level)

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
            kind: ``"sample"`` or ``"unigram"``. Default: ``"sample"``.
            axes: Axes to draw on. Default: those of a new figure.

        Returns:
            The figure and the axes of matplotlib.

        Raises:
            TokenDriftError: If matplotlib is missing.
        """
        figure, axes = canvas(axes)
        models = list(dict.fromkeys(point.model for point in self.points))
        steps = sorted({point.setting.steps for point in self.points})
        for curve in self.curves():
            model, setting, measures = curve[0]
            across = [entropy(point.measures, kind) for point in curve]
            up = [point.measures.gen_ppl for point in curve]
            cost = f"{setting.steps} steps" if measures.nfe is None else f"{measures.nfe} NFE"
            nucleus = "" if setting.top_p == 1 else f", top-p {setting.top_p:g}"
            error_bars(
                axes,
                across,
                up,
                linestyle=LINE_STYLES[steps.index(setting.steps) % len(LINE_STYLES)],
                color=f"C{models.index(model)}",
                marker="o",
                markersize=3,
                linewidth=1.2,
                elinewidth=0.7,
                label=f"{model}, {cost}{nucleus}",
            )
        star = {"fmt": "*", "color": "black", "markersize": 13, "label": "real text", "elinewidth": 0.7}
        error_bars(axes, [entropy(self.real, kind)], [self.real.gen_ppl], **star)
        axes.set_yscale("log")
        axes.set_xlabel(f"{kind} entropy (nats); temperature falls to the left")
        axes.set_ylabel("Gen.-PPL")
        axes.legend(frameon=False, fontsize="small")
        return figure, axes


def ratio_at_entropy(
    model: Measures, curve: Iterable[Measures], *, kind: str = "sample", figure: str = "bits_per_byte", judge: int = 0
) -> Interval | None:
    """Return a figure of a set over that of a baseline at the same entropy, or None where the baseline has none.

    The baseline is a curve of sets, such as those of one model at several temperatures or nuclei. The logarithm of its
    figure is interpolated between the two neighbours whose entropies enclose that of the set. The interval resamples
    all three sets, and the redraws of sets of one size are paired.

    Args:
        model: Figures of the set.
        curve: Figures of the baseline, two sets at least, in any order.
        kind: Entropy to compare at, ``"sample"`` or ``"unigram"``. Default: ``"sample"``.
        figure: ``"bits_per_byte"`` or ``"gen_ppl"``. Default: ``"bits_per_byte"``.
        judge: Index of the judge, 0 for the first, 1 for the first of ``Measures.panel``. Default: 0.

    Raises:
        TokenDriftError: If the sets were not measured with the same options, or differ in size at equal unigram
            entropy.
    """
    points = sorted(curve, key=lambda measures: entropy(measures, kind).estimate)
    for point in points:
        check_alike(model, point)
        check_one_size(kind, model.samples, point.samples)
    bracket = _bracket(points, kind, entropy(model, kind).estimate)
    if bracket is None:
        return None
    ours, theirs = log_figure((model, *model.panel)[judge], figure), _between(bracket, model, kind, figure, judge)
    return ratio_interval((ours[0] - theirs[0], ours[1] - theirs[1]), model.level)


def _check_number(real: int, count: int) -> None:
    """Require as many samples of real text as of each point."""
    if abs(real - count) > SAME_SIZE * count:
        raise fail(
            f"real text has {real} samples and a point {count}: the entropy of all tokens depends on their number.",
            "Measure equally many samples of real text, or pass the samples of real text as real=, which are then "
            "cut to that number.",
        )


def _bracket(curve: list[Measures], kind: str, target: float) -> tuple[Measures, Measures] | None:
    """Return the neighbours on a curve, by falling temperature, between which an entropy lies."""
    for colder, warmer in reversed(list(pairwise(curve))):
        ends = entropy(colder, kind).estimate, entropy(warmer, kind).estimate
        if min(ends) <= target <= max(ends):
            return colder, warmer
    return None


def _between(
    bracket: tuple[Measures, Measures], other: Measures, kind: str, figure: str, judge: int = 0
) -> tuple[float, Tensor]:
    """Return the logarithm of a figure between two sets, at the entropy of another, and the same on every redraw."""
    name = entropy_name(kind)
    estimate, redrawn = [entropy(other, kind).estimate], [other.replicates[name]]
    for measures in bracket:
        height, heights = log_figure((measures, *measures.panel)[judge], figure)
        estimate += [entropy(measures, kind).estimate, height]
        redrawn += [measures.replicates[name], heights]
    return float(_on_the_line(*torch.tensor(estimate, dtype=torch.float64))), _on_the_line(*redrawn)


def _on_the_line(x: Tensor, x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> Tensor:
    """Return y at x on the line through (x0, y0) and (x1, y1), held within one length of it beyond either end."""
    share = torch.where(x1 == x0, 0.5, (x - x0) / (x1 - x0))
    return y0 + share.clamp(-1, 2) * (y1 - y0)  # on some redraws the two points nearly meet
