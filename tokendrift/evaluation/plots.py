"""Helpers for all plots. Matplotlib is imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokendrift.errors import TokenDriftError
from tokendrift.evaluation.bootstrap import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raise an error if matplotlib is missing: call it before the work that ends in plots.

    Raises:
        TokenDriftError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise TokenDriftError("plots need matplotlib.\n  pip install 'tokendrift[plot]'") from error


def canvas(axes: Axes | None) -> tuple[Figure, Axes]:
    """Return the figure of some axes and the axes, or those of a new figure outside pyplot's global state."""
    require_matplotlib()
    from matplotlib.figure import Figure

    if axes is not None:
        owner = axes.figure
        return owner if isinstance(owner, Figure) else owner.figure, axes
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    return figure, figure.subplots()


def estimates(intervals: Sequence[Interval]) -> list[float]:
    """Return the estimates of intervals."""
    return [interval.estimate for interval in intervals]


def error_bar_lengths(intervals: Sequence[Interval]) -> list[list[float]]:
    """Return the lengths of error bars below and above the estimates, never negative, as matplotlib takes them."""
    below = [max(0.0, interval.estimate - interval.low) for interval in intervals]
    above = [max(0.0, interval.high - interval.estimate) for interval in intervals]
    return [below, above]


def error_bars(axes: Axes, across: Sequence[Interval], up: Sequence[Interval], **style: Any) -> None:
    """Draw points with the intervals of both of their coordinates."""
    across_errors, up_errors = error_bar_lengths(across), error_bar_lengths(up)
    axes.errorbar(estimates(across), estimates(up), xerr=across_errors, yerr=up_errors, **style)


def plot_band(ax: Axes, x: Sequence[int], intervals: list[Interval], colour: str, style: str, label: str) -> None:
    """Draw the estimates of intervals as a line, and their ends as a band."""
    ax.plot(x, estimates(intervals), style, color=colour, label=label)
    low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
