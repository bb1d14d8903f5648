"""What the study found: ``results.json``, tables in Markdown, and plots."""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from arms import BASE, CONTINUATION, Arm
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from tokendrift.evaluation import temperature_at
from tokendrift.evaluation.matching import TOLERANCE
from tokendrift.files import write_atomically

KIND_NAMES = {"masked": "Masked (MDLM)", "uniform": "Uniform-state (DUO)"}
KINDS = ("sample", "unigram")
Found = dict[str, Any]


class Results:
    """Finished cells, by what they are."""

    def __init__(self, cells: Sequence[tuple[Any, Found]]) -> None:
        self.cells = cells

    def of(self, instrument: str, kind: str, main: bool) -> dict[Arm, list[Found]]:
        """Return the results of each arm, a list over seeds."""
        found: dict[Arm, list[Found]] = {}
        for cell, result in self.cells:
            if (cell.instrument, cell.kind, cell.main) == (instrument, kind, main):
                found.setdefault(cell.arm, []).append({**result, "seed": cell.seed})
        return found

    def kinds(self, instrument: str, main: bool) -> list[str]:
        """Return the processes of which there is anything."""
        return [kind for kind in KIND_NAMES if self.of(instrument, kind, main)]


def write(output: Path, tools: dict[str, Any], cells: Sequence[tuple[Any, Found]]) -> None:
    """Write everything below ``output``; each file appears whole or not at all."""
    results = Results(cells)
    facts: Found = {"torch": torch.__version__, "python": platform.python_version()}
    for name, tool in tools.items():
        facts[name] = {"source": tool.source, "sizes": vars(tool.sizes), **tool.facts()}
    plain = [
        {"instrument": c.instrument, "process": c.kind, "arm": c.arm.name, "group": c.arm.group, "seed": c.seed}
        | {
            "main": c.main,
            "setting": c.arm.key(),
            **{name: value for name, value in found.items() if name != "records"},
        }
        for c, found in cells
    ]
    write_atomically(
        output / "results.json", json.dumps(_short({"facts": facts, "cells": plain}), separators=(",", ":"))
    )
    for name, text in tables(results, facts).items():
        write_atomically(output / f"{name}.md", text)
    for name, figure in plots(results, facts).items():
        figure.savefig(output / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    print(f"written: {output / 'results.json'}, with {len(cells)} cells, tables and plots")


# ---------------------------------------------------------------------------------------------------------- tables


def tables(results: Results, facts: Found) -> dict[str, str]:
    """Return the tables by name, in Markdown."""
    made = {}
    for kind in results.kinds("english", True):
        made[f"english-{kind}"] = _english_main(results.of("english", kind, True))
        made[f"english-{kind}-matched"] = _english_matched(results.of("english", kind, True))
    for kind in results.kinds("markov", True):
        made[f"markov-{kind}"] = _markov_main(results.of("markov", kind, True), facts["markov"]["exact"][kind])
    if results.kinds("english", False):
        made["english-ablations"] = _english_ablations(results)
    if results.kinds("markov", False):
        made["markov-ablations"] = _markov_ablations(results)
    return made


def _english_main(arms: dict[Arm, list[Found]]) -> str:
    head = ["model", "NFE", "Gen.-PPL", "sample entropy", "unigram entropy", "distinct-3", "rep-4", "copied"]
    rows = [[*head, "NELBO", "training s"]]
    real = next(iter(arms.values()))[0]["real"]
    names = ("sample_entropy", "unigram_entropy", "distinct_3", "repetition_4", "copied_share")
    rows.append(["real text", "", f"{_value(real, 'gen_ppl'):.1f}", *(f"{_value(real, n):.3f}" for n in names), "", ""])
    for number, steps in enumerate(row["steps"] for row in next(iter(arms.values()))[0]["rows"]):
        for arm, seeds in arms.items():
            at = [found["rows"][number] for found in seeds]
            figures = [_spread((_value(row, name) for row in at), ".3f") for name in names]
            ppl = _spread((_value(row, "gen_ppl") for row in at), ".1f")
            nelbo = _spread((found["nelbo"] for found in seeds), ".3f")
            seconds = f"{statistics.mean(found['training_seconds'] for found in seeds):.0f}"
            rows.append([arm.name, str(steps), ppl, *figures, nelbo, seconds])
    return _table(rows)


def _english_matched(arms: dict[Arm, list[Found]]) -> str:
    """At some NFE: the share of the log gap closed, and Gen.-PPL over the continuation's at equal entropies."""
    head = ["arm", "NFE", "log gap closed, T = 1"]
    head += [
        f"ratio at its own {entropy} entropy, by {means}" for entropy in KINDS for means in ("temperature", "nucleus")
    ]
    head += [f"{what} at real text's {entropy} entropy" for entropy in KINDS for what in ("ratio", "log gap closed")]
    rows = [head]
    continued = {found["seed"]: found for found in arms.get(CONTINUATION, [])}
    for arm, seeds in arms.items():
        for number, row in enumerate(seeds[0]["rows"]):
            if "matched" not in row:
                continue
            steps = row["steps"]
            pairs = [(found, continued[found["seed"]]) for found in seeds if found["seed"] in continued]
            cells = [arm.name, str(steps), _spread((_gap_closed(a, b, number) for a, b in pairs), ".0%")]
            for entropy in KINDS:
                for means in ("temperature", "top_p"):
                    at = [found["rows"][number]["matched"][f"{entropy}, {means}"] for found in seeds]
                    missed = "" if all(map(_reached, at)) else " *"
                    cells.append(_spread((one["ratio"]["estimate"] for one in at), ".2f") + missed)
            for entropy in KINDS:
                there = [[_at_real(found, steps, entropy) for found in pair] for pair in pairs]
                cells.append(_spread((ours / theirs for ours, theirs in there), ".2f"))
                real = _value(seeds[0]["real"], "gen_ppl")
                cells.append(_spread((_gap(ours, theirs, real) for ours, theirs in there), ".0%"))
            rows.append(cells)
    return _table(rows)


def _reached(match: Found) -> bool:
    """Return whether the baseline has the entropy that was asked for; the ends of its grid may lie short of it."""
    return abs(float(match["entropy_difference"]["estimate"])) <= TOLERANCE


def _gap_closed(found: Found, continued: Found, number: int) -> float:
    ours, theirs = (_value(one["rows"][number], "gen_ppl") for one in (found, continued))
    return _gap(ours, theirs, _value(continued["real"], "gen_ppl"))


def _gap(ours: float, theirs: float, real: float) -> float:
    """Return the share of the log gap between the continuation and real text that a Gen.-PPL closes."""
    return math.log(theirs / ours) / math.log(theirs / real)


def _at_real(found: Found, steps: int, entropy: str) -> float:
    """Return Gen.-PPL at the temperature that gives an entropy of real text; NaN where none does."""
    name = f"{entropy}_entropy"
    points = sorted(
        (point["temperature"], _value(point, name), math.log(_value(point, "gen_ppl")))
        for point in found["curve"]
        if point["steps"] == steps and point["top_p"] == 1.0
    )
    target = _value(found["real"], name)
    if not points or not min(h for _, h, _ in points) <= target <= max(h for _, h, _ in points):
        return math.nan
    temperature = temperature_at([(t, h) for t, h, _ in points], target)
    return math.exp(_interpolated([(t, log) for t, _, log in points], temperature))


def _interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left)
    raise ValueError(f"{at} lies outside {points}")


def _english_ablations(results: Results) -> str:
    rows = [
        [
            "arm",
            "process",
            "NFE",
            "Gen.-PPL",
            "sample entropy",
            "unigram entropy",
            "ratio at equal sample entropy",
            "NELBO",
        ]
    ]
    for kind in results.kinds("english", False):
        for arm, seeds in results.of("english", kind, False).items():
            for row in seeds[0]["rows"][:1]:
                match = row.get("matched", {}).get("sample, temperature")
                ratio = "" if match is None else _interval(match["ratio"]) + ("" if _reached(match) else " *")
                figures = (f"{_value(row, name):.3f}" for name in ("sample_entropy", "unigram_entropy"))
                ppl = _interval(row["gen_ppl"], ".0f")
                rows.append([arm.name, kind, str(row["steps"]), ppl, *figures, ratio, f"{seeds[0]['nelbo']:.2f}"])
    return _table(rows)


def _markov_main(arms: dict[Arm, list[Found]], exact: Found) -> str:
    nfes = sorted({row["nfe"] for row in exact["rows"]})
    rows = [["model", "sampled at", *(f"{n} NFE: validity / whole / TV / among valid / H word" for n in nfes), "NELBO"]]
    for name, seeds in {"exact denoiser": [exact], **{arm.name: seeds for arm, seeds in arms.items()}}.items():
        nelbo = _spread((found["nelbo"] for found in seeds), ".2f") if "nelbo" in seeds[0] else ""
        for at in ("T = 1", "best T"):
            cells = [name, at]
            for nfe in nfes:
                chosen = [_markov_row(found, nfe, at == "T = 1") for found in seeds]
                parts = []
                for name_of in ("validity", "sequence_validity", "total_variation", "mode_imbalance"):
                    values = [_value(row, name_of) for row in chosen]
                    plain = name_of != "total_variation"
                    parts.append(f"{statistics.mean(values):.3f}" if plain else _spread(values, ".3f"))
                parts.append(f"{statistics.mean(row['unigram_entropy'] for row in chosen):.2f}")
                label = "" if at == "T = 1" else f" (T {statistics.mean(r['temperature'] for r in chosen):.2g})"
                cells.append(" / ".join(parts) + label)
            rows.append([*cells, nelbo if at == "T = 1" else ""])
    real = exact["real"]
    told = f"1 / 1 / {_value(real, 'total_variation'):.3f} / {_value(real, 'mode_imbalance'):.3f} / "
    told += f"{real['unigram_entropy']:.2f}"
    rows.append(["real text", "", *[told] * len(nfes), f"{exact['true']['entropy']:.2f}"])
    return _table(rows)


def _markov_row(found: Found, nfe: int, plain: bool) -> Found:
    """Return the row at temperature 1, or that of least total variation."""
    rows: list[Found] = [row for row in found["rows"] if row["nfe"] == nfe]
    if plain:
        return next(row for row in rows if row["temperature"] == 1.0)
    return min(rows, key=lambda row: _value(row, "total_variation"))


def _markov_ablations(results: Results) -> str:
    kinds = results.kinds("markov", False)
    titles = [f"{kind}, {nfe} NFE" for kind in kinds for nfe in (2, 4)]
    rows = [["arm: validity / TV / H word", *titles]]
    for arm in dict.fromkeys(arm for kind in kinds for arm in results.of("markov", kind, False)):
        cells = [arm.name]
        for kind in kinds:
            seeds = results.of("markov", kind, False).get(arm)
            for nfe in (2, 4):
                if not seeds:
                    cells.append("")
                    continue
                row = _markov_row(seeds[0], nfe, True)
                figures = f"{_value(row, 'validity'):.3f} / {_value(row, 'total_variation'):.3f}"
                cells.append(f"{figures} / {row['unigram_entropy']:.2f}")
        rows.append(cells)
    return _table(rows)


# ---------------------------------------------------------------------------------------------------------- plots


def plots(results: Results, facts: Found) -> dict[str, Figure]:
    """Return the plots by name."""
    made = {}
    if kinds := results.kinds("english", True):
        made["english-nfe"] = _panels(
            kinds, lambda axes, kind: _draw_nfe(axes, _without_base(results.of("english", kind, True)))
        )
        made["english-frontier"] = _panels(
            kinds, lambda axes, kind: _draw_frontier(axes, _without_base(results.of("english", kind, True)))
        )
    if kinds := results.kinds("markov", True):
        exact = facts["markov"]["exact"]
        made["markov-nfe"] = _panels(
            kinds, lambda axes, kind: _draw_markov(axes, _without_base(results.of("markov", kind, True)), exact[kind])
        )
    if kinds := results.kinds("english", False):
        made["english-ablations"] = _panels(
            kinds, lambda axes, kind: _draw_ratios(axes, results.of("english", kind, False)), height=7.5
        )
    return made


def _panels(kinds: Sequence[str], draw: Callable[[Axes, str], None], height: float = 4.2) -> Figure:
    """Return one panel a process, with one legend below them all."""
    figure = Figure(figsize=(5.2 * len(kinds), height), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        draw(axes, kind)
        axes.set_title(KIND_NAMES[kind], fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _without_base(arms: dict[Arm, list[Found]]) -> dict[Arm, list[Found]]:
    """Leave out the base, on which the continuation lies."""
    return {arm: seeds for arm, seeds in arms.items() if arm != BASE}


def _draw_nfe(axes: Axes, arms: dict[Arm, list[Found]]) -> None:
    for number, (arm, seeds) in enumerate(arms.items()):
        steps = [row["steps"] for row in seeds[0]["rows"]]
        runs = [[_value(row, "gen_ppl") for row in found["rows"]] for found in seeds]
        for run in runs:
            axes.plot(steps, run, color=f"C{number}", alpha=0.35, linewidth=0.8)
        axes.plot(
            steps,
            [statistics.mean(column) for column in zip(*runs, strict=True)],
            "o-",
            color=f"C{number}",
            label=arm.name,
        )
    axes.axhline(_value(seeds[0]["real"], "gen_ppl"), color="black", linestyle="--", linewidth=1, label="real text")
    axes.set(xscale="log", xlabel="NFE", ylabel="Gen.-PPL", xticks=steps, xticklabels=steps)
    axes.minorticks_off()
    _log_axis(axes)


def _draw_frontier(axes: Axes, arms: dict[Arm, list[Found]], steps: int = 4) -> None:
    for number, (arm, seeds) in enumerate(arms.items()):
        for found in seeds:
            for nucleus in (False, True):
                points = [p for p in found["curve"] if p["steps"] == steps and (p["top_p"] < 1) == nucleus]
                points = [p for p in points if p["temperature"] <= 1]
                if nucleus:
                    points += [p for p in found["curve"] if (p["steps"], p["top_p"], p["temperature"]) == (steps, 1, 1)]
                points.sort(key=lambda p: _value(p, "sample_entropy"))
                label = None
                if found is seeds[0]:
                    label = arm.name + (", by nucleus" if nucleus else ", by temperature")
                if len(points) > 1:
                    across, up = ([_value(p, name) for p in points] for name in ("sample_entropy", "gen_ppl"))
                    style = ":" if nucleus else "-"
                    axes.plot(across, up, style, color=f"C{number}", marker=".", markersize=4, linewidth=1, label=label)
    real = seeds[0]["real"]
    axes.plot(
        _value(real, "sample_entropy"), _value(real, "gen_ppl"), "*", color="black", markersize=12, label="real text"
    )
    axes.set(xlabel=f"sample entropy (nats), {steps} NFE", ylabel="Gen.-PPL")
    _log_axis(axes)


def _draw_markov(axes: Axes, arms: dict[Arm, list[Found]], exact: Found) -> None:
    nfes = sorted({row["nfe"] for row in exact["rows"]})
    named = {"exact denoiser": [exact], **{arm.name: seeds for arm, seeds in arms.items()}}
    for number, (name, seeds) in enumerate(named.items()):
        for plain in (True, False):
            runs = [[_value(_markov_row(f, nfe, plain), "total_variation") for nfe in nfes] for f in seeds]
            label = f"{name}, {'T = 1' if plain else 'best T'}"
            style = "o-" if plain else "o:"
            across = [statistics.mean(column) for column in zip(*runs, strict=True)]
            axes.plot(nfes, across, style, color=f"C{number}", markersize=4, linewidth=1, label=label)
    floor = _value(exact["real"], "total_variation")
    axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="real text")
    axes.set(xscale="log", xlabel="NFE", ylabel="total variation", xticks=nfes, xticklabels=nfes)
    axes.minorticks_off()
    _log_axis(axes)


def _draw_ratios(axes: Axes, arms: dict[Arm, list[Found]]) -> None:
    named = [
        (arm, seeds[0]["rows"][0]["matched"]["sample, temperature"])
        for arm, seeds in arms.items()
        if arm != CONTINUATION
    ]
    for height, (_arm, match) in enumerate(reversed(named)):
        ratio = match["ratio"]
        colour = "C0" if _reached(match) else "0.6"
        axes.plot([ratio["low"], ratio["high"]], [height] * 2, color=colour)
        axes.plot(ratio["estimate"], height, "o", color=colour, markersize=4)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(named)), [arm.name for arm, _ in reversed(named)], fontsize="x-small")
    axes.set(xscale="log", xlabel="Gen.-PPL over the continuation's at equal sample entropy, 4 NFE")


# ---------------------------------------------------------------------------------------------------------- figures


def _value(row: Found, name: str) -> float:
    found = row[name]["estimate"]
    return math.nan if found is None else float(found)


def _spread(values: Iterable[float], form: str) -> str:
    """Return mean and, of several seeds, standard deviation; of which seeds, if not of all."""
    values = list(values)
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    told = format(statistics.mean(known), form)
    if len(known) > 1:
        told += f" ± {format(statistics.stdev(known), form)}"
    return told if len(known) == len(values) else f"{told} ({len(known)} of {len(values)} seeds)"


def _interval(found: Found, form: str = ".2f") -> str:
    return f"{found['estimate']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> Any:
    """Return JSON-like data with five significant digits, None for what is not finite, and names in place of paths."""
    if isinstance(value, dict):
        return {str(key): _short(each) for key, each in value.items()}
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    if isinstance(value, (list, tuple)):
        return [_short(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
