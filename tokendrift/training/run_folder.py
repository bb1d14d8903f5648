"""The folder of a run: the run that it belongs to, its checkpoints, and the refined model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendrift import __version__
from tokendrift._checks import fail
from tokendrift.diffusion import Process
from tokendrift.files import write_atomically
from tokendrift.models import DiT, DiTConfig, save_denoiser
from tokendrift.models.tokenizer import TextTokenizer
from tokendrift.training.card import model_card
from tokendrift.training.checkpointing import (
    Stored,
    checkpoint_place,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from tokendrift.training.config import RefineConfig, all_setting_types

CONFIG, CARD = "config.toml", "README.md"
CHECKPOINTS, BEST = "checkpoints", "best"

# Settings that may differ when a run is resumed: they change what is logged and kept, or are compared in another way.
BOOKKEEPING = {
    *("output", "log_every", "checkpoint_every", "keep", "tensorboard", "wandb", "judge", "entropy_tolerance"),
    *("baseline", "micro_batch", "evaluate_every", "evaluate_samples", "evaluate_nfe", "evaluate_batch"),
}

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(eq=False)
class RunFolder:
    """The output folder of a run.

    Attributes:
        config: The settings of the run.
        together: Number of sequences in a forward call of all processes, over which the field takes its statistics.
        base: Digest of the weights that are refined.
        model: Sizes of the network.
        process: Process of the network.
        tokenizer: Tokenizer of the network.
        text: Identity of the text, fit for JSON.
        judge: Name of the judge, for the model card.

    Raises:
        TokenDriftError: If the folder contains a model that was not written by refine.
    """

    config: RefineConfig
    together: int
    base: str
    model: DiTConfig
    process: Process
    tokenizer: TextTokenizer
    text: Any = None
    judge: str | None = None

    def __post_init__(self) -> None:
        self.path = Path(self.config.output)
        if (self.path / "config.json").exists() and not (self.path / CONFIG).exists():
            raise fail(f"output {self.path} contains a model that was not written by refine.", "Choose a new folder.")
        identity = self.tokenizer.identity()
        self.identity = {"together": self.together, "base": self.base, "tokenizer": identity, "text": self.text}

    def open(self) -> None:
        """Make the folder and write the configuration into it.

        Raises:
            TokenDriftError: If that is not possible.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / CONFIG, self.config.as_toml())
        except OSError as error:
            raise fail(
                f"output {self.path} cannot be written: {error}.", "Free some space, or choose another folder."
            ) from None

    def newest(self, warn: Callable[[str], object]) -> tuple[Path, Stored] | None:
        """Return the newest complete checkpoint, or None if there is none; warn of damaged ones."""
        return latest_checkpoint(self.path / CHECKPOINTS, warn)

    def load_step(self, step: int) -> Stored:
        """Read the checkpoint of a step."""
        return load_checkpoint(checkpoint_place(self.path / CHECKPOINTS, step))

    def save(self, finished: int, groups: Groups, state: Mapping[str, Any], *, keep: Sequence[int] = ()) -> None:
        """Write a checkpoint, and remove those that are neither among the newest nor of the steps to keep.

        Raises:
            OSError: If it cannot be written; the checkpoints before are complete then.
        """
        about = {
            "config": self.config.settings(),
            **self.identity,
            "versions": {"tokendrift": __version__, "torch": torch.__version__},
        }
        save_checkpoint(self.path / CHECKPOINTS, finished, groups, {**about, **state})
        prune_checkpoints(self.path / CHECKPOINTS, self.config.keep, keep)

    def check_same_run(self, state: Mapping[str, Any]) -> None:
        """Require that a checkpoint belongs to this run.

        Raises:
            TokenDriftError: If it does not; the error names what differs.
        """
        # 1. The settings that change the result. One that an older version did not have had what is its default now,
        # and those of other objectives do not count.
        known = all_setting_types()
        before = RefineConfig.from_settings({n: v for n, v in state["config"].items() if n in known}).settings()
        free = BOOKKEEPING | ({"steps"} if self.config.schedule == "constant" else set())
        differ = [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in self.config.settings().items()
            if name not in free and value != before.get(name)
        ]
        # 2. What the settings do not show: processes, weights, tokenizer and text.
        now = self.identity
        if state["together"] != now["together"]:
            ranks = now["together"] // self.config.micro_batch
            own, rest = divmod(state["together"], ranks)
            advice = f"; pass micro_batch={own}" if not rest else "; choose a number of processes that divides it"
            differ.append(
                f"a forward call of all processes had {state['together']} sequences and has {now['together']}{advice}"
            )
        changes = {
            "base": "the weights of the checkpoint to refine have changed",
            "text": "the text, or what the tokenizer makes of it, has changed (text added at the end counts, too)",
        }
        differ += [change for name, change in changes.items() if state.get(name, now[name]) != now[name]]
        if "tokenizer" in state and not self.tokenizer.has_identity(state["tokenizer"]):
            differ.append("the tokenizer has changed")
        if differ:
            raise fail(
                f"{self.path} contains a run with another configuration: {'; '.join(differ)}.",
                f"Choose another output, or resume with the configuration of that run, {self.path / CONFIG}.",
            )
        if state["step"] > self.config.steps:
            raise fail(
                f"steps is {self.config.steps}, but {self.path} already contains a run of {state['step']} steps.",
                f"Pass at least {state['step']} steps, or choose another output.",
            )

    def export(self, groups: Groups, rows: Sequence[dict[str, Any]], steps: int, *, best: bool = False) -> None:
        """Write the averaged model, its tokenizer and its card; the best model has a folder of its own.

        Raises:
            OSError: If they cannot be written.
        """
        from safetensors import SafetensorError

        folder = self.path / BEST if best else self.path
        model = DiT(self.model)
        model.load_state_dict(groups.get("average", groups["model"]))
        try:
            save_denoiser(model, folder, self.process)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self.tokenizer.save(folder)
        kind = "masked" if self.process.mask_id is not None else "uniform-state"
        about = {"judge": self.judge, "random_input": self.model.random_input}
        card = model_card(self.config, rows, steps=steps, process=kind, **about)  # type: ignore[arg-type]
        write_atomically(folder / CARD, card)
