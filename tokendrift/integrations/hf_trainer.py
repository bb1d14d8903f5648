"""Objectives, such as drifting, in the Trainer of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from tokendrift.training.objectives.objective import Objective

QUEUES = "tokendrift_loss.pt"


class Backbone(nn.Module):
    """A denoiser without its ``config``, which the Trainer would mistake for one of transformers and change.

    The names of its weights get the prefix ``backbone.``, as in the released checkpoints: `load_denoiser` reads the
    ``model.safetensors`` of the Trainer's checkpoints, with the fields of ``config.json`` passed as ``config``.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *args: Any, **options: Any) -> Any:
        """Call the denoiser."""
        return self.backbone(*args, **options)


class ObjectiveTrainer(Trainer):
    """A Trainer whose loss is an `Objective`.

    The dataset gives ``input_ids``, clean ids of one length L. Diagnostics are part of the Trainer's logs. The drifting
    loss of the objective, if it has one, moves to the Trainer's device; its queues are written into every checkpoint
    and read when training resumes from one. Each micro-batch is a call of its own; gradients and diagnostics of
    accumulated micro-batches are averaged. Of the hooks of a `StatefulObjective`, none is called.

    Evaluation reports the mean of the objective as ``eval_loss``. It draws the same noise every time, from
    ``args.seed``, and changes neither the queues nor the noise of training. There are no predictions.

    Args:
        model: The denoiser.
        args: A ``TrainingArguments``.
        objective: An objective such as `tokendrift.training.Drift` or `Continuation`.
        options: Other options of ``Trainer``.
    """

    def __init__(self, model: nn.Module, args: Any, *, objective: Objective, **options: Any) -> None:
        super().__init__(Backbone(model), args, **options)
        # The objective gives the mean of its batch: nothing is left for the Trainer to divide by a count of tokens.
        self.model_accepts_loss_kwargs = False
        self._signature_columns: Any = ["input_ids"]
        self.objective: Objective = objective
        self.drift: nn.Module | None = getattr(objective, "drift", None)
        self._found: list[dict[str, float]] = []  # one for each micro-batch since the last log
        if self.drift is not None:
            self.drift.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the objective's loss of a batch."""
        if self.drift is not None:
            self.drift.train(model.training)  # it is no part of the model: what is evaluated stays out of its queues
        due = self.args.logging_steps > 0 and (self.state.global_step + 1) % max(1, int(self.args.logging_steps)) == 0
        loss, logs = self.objective(model, inputs["input_ids"], log=due and model.training)
        if due and model.training:
            self._found.append({name: float(value) for name, value in logs.items()})
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the objective's loss of a batch, without predictions and labels."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Evaluate as the Trainer does, with noise of its own."""
        with self._own_noise():
            return super().evaluation_loop(*args, **options)

    @contextmanager
    def _own_noise(self) -> Iterator[None]:
        """Draw the same noise in every evaluation, and let training go on as if there had been none."""
        device = self.args.device
        generator: torch.Generator | None = getattr(self.objective, "generator", None)
        state = None if generator is None else generator.get_state()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed)
            if generator is not None:
                generator.manual_seed(self.args.seed)
            try:
                yield
            finally:
                if generator is not None and state is not None:
                    generator.set_state(state)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log, with what the objective has found."""
        if "loss" in logs and self._found:
            means = {name: sum(found[name] for found in self._found) / len(self._found) for name in self._found[0]}
            logs, self._found = {**logs, **means}, []
        super().log(logs, *args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **options: Any) -> None:
        super()._save_checkpoint(model, trial, *args, **options)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.drift is not None and self.args.should_save:
            torch.save(self.drift.state_dict(), folder / QUEUES)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.drift is None or checkpoint is None:
            return
        file = Path(checkpoint) / QUEUES
        if file.is_file():
            self.drift.load_state_dict(torch.load(file, map_location=self.args.device, weights_only=True))
        else:
            warnings.warn(f"{checkpoint} has no {QUEUES}, so the queues start empty.", stacklevel=2)
