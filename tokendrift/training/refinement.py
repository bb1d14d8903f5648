"""Continual training as a product: from a checkpoint and text to a refined model, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokendrift.training.config import RefineConfig
from tokendrift.training.few_step import Row
from tokendrift.training.parts import check_accelerator, make_accelerator
from tokendrift.training.run import Run
from tokendrift.training.text import Documents

BASELINE = "continuation"  # folder of the matched continuation


class Refined(NamedTuple):
    """What a refinement leaves, beside its folder.

    Attributes:
        folder: With the model, its tokenizer and card; `load_denoiser` reads it.
        evaluations: Rows of figures: real text, the model before, the model as it was refined, and the matched
            continuation (``model`` says so) where there is one. ``step`` counts finished steps. On the main process;
            the others have none.
    """

    folder: Path
    evaluations: list[Row]


def refine(
    config: RefineConfig,
    *,
    documents: Documents | None = None,
    judge: Any = None,
    accelerator: Any = None,
    progress: bool = True,
    on_step: Callable[[int], object] | None = None,
) -> Refined:
    """Train a released or saved denoiser further, and write it as a folder.

    Run again with the same configuration, it goes on from its last whole checkpoint, and ends with the same bits
    (on one CPU) as if it had not been interrupted: random numbers are functions of seed and step, and all else is in
    the checkpoint. Under ``accelerate launch`` it runs on several devices; the batch, its order and its noise do not
    depend on their number. The output folder has to be one that all of them see.

    On SIGTERM the step is finished and a checkpoint written, then KeyboardInterrupt raised. PyTorch's global generator
    is seeded anew at every step.

    Args:
        config: What to do.
        documents: A source of text of your own, in place of the configured one.
        judge: A judge of your own for the evaluation, in place of the configured one.
        accelerator: An ``accelerate.Accelerator`` of your own, without mixed precision and gradient accumulation of
            its own; alone, DDP or FSDP2.
        progress: Show a bar.
        on_step: Called with the number of finished steps after each.

    Raises:
        TokenDriftError: For a configuration that cannot work, before any work is done; if training diverges; if the
            output folder belongs to another run; if the refined model cannot be written.
    """
    accelerator = accelerator or make_accelerator()
    check_accelerator(accelerator)
    beside: list[Row] = []
    if config.baseline and config.objective != "continuation":
        matched = config.replace(objective="continuation", output=str(Path(config.output) / BASELINE), baseline=False)
        done = Run(matched, documents, judge, accelerator).run(progress, None)
        beside = [{"model": "continuation", **row} for row in done if row["step"]]
        accelerator.free_memory()
    evaluations = Run(config, documents, judge, accelerator, beside).run(progress, on_step)
    return Refined(Path(config.output), evaluations)
