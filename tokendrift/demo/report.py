"""What the demo shows: one table in the terminal, ``results.json``, and ``report.html`` with plots."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokendrift.demo.run import Outcome, Row
from tokendrift.demo.stages import DemoConfig
from tokendrift.evaluation.matching import entropy
from tokendrift.evaluation.report.html import INK, inline_svg, render
from tokendrift.files import write_atomically

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from rich.table import Table

COLOURS = {"base": "#8a8f98", "continuation": "#3b7dd8", "TokenDrift": "#d9652b", "real text": "#2f9e62"}
HEADINGS = ("model", "NFE", "T", "Gen.-PPL", "95 %", "H sample", "H unigram", "distinct-3", "rep-4")


def cells(row: Row) -> tuple[str, ...]:
    """Return one row of the table as text, entropies in nats."""
    m = row.measures
    return (
        row.model,
        "" if row.nfe is None else str(row.nfe),
        "" if row.temperature is None else f"{row.temperature:.2f}",
        f"{m.gen_ppl.estimate:.1f}",
        f"{m.gen_ppl.low:.1f} to {m.gen_ppl.high:.1f}",
        f"{m.sample_entropy.estimate:.3f}",
        f"{m.unigram_entropy.estimate:.3f}",
        f"{m.distinct_3.estimate:.3f}",
        f"{m.repetition_4.estimate:.3f}",
    )


def table(outcome: Outcome, title: str) -> Table:
    """Return the table for the terminal, a section for each NFE."""
    from rich.table import Table

    view = Table(title=title)
    for heading in HEADINGS:
        view.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=heading != "model")
    nfe: int | None = None
    for row in outcome.rows:
        if row.nfe != nfe:
            view.add_section()
            nfe = row.nfe
        view.add_row(*cells(row), style="bold" if row.model == "TokenDrift" else None)
    return view


def caption(config: DemoConfig, outcome: Outcome) -> str:
    """Return how the figures were made."""
    judged = outcome.rows[0].measures.perplexity
    return (
        f"{config.process} process; {config.steps} steps of each continuation; {config.samples} samples a row, of 32 "
        f"tokens each; ancestral sampler; judge: a causal model trained on its own split, {judged.precision}, protocol "
        f"{judged.protocol}; intervals and ratios by bootstrap over sequences. T: sampling temperature. H: entropy in "
        "nats, of the tokens of a sample and of all tokens together. Rows '= H ...': the continuation sampled at the "
        "temperature, 1 at most, that gives TokenDrift's entropy."
    )


def sentences(outcome: Outcome) -> list[str]:
    """Return the headline in words, with every figure that a Gen.-PPL needs beside it."""
    head = outcome.headline
    nfe = int(head["nfe"])
    gap = head["entropy_below_real"]
    change = (
        f"At {nfe} NFE TokenDrift changes Gen.-PPL by {head['relative_change']:+.1%} against the continuation and "
        f"closes {head['log_gap_closed']:.0%} of the log gap to real text."
    )
    side = "below" if gap > 0 else "above"
    lines = [change, f"Its sample entropy lies {abs(gap):.3f} nats {side} that of real text of the same length."]
    for kind in ("sample", "unigram"):
        ratio, low, high = (head[f"over_matched_{kind}{end}"] for end in ("", "_low", "_high"))
        verdict = "below it beyond the interval" if high < 1 else "above it" if low > 1 else "not distinguishable"
        lines.append(
            f"Against the continuation sampled at the temperature of the same {kind} entropy: ratio {ratio:.3f} "
            f"({low:.3f} to {high:.3f}), {verdict}."
        )
    return lines


def over_seeds(outcomes: Sequence[Outcome]) -> str:
    """Return mean and standard deviation over seeds of the figures that decide."""
    named = {
        "relative_change": "relative change of Gen.-PPL",
        "log_gap_closed": "share of the log gap closed",
        "entropy_below_real": "nats of sample entropy below real text",
        "over_matched_sample": "ratio at equal sample entropy",
        "over_matched_unigram": "ratio at equal unigram entropy",
    }
    parts = []
    for key, label in named.items():
        values = [outcome.headline[key] for outcome in outcomes]
        parts.append(f"{label} {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
    return (
        f"Over {len(outcomes)} seeds (mean ± SD) at {int(outcomes[0].headline['nfe'])} NFE: " + "; ".join(parts) + "."
    )


def as_json(config: DemoConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return everything that was measured, for ``results.json``."""
    import dataclasses

    def rows(found: Sequence[Row]) -> list[dict[str, Any]]:
        return [{"model": r.model, "nfe": r.nfe, "temperature": r.temperature, **r.measures.summary()} for r in found]

    return {
        "config": dataclasses.asdict(config),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seeds": [
            {
                "headline": o.headline,
                "validation_nelbo": o.nelbo,
                "rows": rows(o.rows),
                "frontier": rows(o.frontier),
                "curves": o.curves,
            }
            for o in outcomes
        ],
    }


def write(folder: Path, config: DemoConfig, outcomes: Sequence[Outcome]) -> Path:
    """Write ``results.json`` and ``report.html``; each appears whole or not at all. Returns the report's path."""
    write_atomically(folder / "results.json", json.dumps(as_json(config, outcomes), indent=2))
    page = render(
        "demo.html.j2",
        package="tokendrift.demo",
        config=config,
        headings=HEADINGS,
        summary=over_seeds(outcomes) if len(outcomes) > 1 else "",
        outcomes=[
            {
                "caption": caption(config, outcome),
                "sentences": sentences(outcome),
                "rows": [(row, cells(row)) for row in outcome.rows],
                "plots": plots(outcome, number),
                "examples": examples(outcome),
                "nelbo": outcome.nelbo,
            }
            for number, outcome in enumerate(outcomes)
        ],
    )
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def examples(outcome: Outcome) -> dict[str, Any]:
    """Return example texts side by side: real text and the three models at the fewest steps."""
    fewest = min(row.nfe for row in outcome.rows if row.nfe is not None)
    shown = [row for row in outcome.rows if row.model in COLOURS and row.nfe in (None, fewest)]
    texts = list(zip(*(row.texts[:8] for row in shown), strict=True))
    return {"nfe": fewest, "models": [row.model for row in shown], "texts": texts}


def plots(outcome: Outcome, number: int) -> list[tuple[str, Markup]]:
    """Return (title, inline SVG) for the five plots of a seed, by its number."""
    drawn: dict[str, Callable[[Axes], None]] = {
        "Gen.-PPL over NFE": lambda axes: over_nfe(axes, outcome, "gen_ppl"),
        "Sample entropy over NFE": lambda axes: over_nfe(axes, outcome, "sample_entropy"),
        "Gen.-PPL against sample entropy": lambda axes: frontier(axes, outcome, "sample"),
        "Gen.-PPL against unigram entropy": lambda axes: frontier(axes, outcome, "unigram"),
        "Training": lambda axes: training(axes, outcome),
    }
    told = "The numbers are in results.json, beside this page."
    return [
        (title, inline_svg(draw, f"plot-{number}-{i}", title, told)) for i, (title, draw) in enumerate(drawn.items())
    ]


def over_nfe(axes: Axes, outcome: Outcome, name: str) -> None:
    """Draw a figure of each model over NFE, with real text as a level."""
    for model, colour in COLOURS.items():
        points = [(row.nfe, getattr(row.measures, name)) for row in outcome.rows if row.model == model]
        if model == "real text":
            axes.axhline(points[0][1].estimate, color=colour, linestyle="--", label=model)
            continue
        nfes = [nfe for nfe, _ in points if nfe is not None]
        below = [v.estimate - v.low for _, v in points]
        above = [v.high - v.estimate for _, v in points]
        middle = [v.estimate for _, v in points]
        axes.errorbar(nfes, middle, yerr=[below, above], color=colour, marker="o", capsize=3, label=model)
    axes.set_xscale("log", base=2)
    axes.set_xticks(nfes, [str(nfe) for nfe in nfes])
    axes.set_xlabel("function evaluations (NFE)")
    if name == "gen_ppl":
        axes.set_yscale("log")
    axes.set_ylabel("Gen.-PPL" if name == "gen_ppl" else "sample entropy (nats)")


def frontier(axes: Axes, outcome: Outcome, kind: str) -> None:
    """Draw Gen.-PPL against an entropy over sampling temperatures, for the fewest and the most steps."""
    nfes = sorted({row.nfe for row in outcome.frontier if row.nfe is not None})
    for nfe, line in ((nfes[0], "-"), (nfes[-1], ":")):
        for model in ("continuation", "TokenDrift"):
            points = [r.measures for r in outcome.frontier if r.model == model and r.nfe == nfe]
            places = [entropy(m, kind).estimate for m in points], [m.gen_ppl.estimate for m in points]
            axes.plot(*places, line, color=COLOURS[model], marker="o", markersize=4, label=f"{model}, {nfe} NFE")
    real = outcome.rows[0].measures
    star: dict[str, Any] = {"color": COLOURS["real text"], "markersize": 14, "label": "real text"}
    axes.plot(entropy(real, kind).estimate, real.gen_ppl.estimate, "*", **star)
    axes.set_yscale("log")
    axes.set_xlabel(f"{kind} entropy (nats); temperature falls to the left")
    axes.set_ylabel("Gen.-PPL")


def training(axes: Axes, outcome: Outcome) -> None:
    """Draw the continuation's NELBO and the drift's token entropy (nats), and raw drift RMS on its own axis."""
    curves = outcome.curves

    def draw(place: Axes, arm: str, name: str, label: str, colour: str, line: str = "-") -> None:
        points = [(r["step"], r[name]) for r in curves[arm] if name in r]
        if points:
            place.plot(*zip(*points, strict=True), line, color=colour, label=label, linewidth=1.2)

    draw(axes, "continuation", "nelbo", "continuation: NELBO a batch", COLOURS["continuation"])
    draw(axes, "drift", "token_entropy", "TokenDrift: entropy of p", COLOURS["TokenDrift"])
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    right = axes.twinx()
    draw(right, "drift", "raw_drift_rms", "TokenDrift: raw drift RMS (right)", COLOURS["TokenDrift"], ":")
    right.set_ylabel("raw drift RMS")
    right.set_ylim(bottom=0)
    for side in right.spines.values():
        side.set_color(INK)
