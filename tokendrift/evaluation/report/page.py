"""The page of an evaluation: table, verdicts, plots with their numbers, and a browser of the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.measures import Measures
from tokendrift.evaluation.plots import arms
from tokendrift.evaluation.report.html import as_label, inline_svg, render
from tokendrift.evaluation.report.phrases import WORDS, marked, most_repeated
from tokendrift.evaluation.report.report import HEADINGS, Matched, Report, in_short, shown

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

COLOURS = ("#3b7dd8", "#d9652b", "#9467bd", "#b8860b", "#17a2b8", "#c2418d", "#8a8f98")
MARKERS = "osD^vPX"
REAL_COLOUR = "#2f9e62"
SAMPLES = 50  # of each set in the browser


class Cell(NamedTuple):
    """A cell of a table: a figure and, below it, its interval."""

    text: str
    interval: str = ""


class Plot(NamedTuple):
    """A plot and the numbers that it shows."""

    title: str
    svg: Markup
    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]


def page(report: Report) -> str:
    """Return the report as one HTML file that refers to no other."""
    measured = {name for _, measures, _ in report.entries() for name in measures.intervals()}
    figures = [name for name in HEADINGS if name in measured]
    lines = []
    for name, measures, row in report.entries():
        cells = [Cell("" if measures.nfe is None else str(measures.nfe)), Cell(str(measures.samples))]
        cells += [Cell(measures.perplexity.precision), Cell("" if row is None else in_short(row))]
        cells += [Cell(*shown(measures, figure)) for figure in figures]
        lines.append({"name": report.model(name) if row else name, "cells": cells, "real": row is None})
    columns = [_column(name, texts) for name, texts in report.texts.items()]
    return render(
        "evaluation.html.j2",
        script=(files("tokendrift.evaluation.report") / "templates" / "browser.js").read_text(encoding="utf-8"),
        names=list(dict.fromkeys(source.model for source in report.sources)),
        caption=report.caption(),
        level=report.level,
        headings=["samples", "NFE", "n", "precision", "guard", *(HEADINGS[figure][0] for figure in figures)],
        lines=lines,
        guard=report.guard(),
        differences=report.differences() or ["There is one set alone: nothing to compare but real text."],
        matched=[_matched(one) for one in report.matched],
        baseline=report.settings.get("baseline"),
        plots=plots(report),
        count=max(len(column["samples"]) for column in columns),
        words=WORDS,
        columns=columns,
        settings={name: _setting(value) for name, value in report.settings.items() if value not in (None, ())},
    )


def plots(report: Report) -> list[Plot]:
    """Return Gen.-PPL against each entropy, and both over NFE where there are several."""
    found = [_against_entropy(report, f"{kind}_entropy") for kind in ("sample", "unigram")]
    if len({row.measures.nfe for row in report.evaluation.rows} - {None}) > 1:
        found += [_over_nfe(report, figure) for figure in ("gen_ppl", "sample_entropy", "unigram_entropy")]
    return found


def _against_entropy(report: Report, figure: str) -> Plot:
    """Plot Gen.-PPL against an entropy: a line through the NFE of each model, a star for real text."""

    def draw(axes: Axes) -> None:
        for number, (model, points) in enumerate(_curves(report).items()):
            across, up = _intervals(points, figure), _intervals(points, "gen_ppl")
            axes.errorbar(_middles(across), _middles(up), xerr=arms(across), yerr=arms(up), **_style(number, model))
            for m in points if len(points) > 1 else ():
                place = m.intervals()[figure].estimate, m.gen_ppl.estimate
                axes.annotate(f"{m.nfe} NFE", place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        for number, (name, m) in enumerate(_real(report)):
            star: dict[str, Any] = {"color": REAL_COLOUR, "markersize": 14, "label": as_label(name)}
            star |= {"markerfacecolor": "none"} if number else {}
            axes.plot(m.intervals()[figure].estimate, m.gen_ppl.estimate, "*", **star)
        axes.margins(x=0.12)  # room for the NFE beside the points
        axes.set_xlabel(f"{figure.replace('_', ' ')} (nats)")
        _gen_ppl_axis(axes)

    title = f"Gen.-PPL against {figure.replace('_', ' ')}"
    what = "Lower and further right is better; lower and further left is what a lower temperature does."
    return _plot(report, title, what, ("gen_ppl", figure), draw)


def _over_nfe(report: Report, figure: str) -> Plot:
    """Plot a figure of each model over NFE, with real text as a level."""

    def draw(axes: Axes) -> None:
        nfes: set[int] = set()
        for number, (model, points) in enumerate(_curves(report).items()):
            known = {m.nfe: m for m in points if m.nfe is not None}
            if known:
                up = _intervals(list(known.values()), figure)
                axes.errorbar(list(known), _middles(up), yerr=arms(up), **_style(number, model))
            nfes |= set(known)
        for number, (name, m) in enumerate(_real(report)):
            style = "--" if number == 0 else ":"
            axes.axhline(m.intervals()[figure].estimate, color=REAL_COLOUR, linestyle=style, label=as_label(name))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(nfes), [str(nfe) for nfe in sorted(nfes)])
        axes.minorticks_off()
        axes.set_xlabel("function evaluations (NFE)")
        if figure == "gen_ppl":
            _gen_ppl_axis(axes)
        else:
            axes.set_ylabel(f"{figure.replace('_', ' ')} (nats)")

    name = "Gen.-PPL" if figure == "gen_ppl" else figure.replace("_", " ").capitalize()
    return _plot(report, f"{name} over NFE", "Real text is the dashed line.", (figure,), draw)


def _plot(report: Report, title: str, what: str, figures: Sequence[str], draw: Callable[[Axes], None]) -> Plot:
    rows: list[list[Any]] = []
    for name, measures, _ in report.entries():
        nfe = Cell("" if measures.nfe is None else str(measures.nfe))
        rows.append([report.model(name), nfe, *(Cell(*shown(measures, figure)) for figure in figures)])
    told = f"{what} Models: {', '.join(_curves(report))}. The numbers stand in the table after the plot."
    slug = title.lower().replace(".-", "-").replace(" ", "-")
    headings = ("samples", "NFE", *(HEADINGS[figure][0] for figure in figures))
    return Plot(title, inline_svg(draw, slug, title, told), headings, rows)


def _curves(report: Report) -> dict[str, list[Measures]]:
    """Return the sets of each model, by rising NFE."""
    found: dict[str, list[Measures]] = {}
    for row, source in zip(report.evaluation.rows, report.sources, strict=True):
        found.setdefault(source.model, []).append(row.measures)
    return {model: sorted(points, key=lambda m: m.nfe or 0) for model, points in found.items()}


def _real(report: Report) -> list[tuple[str, Measures]]:
    return [(name, measures) for name, measures, row in report.entries() if row is None]


def _intervals(points: Sequence[Measures], figure: str) -> list[Interval]:
    return [m.intervals()[figure] for m in points]


def _middles(intervals: Sequence[Interval]) -> list[float]:
    return [interval.estimate for interval in intervals]


def _style(number: int, model: str) -> dict[str, Any]:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 5, "capsize": 2, "label": as_label(model)}


def _gen_ppl_axis(axes: Axes) -> None:
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_ylabel("Gen.-PPL")


def _matched(one: Matched) -> list[Any]:
    """Return a row of the table of sets beside the baseline at equal entropy."""
    found = one.found
    ratio, difference = found.ratio, found.entropy_difference
    return [
        one.name,
        Cell("" if found.model.nfe is None else str(found.model.nfe)),
        Cell(found.kind),
        Cell(f"{ratio.estimate:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}"),
        Cell(found.verdict()),
        *(Cell(*shown(measures, "gen_ppl")) for measures in (found.model, found.baseline)),
        Cell(f"{found.temperature:.2f}"),
        Cell(f"{difference.estimate:+.3f}", f"{difference.low:+.3f} to {difference.high:+.3f}"),
    ]


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _column(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return a set for the browser: its first samples, with the phrases of all of them marked."""
    phrases = most_repeated(texts)
    return {
        "name": name,
        "samples": [marked(text, phrases) for text in texts[:SAMPLES]],
        "phrases": phrases,
    }
