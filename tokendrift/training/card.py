"""The README of a refined model: how it was made, what was measured, and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokendrift import __version__
from tokendrift.models.hub import is_hub_id
from tokendrift.training.config import RefineConfig


def model_card(
    config: RefineConfig,
    evaluations: Sequence[dict[str, Any]],
    *,
    steps: int,
    process: str,
    judge: str | None = None,
    random_input: int = 0,
) -> str:
    """Return a model card in Markdown, with the front matter of the hub.

    Args:
        config: The settings of the run.
        evaluations: Rows as `FewStepEvaluation` measures them, each with ``step`` and ``nfe``; for real text, ``nfe``
            is None.
        steps: Number of optimiser steps taken.
        process: Name of the corruption process.
        judge: Name of the judge that measured Gen.-PPL. Default: none.
        random_input: Random numbers that the network takes at each masked position. Default: 0.
    """
    source = ", ".join(config.text) or config.dataset or "text of the caller"
    # A relative path may look like a name on the hub.
    on_the_hub = is_hub_id(config.checkpoint) and not Path(config.checkpoint).exists()
    base = f"base_model: {config.checkpoint}\n" if on_the_hub else ""
    tokens = "" if config.length is None else f" of {config.length} tokens"
    return f"""---
library_name: tokendrift
{base}tags: [diffusion, discrete-diffusion, text-generation, tokendrift]
---

# {config.checkpoint}, refined

A {process} diffusion language model: `{config.checkpoint}`, trained for {steps:,} further steps with
{config.objective.description}.

```python
from tokendrift.models import load_denoiser
from tokendrift.sampling import sample

model, process = load_denoiser("path/of/this/folder")
ids = sample(model, process, (4, model.config.model_length), steps=8).ids
```

The network runs with the unchanged samplers of its backbone. {_about_network(config, random_input)}

## What was measured

{_table(config, evaluations, judge)}

## How it was trained

Text: {source}. {steps:,} optimiser steps of {config.batch_size} sequences{tokens}, AdamW at {config.learning_rate:g}
({config.schedule} after {config.warmup} steps of warm-up), {config.precision}, seed {config.seed}; tokendrift
{__version__}. All settings:

```toml
{config.as_toml()}```

## Limits

- Gen.-PPL falls when samples lose variety. Read it with the entropies, and against the unrefined model sampled at
  the temperature that gives the same entropy.
- Refinement improves sampling in few steps. With many steps, and in likelihood, the unrefined model may be better.
- The NELBO of this model says little about its samples in few steps, whether or not the objective lowers it.
- The model has the biases of its training text, and nothing was done to make its output true, safe or polite.
"""


def evaluation_table(rows: Sequence[dict[str, Any]]) -> Any:
    """Return the figures as a table of rich: real text, the model before, and the last of each model."""
    from rich.table import Table

    last = {name: max(row["step"] for row in rows if _name(row) == name) for name in map(_name, rows)}
    head, lines = _cells([row for row in rows if row["step"] == last[_name(row)]])
    table = Table(title="few-step generation")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for cells in lines:
        table.add_row(*cells)
    return table


def _name(row: dict[str, Any]) -> str:
    if row.get("nfe") is None:
        return "real text"
    return str(row.get("model", "refined" if row["step"] else "before"))


def _cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the head of a table and its lines."""
    from tokendrift.evaluation.figures import main_figures

    columns = main_figures(*rows)
    lines = []
    for row in rows:
        real = row.get("nfe") is None
        cells = [_name(row), "" if real else f"{row['step']:,}", "" if real else str(row["nfe"])]
        lines.append(cells + [f"{row[each.name]:.{each.digits}f}" if each.name in row else "" for each in columns])
    return ["model", "step", "NFE", *(figure.label for figure in columns)], lines


def _about_network(config: RefineConfig, random_input: int) -> str:
    """Return what the card says of the weights, and of the random input if there is one."""
    kept = "The weights are those of the last step."
    if config.ema:
        kept = f"The weights are a moving average of the weights during training\n(decay {config.ema:g})."
    if random_input:
        kept += (
            f" The network takes {random_input} random numbers at each masked\nposition (`random_input`): "
            "the samplers pass them, and other callers may pass `normals`."
        )
    return kept


def _table(config: RefineConfig, rows: Sequence[dict[str, Any]], judge: str | None) -> str:
    if not rows:
        return "Nothing was measured."
    by = f"judge `{judge}`" if judge else "no judge, so no Gen.-PPL"
    head, lines = _cells(rows)
    return "\n".join(
        [
            f"{config.evaluate_samples} samples per row, {by}; NFE is the number of function evaluations per sample.",
            "Before is the unrefined checkpoint, and continuation the same checkpoint trained equally long with",
            "its own objective. Real text is taken from the training text.",
            "",
            "| " + " | ".join(head) + " |",
            "|---|" + "---:|" * (len(head) - 1),
            *("| " + " | ".join(cells) + " |" for cells in lines),
        ]
    )
