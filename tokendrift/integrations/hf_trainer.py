"""Objectives, such as drifting, in the Trainer of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from tokendrift._checks import fail, warn_user
from tokendrift.encoders import unwrapped
from tokendrift.errors import TokenDriftError
from tokendrift.files import write_atomically
from tokendrift.models.adapters import MaskedLMDenoiser
from tokendrift.models.checkpoints import config_json, save_denoiser
from tokendrift.models.dit import DiT
from tokendrift.models.pretrained import write_configuration
from tokendrift.models.weight_files import CONFIG
from tokendrift.modes import evaluation_mode
from tokendrift.training.objectives.objective import Objective, StatefulObjective
from tokendrift.training.optimization import LoopConfig, Optimization

QUEUES = "tokendrift_loss.pt"  # the state of the objective; that of a drifting loss is its queues
NOISE = "tokendrift_noise_{}.pt"  # the state of the objective's generator on a process


class Backbone(nn.Module):
    """A denoiser without its ``config``, which the Trainer would mistake for one of transformers and change.

    The names of its weights get the prefix ``backbone.``, as in the released checkpoints. Where a model of transformers
    holds all weights, they are stored under that model's own names instead, so that ``from_pretrained`` reads them.
    Weights that share memory (tied weights) are stored once.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *args: Any, **options: Any) -> Any:
        """Call the denoiser."""
        return self.backbone(*args, **options)

    def pretrained(self) -> tuple[str, PreTrainedModel | None]:
        """Return the prefix of the stored weights' names, and the model of transformers that holds them, if any."""
        if not any(hasattr(module, "get_base_model") for module in self.modules()):  # not with adapters of peft
            for name, module in self.named_modules():
                if isinstance(module, PreTrainedModel) and all(key.startswith(f"{name}.") for key in self.state_dict()):
                    return f"{name}.", module
        return "", None

    def stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a ``state_dict`` as they are stored."""
        first, prefix = _first_names(state), self.pretrained()[0]
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if first[name] == name}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load weights under the names of the module, or as they were stored."""
        first, prefix = _first_names(self.state_dict()), self.pretrained()[0]
        if not any(name in first for name in state_dict):
            state_dict = {prefix + name: tensor for name, tensor in state_dict.items()}
        tied = {name: state_dict[one] for name, one in first.items() if one in state_dict}
        return super().load_state_dict({**tied, **state_dict}, *args, **options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Switch gradient checkpointing on in the model of transformers that the denoiser holds."""
        self._enable("gradient_checkpointing_enable", options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Switch gradient checkpointing on, under the name that transformers 5 has for it."""
        self._enable("activation_checkpointing_enable", options)

    def _enable(self, method: str, options: dict[str, Any]) -> None:
        model = next((module for module in self.backbone.modules() if hasattr(module, method)), None)
        if model is None or not getattr(model, "supports_gradient_checkpointing", True):
            raise fail(
                "gradient_checkpointing is on, but the denoiser does not support it.",
                "Leave it out of TrainingArguments, or pass a denoiser around a model of transformers that does.",
                denoiser=type(self.backbone).__name__,
            )
        getattr(model, method)(**options)


def _first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each tensor the name of the first one that is the same memory, its own where there is none."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device), name)
        if tensor.numel() and tensor.data_ptr()
        else name
        for name, tensor in state.items()
    }


class StepHooks(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Calls the hooks of a `StatefulObjective` where the Trainer's loop begins and where it takes its steps.

    Args:
        objective: The objective.
        trainer: The Trainer, whose dataset is the training text.
    """

    def __init__(self, objective: StatefulObjective, trainer: ObjectiveTrainer) -> None:
        self.objective, self.trainer, self.step = objective, trainer, ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Prepare a run that starts from step 0."""
        # The view of the training that hooks get: the Trainer keeps no average, so its decay is 0.
        network = cast(Backbone, unwrapped(cast(nn.Module, self.trainer.model))).backbone
        self.optimization = Optimization(network, LoopConfig(max(1, state.max_steps), ema=0.0))
        self.optimization.optimizer = self.trainer.optimizer
        if state.global_step == 0:
            self.objective.before_training(self._first_sequences)

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Enter the context of an optimiser step."""
        self.step.enter_context(self.objective.step_context())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Leave the context, after the last micro-batch."""
        self.step.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Let the objective act after the step."""
        self.step.close()  # transformers before 4.47 does not announce the optimiser step
        self.objective.after_step(state.global_step, self.optimization)

    def _first_sequences(self, count: int) -> Tensor:
        rows = [torch.as_tensor(row["input_ids"]) for row in islice(cast(Any, self.trainer.train_dataset), count)]
        return torch.stack((rows * -(-count // len(rows)))[:count])


class ObjectiveTrainer(Trainer):
    """A Trainer whose loss is an `Objective`.

    The dataset gives ``input_ids``, clean ids of one length L. Diagnostics are part of the Trainer's logs. Each
    micro-batch is a call of its own; gradients and diagnostics of accumulated micro-batches are averaged.

    The hooks of a `StatefulObjective` are called as `refine` calls them, so that `DistributionMatching` trains its
    auxiliary model. Its modules, such as a drifting loss, move to the Trainer's device. Its state, such as the queues,
    is written into every checkpoint and read when training resumes from one; so is that of its ``generator``.

    `load_denoiser` reads what it saves. So does ``from_pretrained`` for a model of transformers inside a
    `MaskedLMDenoiser`; adapters of peft stand beside the weights that the Trainer itself resumes from.

    Evaluation reports the mean of the objective as ``eval_loss``. It draws the same noise every time, from
    ``args.seed``, and changes neither the queues nor the noise of training. There are no predictions.

    Args:
        model: The denoiser.
        args: A ``TrainingArguments``.
        objective: An objective such as `tokendrift.training.Drift` or `Continuation`.
        options: Other options of ``Trainer``.
    """

    def __init__(self, model: nn.Module, args: Any, *, objective: Objective, **options: Any) -> None:
        for name in ("label_smoothing_factor", "neftune_noise_alpha"):
            if getattr(args, name, None):
                raise fail(
                    f"{name} changes a loss of labels, and the objective is another one.",
                    f"Leave {name} out of TrainingArguments.",
                    **{name: getattr(args, name)},
                )
        super().__init__(Backbone(model), args, **options)
        # The objective gives the mean of its batch: nothing is left for the Trainer to divide by a count of tokens.
        self.model_accepts_loss_kwargs = False
        self._signature_columns: Any = ["input_ids"]
        self.objective: Objective = objective
        self.drift: nn.Module | None = getattr(objective, "drift", None)
        self._found: list[dict[str, float]] = []  # one for each micro-batch since the last log
        # What moves and is stored: that of the objective, or else its drifting loss.
        stateful = objective if isinstance(objective, StatefulObjective) else None
        share, own = getattr(objective, "share", None), (self.args.process_index, self.args.world_size)
        if share not in (None, own):
            warn_user(
                f"the objective has share={share}, but this is process {own[0]} of {own[1]}: the processes draw the "
                "same noise, and an auxiliary model is trained by each on its own. Build it with "
                "share=(args.process_index, args.world_size) and with generators in the same state."
            )
        self._module = self.drift if stateful is None else stateful.module
        self._state: Any = stateful or self.drift
        if self._module is not None:
            self._module.to(self.args.device)
        self._step: Any = nullcontext()  # of the step in progress
        if stateful is not None:
            hooks = StepHooks(stateful, self)
            self._step = hooks.step
            self.add_callback(hooks)

    @property
    def _generator(self) -> torch.Generator | None:
        """Source of the objective's random numbers, if it has one of its own."""
        return getattr(self.objective, "generator", None)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as the Trainer does."""
        if self.drift is not None:
            self.drift.train()
        with self._step:  # where training fails within a step, the context of the step learns of it
            return super().train(*args, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the objective's loss of a batch."""
        due = model.training and self._logs_after_this_step()
        loss, logs = self.objective(model, inputs["input_ids"], log=due)
        if due:
            self._found.append({name: float(value) for name, value in logs.items()})
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _logs_after_this_step(self) -> bool:
        """Return whether the Trainer logs after the step in progress, for which diagnostics are computed."""
        if self.args.logging_strategy == "epoch":
            return bool(self.accelerator.gradient_state.end_of_dataloader)
        # The state has the number of steps where the arguments may have a share of all steps.
        return self.args.logging_strategy == "steps" and (self.state.global_step + 1) % self.state.logging_steps == 0

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
        """Evaluate as the Trainer does, with noise of its own; what is evaluated stays out of the queues."""
        with self._own_noise(), evaluation_mode(self._module):
            return super().evaluation_loop(*args, **options)

    @contextmanager
    def _own_noise(self) -> Iterator[None]:
        """Draw the same noise in every evaluation, and let training go on as if there had been none."""
        device, generator = self.args.device, self._generator
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder, whole = Path(str(output_dir or self.args.output_dir)), cast(nn.Module, self.model)
        model: Any = unwrapped(whole)
        super()._save(str(folder), model.stored(whole.state_dict() if state_dict is None else state_dict))
        network, (_, pretrained) = unwrapped(model.backbone), model.pretrained()
        if not self.args.should_save:
            return
        if not isinstance(network, (DiT, MaskedLMDenoiser)):
            if pretrained is not None:
                pretrained.config.save_pretrained(folder)
            return
        try:
            config = config_json(network, getattr(self.objective, "process", None))
        except TokenDriftError as error:
            warn_user(f"the configuration is not written: {error}")
            return
        if isinstance(network, DiT):
            write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        elif pretrained is not None:
            write_configuration(pretrained, config, folder)
        elif hasattr(network.module, "peft_config"):
            save_denoiser(network, folder, getattr(self.objective, "process", None))

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **options: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        state = {} if self._state is None else self._state.state_dict()
        # First, since the Trainer ends with the removal of older checkpoints: this one must be complete by then.
        if state and self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / QUEUES)
        super()._save_checkpoint(model, trial, *args, **options)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._generator is not None:
            torch.save(self._generator.get_state(), Path(output_dir) / NOISE.format(self.args.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        file = None if checkpoint is None else Path(checkpoint) / NOISE.format(self.args.process_index)
        if self._generator is not None and file is not None and file.is_file():  # versions before 0.1 wrote none
            self._generator.set_state(torch.load(file, weights_only=True))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._state is None or not self._state.state_dict():
            return
        file = Path(checkpoint) / QUEUES
        if file.is_file():
            self._state.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        else:
            warn_user(
                f"{checkpoint} has no {QUEUES}, so the queues start empty and the objective begins as it was built."
            )
