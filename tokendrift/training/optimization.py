"""One optimiser step and one loop, for bases, continuations and refinement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokendrift._checks import check_betas, check_choice, check_count, check_fraction, check_positive, fail
from tokendrift.training.averaging import WeightAverage
from tokendrift.training.objectives.objective import Objective, StatefulObjective, grouped

SCHEDULES = ("cosine", "constant", "linear")

Record = dict[str, float]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the optimiser and of the length of training.

    Attributes:
        steps: Number of optimiser steps.
        batch_size: Sequences per optimiser step.
        learning_rate: Peak learning rate of AdamW, reached after ``warmup`` steps.
        warmup: Number of linear warm-up steps.
        schedule: Learning rate after the warm-up: ``"cosine"`` (to 2 % of the peak), ``"linear"`` (to 0) or
            ``"constant"``.
        weight_decay: Decoupled weight decay of AdamW.
        betas: Decay rates of AdamW's moments.
        clip: Largest norm of the gradient; larger gradients are scaled down to it.
        ema: Decay of the moving average of the weights; step n uses (1 + n) / (10 + n) while that is less. 0 keeps no
            average.
        log_every: Optimiser steps between recorded diagnostics.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 3e-4
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.98)
    clip: float = 1.0
    ema: float = 0.99
    log_every: int = 25

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            check_count(name, getattr(self, name), least=1)
        check_count("warmup", self.warmup)
        check_positive("learning_rate", self.learning_rate)
        check_positive("clip", self.clip)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_betas("betas", self.betas)
        check_fraction("ema", self.ema, "; 0 keeps no average")
        if not 0 <= self.weight_decay < math.inf:
            raise fail("weight_decay must be 0 or above, and finite.", weight_decay=self.weight_decay)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        # The decay begins where the warm-up ends: from step 0 on, the two together would never reach the peak.
        progress = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "constant":
            return self.learning_rate * warm
        if self.schedule == "linear":
            return self.learning_rate * warm * (1 - progress)
        return self.learning_rate * warm * (0.51 + 0.49 * math.cos(math.pi * progress))


class Autocast(nn.Module):
    """A network under autocast. It is a module, so that objectives that sample from it can set its mode.

    Args:
        network: The network.
        device: Type of its device, such as ``"cuda"``.
        dtype: Dtype of autocast.
    """

    def __init__(self, network: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.device, self.dtype = network, device, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device, self.dtype):
            return self.network(*args, **kwargs)


class Optimization:
    """A model with its AdamW, learning rate, clipping and weight average.

    Args:
        model: The denoiser.
        config: Length, rate and averaging.
        accelerator: An ``accelerate.Accelerator``, which moves the model to its device, wraps it for DDP or FSDP and
            reduces over processes. Default: none; one process trains on the model's own device.
        autocast: Dtype of the network under autocast. Logits keep that dtype: the losses accept it, and converting
            them would double the largest tensor of the step. Default: no autocast.

    Attributes:
        network: The model as objectives call it, under autocast if that was requested.
        bare_network: The same without the wrapper of several processes, which would wait for all of them to call.
        frozen: Names of the parameters that are not trained, which `state` leaves out.
    """

    def __init__(
        self, model: nn.Module, config: LoopConfig, *, accelerator: Any = None, autocast: torch.dtype | None = None
    ) -> None:
        self.config, self.accelerator = config, accelerator
        optimizer: Any = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
        )
        if accelerator is not None:
            model, optimizer = accelerator.prepare(model, optimizer)
        self.model, self.optimizer = model, optimizer
        # After `prepare`: sharding puts other parameters in the place of the old ones.
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        bare: nn.Module = model if accelerator is None else accelerator.unwrap_model(model)
        # Under all names of each: tied weights have several.
        named = bare.named_parameters(remove_duplicate=False)
        self.frozen = {name for name, parameter in named if not parameter.requires_grad}
        self.average = WeightAverage(self.parameters, config.ema)
        self.network, self.bare_network = (
            each if autocast is None else Autocast(each, self.device.type, autocast) for each in (model, bare)
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Give the model its averaged weights, in evaluation mode, inside the block; later steps are not affected."""
        self.model.eval()
        try:
            with self.average.applied():
                yield
        finally:
            # FSDP2 keeps the root's parameters gathered after a call without gradients: the next step would train with
            # the average instead of the weights.
            for module in self.model.modules():
                reshard: Any = getattr(module, "reshard", None)
                if reshard is not None:
                    reshard()

    def step(
        self, step: int, objective: Objective, batches: Iterable[Tensor], *, count: int = 1, log: bool = False
    ) -> Record | None:
        """Take one optimiser step.

        Args:
            step: Number of the step, from 0.
            objective: Loss of a micro-batch. The hooks of a `StatefulObjective` are called.
            batches: Micro-batches of clean ids (B, L).
            count: Number of micro-batches. Default: 1.
            log: Whether to return figures. Default: False.

        Returns:
            With ``log``: ``step``, ``learning_rate``, ``grad_norm`` and the means, over micro-batches and processes,
            of what the objective logs.

        Raises:
            TokenDriftError: If there are more or fewer micro-batches than ``count``; with ``log``, if a figure is not
                finite; the step is named.
        """
        self.model.train()
        hooks = objective if isinstance(objective, StatefulObjective) else None
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(step)
        logs: dict[str, Tensor] = {}
        try:
            # 1. Gradients of all micro-batches add up; the logs are their means.
            with nullcontext() if hooks is None else hooks.step_context():
                taken = 0
                for taken, x0 in enumerate(batches, start=1):
                    with self._accumulating(last=taken == count):
                        loss, found = objective(self.network, x0.to(self.device), log=log)
                        (loss if count == 1 else loss / count).backward()
                    for name, value in found.items():
                        logs[name] = logs.get(name, torch.zeros_like(value)) + value / count
                if taken != count:
                    message = f"the step was given {taken} micro-batches, but count is {count}."
                    raise fail(message, "Pass their number as count: gradients are divided by it.")
            # 2. Clip, step, and take the weights into the average.
            norm = self._clip()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)  # also after an error: the next step begins without gradients
        self.average.update(step)
        # 3. The objective may act on the new weights.
        if hooks is not None:
            hooks.after_step(step + 1, self)
        return self._record(step, norm, logs) if log else None

    def state(self) -> dict[str, Tensors]:
        """Return weights, their average and AdamW's moments on the CPU, unsharded, whatever the number of processes.

        Frozen parameters, such as the model to which adapters belong, are left out: they are those of the checkpoint
        that is refined. Every process must call; processes other than the main one may get empty groups.
        """
        whole, options = self._whole(offload=True)

        def weights() -> Tensors:
            named = whole.get_model_state_dict(self.model, options=options)
            return {name: tensor.clone() for name, tensor in named.items() if name not in self.frozen}

        found = {"model": weights()}
        if self.average.values:
            with self.average.applied():
                found["average"] = weights()
        moments = whole.get_optimizer_state_dict(self.model, self._adamw, options=options).get("state", {})
        found["optimizer"] = {f"{name}/{kind}": value for name, own in moments.items() for kind, value in own.items()}
        return found

    def load_state(self, state: dict[str, Tensors]) -> None:
        """Restore what `state` returned on the main process; every process must call, each with all of it."""
        whole, options = self._whole()
        groups = whole.get_optimizer_state_dict(self.model, self._adamw)["param_groups"]
        moments = {"state": grouped(state["optimizer"]), "param_groups": groups}
        whole.set_optimizer_state_dict(self.model, self._adamw, moments, options=options)
        if self.average.values:
            whole.set_model_state_dict(self.model, state["average"], options=options)
            self.average.take()
        found = whole.set_model_state_dict(self.model, state["model"], options=options)
        lacking = set(found.missing_keys) - self.frozen
        if lacking or found.unexpected_keys:
            raise fail(
                "the checkpoint holds the weights of another model.",
                "Choose another output.",
                missing=sorted(lacking)[:3],
                unexpected=found.unexpected_keys[:3],
            )

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner

    def _whole(self, *, offload: bool = False) -> tuple[Any, Any]:
        """Return the functions of PyTorch for unsharded states, whose types admit more than tensors, and options."""
        from torch.distributed.checkpoint import state_dict

        return state_dict, state_dict.StateDictOptions(
            full_state_dict=True, cpu_offload=offload, strict=not self.frozen
        )

    def _accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        alone = last or self.accelerator is None
        context: AbstractContextManager[None] = nullcontext() if alone else self.accelerator.no_sync(self.model)
        return context

    def _clip(self) -> Tensor:
        if self.accelerator is None:
            return nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole

    def _record(self, step: int, norm: Tensor, logs: dict[str, Tensor]) -> Record:
        """Return the figures of a step as numbers. Reading them waits for an accelerator."""
        if self.accelerator is not None and self.accelerator.num_processes > 1 and logs:
            stacked = torch.stack([value.double().to(self.device) for value in logs.values()])
            means = self.accelerator.reduce(stacked, "mean")
            logs = dict(zip(logs, means, strict=True))
        record = {"step": float(step), "learning_rate": self.config.rate(step), "grad_norm": float(norm)}
        record |= {name: float(value) for name, value in logs.items()}
        finite = {name: value for name, value in record.items() if not name.startswith("pair_weight")}
        if not math.isfinite(sum(finite.values())):
            raise fail(f"training diverged at step {step}: {record}.", "Lower the learning rate.")
        return record


def windows(stream: Tensor, length: int, batch_size: int, *, seed: int) -> Iterator[Tensor]:
    """Yield batches (B, L) of windows at random positions of a token stream (n,), without end.

    The seed fixes their order.

    Raises:
        TokenDriftError: If the stream is shorter than one window.
    """
    if len(stream) < length:
        raise fail(f"the text has {len(stream)} tokens, too few for windows of {length}.", "Pass more text.")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length)
    while True:
        starts = torch.randint(len(stream) - length + 1, (batch_size,), generator=generator)
        yield stream[starts[:, None] + offsets]


def train(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Tensor],
    config: LoopConfig,
    *,
    on_step: Callable[[int], object] | None = None,
) -> list[Record]:
    """Train in place and in memory; the model ends with its averaged weights, in evaluation mode.

    For runs of minutes. A run that should survive interruptions or use several devices is one for `refine`. The hooks
    of a `StatefulObjective` are called at every step; call its ``before_training`` yourself, since it needs the text.

    Args:
        model: The denoiser; its device decides where batches go.
        objective: Loss of a batch.
        batches: Clean ids (B, L) of each step, such as `windows` yields.
        config: Length, rate and averaging.
        on_step: Called with the number of finished steps after each.

    Returns:
        One record for every ``log_every`` steps: ``step``, ``learning_rate``, ``grad_norm`` and what the objective
        logs.

    Raises:
        TokenDriftError: If the loss stops being finite (the step and the rate are named), or the batches end before
            the last step.
    """
    optimization, source = Optimization(model, config), iter(batches)
    records: list[Record] = []
    for step in range(config.steps):
        log = step % config.log_every == 0 or step == config.steps - 1
        batch = next(source, None)
        if batch is None:
            raise fail(f"batches ended after {step} of {config.steps} steps.", "Pass more, or lower steps.")
        record = optimization.step(step, objective, [batch], log=log)
        if record is not None:
            records.append(record)
        if on_step is not None:
            on_step(step + 1)
    optimization.average.swap()
    model.eval()
    return records
