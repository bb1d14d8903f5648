"""Drifting, or any other objective, in the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from tokendrift.training.objectives import Objective

QUEUES = "tokendrift_loss.pt"


class Backbone(nn.Module):
    """A denoiser without its ``config``, which the Trainer would take for one of transformers and write into.

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
    """A Trainer whose loss is an `Objective`; everything else is the Trainer's own.

    The dataset gives ``input_ids``, clean ids of one length L. Diagnostics go where the Trainer's logs go. The
    drifting loss of the objective, if it has one, moves to the Trainer's device; its queues are written into every
    checkpoint and read when training resumes from one. A micro-batch is a call of its own, and the gradients of
    accumulated ones are averaged.

    Args:
        model: The denoiser.
        args: A ``TrainingArguments``.
        objective: Such as `tokendrift.training.Drift` or `Continuation`.
        options: Those of ``Trainer``.
    """

    def __init__(self, model: nn.Module, args: Any, *, objective: Objective, **options: Any) -> None:
        super().__init__(Backbone(model), args, **options)
        # The objective gives the mean of its batch: nothing is left for the Trainer to divide by a count of tokens.
        self.model_accepts_loss_kwargs = False
        self._signature_columns: Any = ["input_ids"]
        self.objective: Objective = objective
        self.drift: nn.Module | None = getattr(objective, "drift", None)
        self._found: dict[str, float] = {}
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
        due = self.args.logging_steps > 0 and (self.state.global_step + 1) % max(1, int(self.args.logging_steps)) == 0
        loss, logs = self.objective(model, inputs["input_ids"], log=due and model.training)
        if due and model.training:
            self._found = {name: float(value) for name, value in logs.items()}
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log, with what the objective has found."""
        if "loss" in logs:
            logs = {**logs, **self._found}
        super().log(logs, *args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **options: Any) -> None:
        super()._save_checkpoint(model, trial, *args, **options)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.drift is not None and self.args.should_save:
            torch.save(self.drift.state_dict(), folder / QUEUES)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint) / QUEUES if checkpoint is not None else None
        if self.drift is not None and file is not None and file.is_file():
            self.drift.load_state_dict(torch.load(file, map_location=self.args.device, weights_only=True))
