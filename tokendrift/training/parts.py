"""What a refinement is put together from: devices, text, the drifting loss, the identity of the base."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, cast

import torch

from tokendrift._checks import fail
from tokendrift.diffusion import Process
from tokendrift.features import PooledFeatures
from tokendrift.field import DriftField
from tokendrift.loss import MirrorTeacherLoss, TokenDriftLoss
from tokendrift.models import DiT
from tokendrift.pairs import PairDriftLoss
from tokendrift.training.config import RefineConfig
from tokendrift.training.text import DatasetRows, Documents, TextFiles
from tokendrift.training.trajectories import places


def make_accelerator() -> Any:
    """Return an accelerator for what this process was launched as: alone, DDP or FSDP."""
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise fail(f"{error}; refining needs it.", "Install it with pip install 'tokendrift[train]'.") from None
    # The other processes wait while the main one judges samples.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=4))
    # Autocast is ours: accelerate's would widen the logits to float32, the largest tensor of the step.
    return Accelerator(mixed_precision="no", kwargs_handlers=[patience])


def check_accelerator(accelerator: Any) -> None:
    """Require an accelerator that leaves averaging, checkpoints and gradients to us as they are.

    Raises:
        TokenDriftError: For FSDP of the first version, DeepSpeed and others than DDP and FSDP2, and for an accelerator
            that accumulates gradients itself.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    sharded = kind == "FSDP" and getattr(accelerator, "is_fsdp2", False)  # accelerate before 1.6 has none
    if kind != "NO" and not kind.startswith("MULTI_") and not sharded:
        raise fail(
            f"several processes train by DDP or FSDP2, and accelerate was launched for {kind}"
            f"{' of version 1' if kind == 'FSDP' else ''}.",
            "Launch with --use_fsdp --fsdp_version 2 to shard weights, or with --multi_gpu.",
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise fail(
            "gradient_accumulation_steps of accelerate must be 1: gradients would be divided by it again.",
            "Leave it out, and set micro_batch: gradients accumulate over the micro-batches of a batch_size.",
            gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
        )


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM, with which clusters announce that they will kill, into an answer to whether it has come.

    Outside the main thread, where signals cannot be caught, it never has.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def text_source(config: RefineConfig) -> Documents:
    """Return the source of text that a configuration names."""
    if config.dataset is not None:
        options = {"split": config.dataset_split, "field": config.text_field}
        return DatasetRows(config.dataset, config.dataset_config, **options)
    if not config.text:
        raise fail("no text to train on.", "Name text files or a dataset.")
    return TextFiles(config.text, documents=config.documents, field=config.text_field)


def drifting_loss(
    config: RefineConfig, base: DiT, process: Process
) -> TokenDriftLoss | MirrorTeacherLoss | PairDriftLoss | None:
    """Return the loss, around a frozen copy of the checkpoint where it has one; None for the backbone's own objective.

    Raises:
        TokenDriftError: If the process has no place in chains of that length.
    """
    if config.objective == "continuation":
        return None
    if config.objective == "pairs":
        strata = len(places(process, config.chains))
        return PairDriftLoss(process.vocab_size, strata=strata, decay=config.pair_decay, mask_id=process.mask_id)
    level = process.sigma(torch.tensor(config.encoder_time)).item() if config.encoder_time else 0.0
    features = PooledFeatures(base, window=config.window, sigma=level)
    options: dict[str, Any] = {
        "field": DriftField(config.temperatures, kernel=config.kernel, normalization=config.normalization),
        "queue_size": config.queue_size,
        "mask_id": process.mask_id,
        "exclude_paired_positive": config.exclude_paired_positive,
    }
    if config.objective.startswith("mirror"):
        distance = cast(Literal["kl", "mse"], config.objective.removeprefix("mirror-"))
        eta = config.mirror_step
        return MirrorTeacherLoss(features.embedding, features, distance=distance, step_size=eta, **options)
    return TokenDriftLoss(features.embedding, features, drift_scale=config.drift_scale, **options)
