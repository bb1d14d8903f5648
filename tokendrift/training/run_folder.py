"""The folder of a run: the run that it belongs to, its checkpoints, and the refined model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendrift import __version__
from tokendrift._checks import fail
from tokendrift.diffusion import Process
from tokendrift.files import exclusive, write_atomically
from tokendrift.models import LoadedDenoiser, save_denoiser
from tokendrift.models.tokenizer import TextTokenizer
from tokendrift.training.card import model_card
from tokendrift.training.checkpointing import (
    Stored,
    checkpoint_place,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    update_state,
)
from tokendrift.training.config import RefineConfig, all_setting_types
from tokendrift.training.records import LOG

CONFIG, CARD = "config.toml", "README.md"
CHECKPOINTS, BEST, BASELINE = "checkpoints", "best", "continuation"
MARKER, LOCK = ".tokendrift-run", ".tokendrift-lock"

# What a state must have to be resumed from; checkpoints of versions that wrote no digest of it may lack anything.
NEEDED: Mapping[str, type | tuple[type, ...]] = {
    "config": dict,
    "together": int,
    "data": dict,
    "evaluations": list,
    "best": (dict, type(None)),
}

# Settings that may differ when a run is resumed: they change what is logged and kept, or are compared in another way.
BOOKKEEPING = {
    *(
        "output",
        "log_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep",
        "tensorboard",
        "wandb",
        "judge",
        "judge_tokenizer",
        "entropy_tolerance",
    ),
    *("baseline", "micro_batch", "evaluate_every", "evaluate_samples", "evaluate_nfe", "evaluate_batch"),
}

Groups = Mapping[str, Mapping[str, Tensor]]


def check_output(folder: Path) -> None:
    """Require a folder that a run may write to: a new or empty one, or one that a run has made.

    Raises:
        TokenDriftError: If it holds anything else.
    """
    if not folder.is_dir() or _is_ours(folder):
        return
    what = "a model that was" if (folder / "config.json").exists() else "files that were"
    raise fail(f"output {folder} contains {what} not written by refine.", "Choose a new or an empty folder.")


def _is_ours(folder: Path) -> bool:
    """Return whether nothing is in a folder but what runs have written."""
    names = {path.name for path in folder.iterdir()}
    # Versions before 0.1 wrote no marker. The matched continuation comes before the run that it stands beside.
    earlier = CONFIG in names and bool(names & {CHECKPOINTS, LOG})
    return MARKER in names or earlier or not names - {LOCK} or (names == {BASELINE} and _is_ours(folder / BASELINE))


@dataclass(eq=False)
class RunFolder:
    """The output folder of a run.

    Attributes:
        config: The settings of the run.
        together: Number of sequences in a forward call of all processes, over which the field takes its statistics.
        base: Digest of the weights that are refined.
        model: A network like the one that is trained; its own weights are not read.
        process: Process of the network.
        tokenizer: Tokenizer of the network.
        text: Identity of the text, fit for JSON.
        judge: Name of the judge, for the model card.

    """

    config: RefineConfig
    together: int
    base: str
    model: LoadedDenoiser
    process: Process
    tokenizer: TextTokenizer
    text: Any = None
    judge: str | None = None

    def __post_init__(self) -> None:
        self.path = Path(self.config.output)
        identity = self.tokenizer.identity()
        self.identity = {"together": self.together, "base": self.base, "tokenizer": identity, "text": self.text}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it inside the block.

        Raises:
            TokenDriftError: If that is not possible, or another process is in it, which the error names.
        """
        with exclusive(self.path / LOCK, Path(f"output {self.path}")):
            self._write(MARKER, "This folder was made by `tokendrift refine`, which may replace files in it.\n")
            yield

    def open(self) -> None:
        """Write the configuration into the folder.

        Raises:
            TokenDriftError: If that is not possible.
        """
        self._write(CONFIG, self.config.as_toml())

    def _write(self, name: str, text: str) -> None:
        try:
            write_atomically(self.path / name, text)
        except OSError as error:
            raise fail(
                f"output {self.path} cannot be written: {error}.", "Free some space, or choose another folder."
            ) from None

    def newest(self, warn: Callable[[str], object]) -> Stored | None:
        """Return the newest complete checkpoint, or None if there is none; warn of damaged ones."""
        found = latest_checkpoint(self.path / CHECKPOINTS, warn, NEEDED)
        return None if found is None else found[1]

    def update(self, step: int, changes: Mapping[str, Any], *, keep: Sequence[int] = ()) -> None:
        """Change entries of the state of a checkpoint, and remove those that need not be kept any longer.

        Raises:
            OSError: If it cannot be written; it is as before then.
        """
        update_state(checkpoint_place(self.path / CHECKPOINTS, step), changes)
        prune_checkpoints(self.path / CHECKPOINTS, self.config.keep, keep)

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
        try:
            save_denoiser(self.model, folder, self.process, state=groups.get("average", groups["model"]))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self.tokenizer.save(folder)
        self.write_card(folder, rows, steps)

    def write_card(self, folder: Path, rows: Sequence[dict[str, Any]], steps: int) -> None:
        """Write the card of a model, with its figures.

        Raises:
            OSError: If it cannot be written.
        """
        kind = "masked" if self.process.mask_id is not None else "uniform-state"
        numbers = self.model.config.random_input or 0
        card = model_card(self.config, rows, steps=steps, process=kind, judge=self.judge, random_input=numbers)
        write_atomically(folder / CARD, card)
