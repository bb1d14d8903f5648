"""One training loop for bases, continuations and refinement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokendrift._checks import check_count, check_positive, fail
from tokendrift.training.objectives import Objective


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast.

    Attributes:
        steps: Optimiser steps.
        batch_size: Sequences a step.
        learning_rate: Peak rate of AdamW, reached after ``warmup`` steps, then a cosine down to 2 % of it.
        warmup: Linear warm-up steps.
        weight_decay: AdamW's decoupled decay.
        betas: AdamW's decay rates.
        clip: Largest gradient norm.
        ema: Decay of the weight average that is returned; early steps use (1 + n) / (10 + n).
        log_every: Steps between recorded diagnostics.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 3e-4
    warmup: int = 100
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    ema: float = 0.99
    log_every: int = 25

    def __post_init__(self) -> None:
        check_count("steps", self.steps, least=1)
        check_count("batch_size", self.batch_size, least=1)
        check_positive("learning_rate", self.learning_rate)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.learning_rate * warm * (0.51 + 0.49 * math.cos(math.pi * step / self.steps))


Record = dict[str, float]


def windows(stream: Tensor, length: int, batch_size: int, *, seed: int) -> Iterator[Tensor]:
    """Yield batches (B, L) of windows at random places of a token stream (n,), for ever, in an order fixed by the seed.

    Raises:
        TokenDriftError: If the stream is shorter than one window.
    """
    if len(stream) <= length:
        raise fail(f"the text has {len(stream)} tokens, too few for windows of {length}.", "Pass more text.")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length)
    while True:
        starts = torch.randint(len(stream) - length, (batch_size,), generator=generator)
        yield stream[starts[:, None] + offsets]


def train(
    model: nn.Module,
    objective: Objective,
    batches: Iterator[Tensor],
    config: LoopConfig,
    *,
    on_step: Callable[[int], object] | None = None,
) -> list[Record]:
    """Train in place; the model ends with its averaged weights, in evaluation mode.

    Args:
        model: The denoiser; its device decides where batches go.
        objective: Loss of a batch.
        batches: Clean ids (B, L).
        config: Length, rate and averaging.
        on_step: Called with the number of finished steps after each.

    Returns:
        One record for every ``log_every`` steps: ``step``, ``grad_norm`` and what the objective logs.

    Raises:
        TokenDriftError: If the loss stops being finite; the step and the rate are named.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    records: list[Record] = []
    model.train()
    for step in range(config.steps):
        log = step % config.log_every == 0 or step == config.steps - 1
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        loss, logs = objective(model, next(batches).to(device), log=log)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        if log:
            record = {"step": float(step), "grad_norm": float(norm)} | {name: float(v) for name, v in logs.items()}
            if not math.isfinite(sum(record.values())):
                raise fail(f"training diverged at step {step}: {record}.", "Lower the learning rate.")
            records.append(record)
        if on_step is not None:
            on_step(step + 1)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    model.eval()
    return records
