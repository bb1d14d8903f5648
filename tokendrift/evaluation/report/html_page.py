"""The page of an evaluation: table, verdicts, plots with their numbers, and a browser of the samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.figures import FIGURES, Figure
from tokendrift.evaluation.measures import Measures
from tokendrift.evaluation.plots import error_bar_lengths, error_bars, estimates
from tokendrift.evaluation.report.evaluation_report import (
    ENTROPIES,
    EvaluationReport,
    MatchedSet,
    cost_cell,
    guard_summary,
    short_name,
)
from tokendrift.evaluation.report.html import as_label, inline_svg, render
from tokendrift.evaluation.report.phrases import WORDS, marked, most_repeated

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

COLOURS = ("#3b7dd8", "#d9652b", "#9467bd", "#b8860b", "#17a2b8", "#c2418d", "#8a8f98")
MARKERS = "osD^vPX"
REAL_COLOUR = "#2f9e62"
OF_A_JUDGE = ("gen_ppl", "bits_per_byte")  # columns of each further judge
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


def page(report: EvaluationReport) -> str:
    """Return the report as one HTML file that refers to no other."""
    measured = {name for _, measures, _ in report.entries() for name in measures.figures}
    # What a narrow screen shows without scrolling: the headline beside the entropies, without which it says little.
    first = [FIGURES[name] for name in (report.headline, *ENTROPIES)]
    figures = [figure for name, figure in FIGURES.items() if name in measured and figure not in first]
    beside = [f"{FIGURES[name].heading}, {short_name(judge)}" for judge in report.panel for name in OF_A_JUDGE]
    lines = []
    for name, measures, row in report.entries():
        cells = [_cost(measures)]
        cells += [Cell(*figure.cell(measures.figures)) for figure in first]
        cells += [Cell("" if row is None else guard_summary(row)), Cell(str(measures.samples))]
        cells += [Cell(measures.perplexity.precision)]
        cells += [Cell(*FIGURES[figure].cell(one.figures)) for one in measures.panel for figure in OF_A_JUDGE]
        cells += [Cell(*figure.cell(measures.figures)) for figure in figures]
        lines.append({"name": report.model(name) if row else name, "cells": cells, "real": row is None})
    columns = [_column(name, texts) for name, texts in report.texts.items()]
    return render(
        "evaluation.html.j2",
        script=(files("tokendrift.evaluation.report") / "templates" / "browser.js").read_text(encoding="utf-8"),
        names=list(dict.fromkeys(source.model for source in report.sources)),
        verdict=report.verdict(),
        caption=report.caption(),
        level=report.level,
        headings=[
            *("samples", "NFE", *(figure.heading for figure in first), "guard", "n", "precision"),
            *(*beside, *(figure.heading for figure in figures)),
        ],
        lines=lines,
        guard=[_with_titles(sentence) for sentence in report.guard()],
        agreement=report.agreement(),
        differences=report.differences() or ["There is one set alone: nothing to compare but real text."],
        matched=[_matched(one) for one in report.matched],
        baseline=report.settings.get("baseline"),
        headline=FIGURES[report.headline].title,
        plots=plots(report),
        count=max(len(column["samples"]) for column in columns),
        words=WORDS,
        columns=columns,
        settings={
            name.replace("_", " "): _setting(value)
            for name, value in report.settings.items()
            if value not in (None, ())
        },
    )


def plots(report: EvaluationReport) -> list[Plot]:
    """Return the plots of the headline figure against each entropy, and of all three over NFE if there are several."""
    headline, *entropies = (FIGURES[name] for name in (report.headline, *ENTROPIES))
    found = [_against_entropy(report, headline, entropy) for entropy in entropies]
    if len({row.measures.nfe for row in report.evaluation.rows} - {None}) > 1:
        found += [_over_nfe(report, figure) for figure in (headline, *entropies)]
    return found


def _against_entropy(report: EvaluationReport, headline: Figure, entropy: Figure) -> Plot:
    """Plot the headline figure against an entropy: a line through the NFE of each model, a star for real text."""

    def draw(axes: Axes) -> None:
        for number, (model, points) in enumerate(_curves(report).items()):
            across, up = _intervals(points, entropy), _intervals(points, headline)
            error_bars(axes, across, up, **_style(number, model))
            for m, x, y in zip(points, estimates(across), estimates(up), strict=True) if len(points) > 1 else ():
                axes.annotate(f"{m.nfe} NFE", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        for number, (name, m) in enumerate(_real(report)):
            star: dict[str, Any] = {"color": REAL_COLOUR, "fmt": "*", "markersize": 14, "label": as_label(name)}
            star |= {"capsize": 2} | ({"markerfacecolor": "none"} if number else {})
            error_bars(axes, _intervals([m], entropy), _intervals([m], headline), **star)
        axes.margins(x=0.12)  # room for the NFE beside the points
        axes.set_xlabel(entropy.label)
        _value_axis(axes, headline)

    what = "Lower and further right is better; lower and further left is what a lower temperature does."
    return _plot(report, f"{_capital(headline.title)} against {entropy.title}", what, (headline, entropy), draw)


def _over_nfe(report: EvaluationReport, figure: Figure) -> Plot:
    """Plot a figure of each model over NFE, with real text as a level."""

    def draw(axes: Axes) -> None:
        nfes: set[int] = set()
        for number, (model, points) in enumerate(_curves(report).items()):
            by_nfe = {m.nfe: m for m in points if m.nfe is not None}
            if by_nfe:
                up = _intervals(list(by_nfe.values()), figure)
                axes.errorbar(list(by_nfe), estimates(up), yerr=error_bar_lengths(up), **_style(number, model))
            nfes |= set(by_nfe)
        for number, (name, m) in enumerate(_real(report)):
            style, (interval,) = "--" if number == 0 else ":", _intervals([m], figure)
            axes.axhline(interval.estimate, color=REAL_COLOUR, linestyle=style, label=as_label(name))
            axes.axhspan(interval.low, interval.high, color=REAL_COLOUR, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(nfes), [str(nfe) for nfe in sorted(nfes)])
        axes.minorticks_off()
        axes.set_xlabel("function evaluations (NFE)")
        _value_axis(axes, figure)

    return _plot(
        report,
        f"{_capital(figure.title)} over NFE",
        "Real text is the dashed line, with its interval as a band.",
        (figure,),
        draw,
    )


def _cost(measures: Measures) -> Cell:
    nfe, gflops = cost_cell(measures)
    return Cell(nfe, f"{gflops} GFLOPs" if gflops else "")


def _capital(title: str) -> str:
    return f"{title[0].upper()}{title[1:]}"


def _plot(
    report: EvaluationReport, title: str, what: str, figures: Sequence[Figure], draw: Callable[[Axes], None]
) -> Plot:
    rows = [
        [report.model(name), _cost(measures), *(Cell(*figure.cell(measures.figures)) for figure in figures)]
        for name, measures, _ in report.entries()
    ]
    description = f"{what} Models: {', '.join(_curves(report))}. The numbers stand in the table after the plot."
    slug = title.lower().replace(".-", "-").replace(" ", "-")
    headings = ("samples", "NFE", *(figure.heading for figure in figures))
    return Plot(title, inline_svg(draw, slug, title, description), headings, rows)


def _curves(report: EvaluationReport) -> dict[str, list[Measures]]:
    """Return the sets of each model, by rising NFE."""
    found: dict[str, list[Measures]] = {}
    for row, source in zip(report.evaluation.rows, report.sources, strict=True):
        found.setdefault(source.model, []).append(row.measures)
    return {model: sorted(points, key=lambda m: m.nfe or 0) for model, points in found.items()}


def _real(report: EvaluationReport) -> list[tuple[str, Measures]]:
    return [(name, measures) for name, measures, row in report.entries() if row is None]


def _intervals(points: Sequence[Measures], figure: Figure) -> list[Interval]:
    return [m.figures[figure.name] for m in points]


def _style(number: int, model: str) -> dict[str, Any]:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 5, "capsize": 2, "label": as_label(model)}


def _value_axis(axes: Axes, figure: Figure) -> None:
    """Label the vertical axis; that of Gen.-PPL is logarithmic."""
    from matplotlib.ticker import LogFormatter

    axes.set_ylabel(figure.label)
    if figure.name == "gen_ppl":
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(LogFormatter(minor_thresholds=(2, 0.5)))


def _matched(one: MatchedSet) -> list[Any]:
    """Return a row of the table of sets compared with the baseline at equal entropy."""
    found = one.found
    difference, headline = found.entropy_difference, FIGURES[found.comparison.headline]
    ratios = found.comparison.gen_ppl_ratio, found.comparison.bits_per_byte_ratio
    return [
        one.name,
        _cost(found.model),
        Cell(found.kind),
        *(Cell("") if ratio is None else Cell(f"{ratio.estimate:.3f}", ratio.ends(".3f")) for ratio in ratios),
        Cell(found.verdict()),
        *(Cell(*headline.cell(measures.figures)) for measures in (found.model, found.baseline)),
        Cell(f"{found.temperature:.2f}"),
        Cell(f"{difference.estimate:+.3f}", difference.ends("+.3f")),
    ]


def _with_titles(sentence: str) -> str:
    """Return a sentence of the guard with the titles of the figures in place of their names."""
    for name, figure in FIGURES.items():
        sentence = re.sub(rf"\b{name}\b", figure.title, sentence) if "_" in name else sentence
    return sentence


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _column(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return a set for the browser: its first samples, with the phrases of all of them marked."""
    phrases = most_repeated(texts)
    return {
        "name": name,
        "samples": [marked(text, phrases) for text in texts[:SAMPLES]],
        "phrases": phrases,
    }
