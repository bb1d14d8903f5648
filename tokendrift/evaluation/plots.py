"""Drawing with matplotlib, imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokendrift.errors import TokenDriftError
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.matching import entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tokendrift.evaluation.frontier import Frontier

LINES = ("-", "--", ":", "-.")


def draw_frontier(frontier: Frontier, kind: str, axes: Axes | None) -> tuple[Figure, Axes]:
    """Draw Gen.-PPL against an entropy: a colour for each model, a line style for each number of steps."""
    figure, axes = canvas(axes)
    models = list(dict.fromkeys(point.model for point in frontier.points))
    steps = sorted({point.setting.steps for point in frontier.points})
    for curve in frontier.curves():
        model, setting, measures = curve[0]
        across = [entropy(point.measures, kind) for point in curve]
        up = [point.measures.gen_ppl for point in curve]
        cost = f"{setting.steps} steps" if measures.nfe is None else f"{measures.nfe} NFE"
        nucleus = "" if setting.top_p == 1 else f", top-p {setting.top_p:g}"
        axes.errorbar(
            [interval.estimate for interval in across],
            [interval.estimate for interval in up],
            xerr=arms(across),
            yerr=arms(up),
            linestyle=LINES[steps.index(setting.steps) % len(LINES)],
            color=f"C{models.index(model)}",
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.7,
            label=f"{model}, {cost}{nucleus}",
        )
    real = entropy(frontier.real, kind).estimate, frontier.real.gen_ppl.estimate
    axes.plot(*real, "*", color="black", markersize=13, label="real text")
    axes.set_yscale("log")
    axes.set_xlabel(f"{kind} entropy (nats); temperature falls to the left")
    axes.set_ylabel("Gen.-PPL")
    axes.legend(frameon=False, fontsize="small")
    return figure, axes


def canvas(axes: Axes | None) -> tuple[Figure, Axes]:
    """Return the figure of some axes, or a new one, free of pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TokenDriftError("plots need matplotlib.\n  pip install 'tokendrift[plot]'") from error
    if axes is not None:
        owner = axes.figure
        return owner if isinstance(owner, Figure) else owner.figure, axes
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    return figure, figure.subplots()


def arms(intervals: Sequence[Interval]) -> list[list[float]]:
    """Return the lengths of error bars below and above; never negative."""
    below = [max(0.0, interval.estimate - interval.low) for interval in intervals]
    above = [max(0.0, interval.high - interval.estimate) for interval in intervals]
    return [below, above]
