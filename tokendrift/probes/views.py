"""Tables and plots of the probes, for one denoiser or several side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.plots import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from tokendrift.probes.information_decay import InformationDecay
    from tokendrift.probes.marginal_trap import MarginalTrap


def decay_table(
    probes: Mapping[str, InformationDecay],
    decode: Callable[[int], str] = str,
    distances: Sequence[int] | None = None,
) -> Table:
    """Return a `rich` table with a row for each distance.

    Args:
        probes: Results by the name of the denoiser.
        decode: Text of one token.
        distances: Rows to show; all by default.
    """
    from rich.markup import escape
    from rich.table import Table

    first = next(iter(probes.values()))
    alone = len(probes) == 1
    table = Table(
        title="Information decay: predictions at a distance from the prompt",
        caption=f"nats; entropy of the corpus' unigrams {first.corpus_entropy:.2f}; {first.prompts} prompts of "
        f"{first.prompt_length} tokens" + (f"; {first.level:.0%} intervals over prompts" if alone else ""),
    )
    table.add_column("distance", justify="right")
    for heading, justify in (("entropy", "right"), ("KL from\nunigrams", "right"), ("likeliest tokens", "left")):
        for name in probes:
            table.add_column(f"{heading}\n{name}".strip(), justify=justify, no_wrap=justify == "right")  # type: ignore[arg-type]
    for d in distances or range(1, len(first.entropy) + 1):
        shown = [_with_interval(probe.entropy[d - 1], alone) for probe in probes.values()]
        shown += [_with_interval(probe.divergence[d - 1], alone) for probe in probes.values()]
        for probe in probes.values():
            tokens = (f"{escape(repr(decode(share.token)))} {share.probability:.2f}" for share in probe.top[d - 1])
            shown.append("  ".join(token.replace(" ", "\u00a0") for token in tokens))  # lines break between tokens
        table.add_row(str(d), *shown)
    return table


def trap_table(probes: Mapping[str, MarginalTrap]) -> Table:
    """Return a `rich` table with a row for each k and denoiser."""
    from rich.table import Table

    first = next(iter(probes.values()))
    table = Table(
        title="Marginal trap: k tokens drawn at once against the same k drawn in turn",
        caption=f"nats per position, log-likelihoods under the judge {first.judge}; gap = in turn - at once; entropy: "
        "of the predictions at once, and of all tokens drawn from them; "
        f"{len(first.prompt_gaps)} prompts x {first.draws} draws; {first.level:.0%} intervals over prompts",
    )
    alone = len(probes) == 1
    if not alone:
        table.add_column("denoiser")
    for heading in ("k", "gap", "interval", "in turn", "at once", "entropy", "entropy drawn", "at once less likely"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, k in enumerate(first.sizes):
        if not alone:
            table.add_section()
        for name, probe in probes.items():
            gap = probe.gap[i]
            row = [str(k), f"{gap.estimate:.3f}", f"{gap.low:.3f} to {gap.high:.3f}"]
            row += [
                f"{figures[i]:.3f}"
                for figures in (probe.sequential, probe.parallel, probe.entropy, probe.drawn_entropy)
            ]
            table.add_row(*([] if alone else [name]), *row, f"{probe.less_likely[i]:.0%}")
    return table


def plot_decay(probes: Mapping[str, InformationDecay], axes: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw entropy (solid) and divergence (dashed) over distance, with intervals; returns matplotlib's (fig, ax)."""
    figure, ax = canvas(axes)
    for number, (name, probe) in enumerate(probes.items()):
        distance = range(1, len(probe.entropy) + 1)
        for label, intervals, style in (("entropy", probe.entropy, "-"), ("KL", probe.divergence, "--")):
            _band(ax, distance, intervals, f"C{number}", style, _headed(label, name))
    ax.axhline(next(iter(probes.values())).corpus_entropy, color="grey", linewidth=0.8, label="entropy of unigrams")
    ax.set(xlabel="distance from the prompt (tokens)", ylabel="nats", ylim=(0, None))
    ax.legend()
    return figure, ax


def plot_trap(probes: Mapping[str, MarginalTrap], axes: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the gap over k with intervals; returns matplotlib's (fig, ax)."""
    figure, ax = canvas(axes)
    for number, (name, probe) in enumerate(probes.items()):
        _band(ax, probe.sizes, probe.gap, f"C{number}", "o-", name or "gap")
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(next(iter(probes.values())).sizes)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="tokens drawn in one step", ylabel="gap (nats per position)")
    ax.legend()
    return figure, ax


def heat_map(
    probe: InformationDecay, decode: Callable[[int], str] = str, axes: Axes | None = None
) -> tuple[Figure, Axes]:
    """Draw the mean probability of the three likeliest tokens of each distance; returns matplotlib's (fig, ax).

    Rows are tokens in the order of their first appearance, columns distances; blank where a token is not among the
    three.
    """
    tokens = list(dict.fromkeys(share.token for shares in probe.top for share in shares))
    grid = [[float("nan")] * len(probe.top) for _ in tokens]
    for column, shares in enumerate(probe.top):
        for share in shares:
            grid[tokens.index(share.token)][column] = share.probability
    figure, ax = canvas(axes)
    if axes is None:
        figure.set_size_inches(1.8 + 0.3 * len(probe.top), 1.5 + 0.22 * len(tokens))
    image = ax.imshow(grid, aspect="auto", vmin=0, cmap="viridis")
    ax.set_yticks(range(len(tokens)), [repr(decode(token)) for token in tokens])
    ax.set_xticks(range(len(probe.top)), [str(d) for d in range(1, len(probe.top) + 1)])
    ax.set(xlabel="distance from the prompt (tokens)", ylabel="token")
    figure.colorbar(image, ax=ax, label="mean probability")
    return figure, ax


def _band(ax: Axes, x: Sequence[int], intervals: list[Interval], colour: str, style: str, label: str) -> None:
    """Draw estimates as a line and their intervals as a band."""
    ax.plot(x, [interval.estimate for interval in intervals], style, color=colour, label=label)
    low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _with_interval(interval: Interval, whole: bool) -> str:
    """Return an estimate, with its interval where there is room."""
    return f"{interval.estimate:.2f}" + (f" ({interval.low:.2f} to {interval.high:.2f})" if whole else "")


def _headed(heading: str, name: str) -> str:
    return f"{heading}, {name}" if name else heading
