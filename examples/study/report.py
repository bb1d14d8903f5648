"""What the study found: ``results.json``, tables in Markdown, and plots."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from arms import BASE, Arm
from markov import Markov
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from tokendrift.files import write_atomically

KIND_NAMES = {"masked": "Masked (MDLM)", "uniform": "Uniform-state (DUO)"}
Found = dict[str, Any]


class Results:
    """Finished cells, by what they are."""

    def __init__(self, cells: Sequence[tuple[Any, Found]]) -> None:
        self.cells = cells

    def of(self, kind: str, main: bool) -> dict[Arm, list[Found]]:
        """Return the results of each arm, a list over seeds."""
        found: dict[Arm, list[Found]] = {}
        for cell, result in self.cells:
            if (cell.kind, cell.main) == (kind, main):
                found.setdefault(cell.arm, []).append({**result, "seed": cell.seed})
        return found

    def kinds(self, main: bool) -> list[str]:
        """Return the processes of which there is anything."""
        return [kind for kind in KIND_NAMES if self.of(kind, main)]


def write(output: Path, tool: Markov, cells: Sequence[tuple[Any, Found]]) -> None:
    """Write everything below ``output``; each file appears whole or not at all."""
    results, exact = Results(cells), tool.exact
    facts: Found = {"torch": torch.__version__, "python": platform.python_version()}
    facts |= {"source": tool.source, "sizes": vars(tool.sizes), "exact": exact}
    plain = [
        {"process": c.kind, "arm": c.arm.name, "group": c.arm.group, "seed": c.seed, "main": c.main}
        | {"setting": c.arm.key(), **{name: value for name, value in found.items() if name != "records"}}
        for c, found in cells
    ]
    write_atomically(
        output / "results.json", json.dumps(_short({"facts": facts, "cells": plain}), separators=(",", ":"))
    )
    for kind in results.kinds(True):
        write_atomically(output / f"markov-{kind}.md", _markov_main(results.of(kind, True), exact[kind]))
    if results.kinds(False):
        write_atomically(output / "markov-ablations.md", _markov_ablations(results))
    if kinds := results.kinds(True):
        figure = _panels(kinds, lambda axes, kind: _draw_markov(axes, results.of(kind, True), exact[kind]))
        figure.savefig(output / "markov-nfe.svg", bbox_inches="tight", metadata={"Date": None})
    print(f"written: {output / 'results.json'}, with {len(cells)} cells, tables and a plot")


# ---------------------------------------------------------------------------------------------------------- tables


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
    kinds = results.kinds(False)
    titles = [f"{kind}, {nfe} NFE" for kind in kinds for nfe in (2, 4)]
    rows = [["arm: validity / TV / H word", *titles]]
    for arm in dict.fromkeys(arm for kind in kinds for arm in results.of(kind, False)):
        cells = [arm.name]
        for kind in kinds:
            seeds = results.of(kind, False).get(arm)
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


def _draw_markov(axes: Axes, arms: dict[Arm, list[Found]], exact: Found) -> None:
    nfes = sorted({row["nfe"] for row in exact["rows"]})
    named = {"exact denoiser": [exact], **{arm.name: seeds for arm, seeds in arms.items() if arm != BASE}}
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
