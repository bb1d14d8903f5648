"""The folder of a run: which run it belongs to, its checkpoints, and the refined model that others read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
from tokendrift.training.config import BOOKKEEPING, KINDS, PAIR_SETTINGS, RefineConfig

CONFIG, CARD = "config.toml", "README.md"
CHECKPOINTS, BEST = "checkpoints", "best"

Groups = Mapping[str, Mapping[str, Tensor]]


class RunFolder:
    """Where a run keeps what must not be lost.

    Args:
        config: The run.
        together: Sequences in a forward call of all processes: what the statistics of the field are taken over.
        base: Identity of the weights that are refined.
        model: Sizes of the network.
        process: Its process.
        tokenizer: Its tokenizer.
        text: Identity of the text, fit for JSON.
        judge: Name of the judge, for the model card.

    Raises:
        TokenDriftError: If the folder holds a model that no refinement has written.
    """

    def __init__(
        self,
        config: RefineConfig,
        *,
        together: int,
        base: str,
        model: DiTConfig,
        process: Process,
        tokenizer: TextTokenizer,
        text: Any = None,
        judge: str | None = None,
    ) -> None:
        self.config, self.path, self.judge = config, Path(config.output), judge
        self.identity = {"together": together, "base": base, "tokenizer": tokenizer.identity(), "text": text}
        self.model, self.process, self.tokenizer = model, process, tokenizer
        if (self.path / "config.json").exists() and not (self.path / CONFIG).exists():
            raise fail(
                f"output {self.path} holds a model that no refinement has written.", "Choose a folder of its own."
            )

    def open(self) -> None:
        """Make the folder and write the configuration into it.

        Raises:
            TokenDriftError: If that is not possible.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / CONFIG, self.config.as_toml())
        except OSError as error:
            raise fail(f"output {self.path} cannot be written: {error}.", "Choose a folder with room.") from None

    def newest(self, tell: Callable[[str], object]) -> tuple[Path, Stored] | None:
        """Return the newest whole checkpoint, None without any; say which are not whole."""
        return latest_checkpoint(self.path / CHECKPOINTS, tell)

    def load(self, place: Path) -> Stored:
        """Read a checkpoint."""
        return load_checkpoint(place)

    def load_step(self, step: int) -> Stored:
        """Read the checkpoint of a step."""
        return load_checkpoint(checkpoint_place(self.path / CHECKPOINTS, step))

    def save(self, finished: int, groups: Groups, state: Mapping[str, Any], *, keep: Sequence[int] = ()) -> None:
        """Write a checkpoint, and remove those that are neither among the last nor of the steps to keep.

        Raises:
            OSError: If it cannot be written; those before are whole then.
        """
        about = {
            "config": dataclasses.asdict(self.config),
            **self.identity,
            "versions": {"tokendrift": __version__, "torch": torch.__version__},
        }
        save_checkpoint(self.path / CHECKPOINTS, finished, groups, {**about, **state})
        prune_checkpoints(self.path / CHECKPOINTS, self.config.keep, keep)

    def check_same_run(self, state: Mapping[str, Any]) -> None:
        """Require that a checkpoint is of this run.

        Raises:
            TokenDriftError: If not; what differs is named.
        """
        # A setting that the run did not know yet had what is its default now.
        told = {name: value for name, value in state["config"].items() if name in KINDS and name not in BOOKKEEPING}
        other = _learned(RefineConfig(**told))
        # A constant rate does not know when it ends, so that a run may be made longer.
        free = BOOKKEEPING | {"micro_batch"} | ({"steps"} if self.config.schedule == "constant" else set())
        if self.config.objective != "pairs":
            free |= PAIR_SETTINGS
        differ = [
            f"{name} was {other[name]!r} and is {value!r}"
            for name, value in _learned(self.config).items()
            if name not in free and value != other[name]
        ]
        before, now = state["together"], self.identity["together"]
        if before != now:
            differ.append(f"a forward call of all processes had {before} sequences and has {now}")
        if state["base"] != self.identity["base"]:
            differ.append("the weights of the checkpoint to refine have changed")
        if "tokenizer" in state and not self.tokenizer.has_identity(state["tokenizer"]):
            differ.append("the vocabulary of the tokenizer has changed")
        if state.get("text", self.identity["text"]) != self.identity["text"]:
            differ.append(
                "the text, or what the tokenizer makes of it, has changed (text added at the end counts, too)"
            )
        if differ:
            raise fail(
                f"{self.path} holds a run with another configuration: {'; '.join(differ)}.",
                f"Choose another output, or go on with the configuration of that run, {self.path / CONFIG}.",
            )
        if state["step"] > self.config.steps:
            raise fail(
                f"steps is {self.config.steps}, but {self.path} holds a run of {state['step']} steps already.",
                f"Pass at least {state['step']} steps, or choose another output.",
            )

    def export(self, groups: Groups, rows: Sequence[dict[str, Any]], steps: int, *, best: bool = False) -> None:
        """Write the averaged model, its tokenizer and card; the best one into a folder of its own.

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
        card = model_card(self.config, rows, steps=steps, process=kind, judge=self.judge)
        write_atomically(folder / CARD, card)


def _learned(config: RefineConfig) -> dict[str, Any]:
    """Return the settings, the weight of the backbone's own objective as it is used."""
    return dataclasses.asdict(config) | {"base_weight": config.weight_of_base()}
