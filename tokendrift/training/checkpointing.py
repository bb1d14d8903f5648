"""Checkpoints of a run that appear whole or not at all, are checked when read, and fall back to the one before.

One folder a checkpoint: named tensors as safetensors and ``state.json``, which holds everything else and the SHA-256 of
each tensor file. It is written under another name, flushed to the disk and then renamed; nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tokendrift._checks import fail
from tokendrift.errors import TokenDriftError
from tokendrift.files import file_digest, flush_to_disk

STATE = "state.json"
NAME, UNFINISHED, BROKEN = "step-", ".saving-", "broken-"

Tell = Callable[[str], object]


class Stored(NamedTuple):
    """A checkpoint as read.

    Attributes:
        tensors: Named tensors of each group.
        state: The rest.
    """

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint and return its place.

    Args:
        folder: Where the checkpoints of the run lie.
        step: Finished optimiser steps; names the checkpoint.
        groups: Named tensors, one file for each group.
        state: Whatever else is needed, fit for JSON.

    Raises:
        OSError: If it cannot be written, on a full disk for instance; nothing of it is left then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    place, made = checkpoint_place(folder, step), folder / f"{UNFINISHED}{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(made, ignore_errors=True)
    try:
        made.mkdir()
        digests = {}
        for group, tensors in groups.items():
            file = made / f"{group}.safetensors"
            try:
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            digests[group] = file_digest(file)
            flush_to_disk(file)
        content = json.dumps({**state, "step": step, "sha256": digests}, indent=1)
        (made / STATE).write_text(content + "\n", encoding="utf-8")
        for path in (made / STATE, made):
            flush_to_disk(path)
        remove_checkpoint(place)  # of the same step, from a run that was cut off before
        made.rename(place)
        flush_to_disk(folder)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return place


def load_checkpoint(place: Path) -> Stored:
    """Read a checkpoint.

    Raises:
        TokenDriftError: If a file is missing, or not what was written.
        OSError: If the disk does not give it; it may be whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        tensors = {}
        for group, digest in state["sha256"].items():
            file = place / f"{group}.safetensors"
            if file_digest(file) != digest:
                raise fail(f"{file} is not what was written: its SHA-256 differs.")
            tensors[group] = load_file(file)
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise fail(f"the checkpoint {place} cannot be read: {error}.") from None
    return Stored(tensors, state)


def latest_checkpoint(folder: Path, tell: Tell) -> tuple[Path, Stored] | None:
    """Return the newest checkpoint that is whole, None without any.

    Newer ones that are not are named, and renamed to ``broken-...`` so that they no longer count. One that the disk
    did not give keeps its name: it may be read next time.

    Raises:
        TokenDriftError: If there are some, and none can be read; all keep their names.
    """
    places = list_checkpoints(folder)
    damaged, reasons = list[Path](), list[str]()
    for place in reversed(places):
        try:
            found = load_checkpoint(place)
        except TokenDriftError as error:
            damaged.append(place)
            reasons.append(str(error).splitlines()[0])
        except OSError as error:
            reasons.append(f"the checkpoint {place} cannot be read: {error}.")
        else:
            for reason in reasons:
                tell(f"{reason} Going back to the one before.")
            for broken in damaged:
                aside = broken.with_name(BROKEN + broken.name)
                shutil.rmtree(aside, ignore_errors=True)
                broken.rename(aside)
            return place, found
    if reasons:
        raise fail(
            f"none of {len(places)} checkpoints in {folder} can be read; of the newest: {reasons[0]}",
            "Bring one back from elsewhere, or remove the folder to begin again.",
        )
    return None


def checkpoint_place(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"{NAME}{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; clear away what an interruption left half written."""
    if not folder.is_dir():
        return []
    for left in [*folder.glob(f"{UNFINISHED}*"), *(p for p in folder.glob(f"{NAME}*") if not (p / STATE).exists())]:
        shutil.rmtree(left, ignore_errors=True)
    return sorted(folder.glob(f"{NAME}*"))


def prune_checkpoints(folder: Path, keep: int, spare: Collection[int] = ()) -> None:
    """Remove all checkpoints but the newest ``keep`` and those of the steps in ``spare``."""
    spared = {f"{NAME}{step:08d}" for step in spare}
    for place in list_checkpoints(folder)[:-keep]:
        if place.name not in spared:
            remove_checkpoint(place)


def remove_checkpoint(place: Path) -> None:
    """Remove a checkpoint; its state goes first, so that an interruption leaves nothing that looks whole."""
    (place / STATE).unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
