"""Checkpoints of a run: written completely or not at all, verified when read, with a fallback to the one before.

A checkpoint is a folder with named tensors as safetensors and with ``state.json``, which holds everything else and the
SHA-256 of each tensor file. It is written under another name, flushed to the disk and then renamed. Nothing is pickled.
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
    """Write a checkpoint and return its folder.

    Args:
        folder: Folder of all checkpoints of the run.
        step: Number of finished optimiser steps, which names the checkpoint.
        groups: Named tensors; each group becomes one file.
        state: Everything else, fit for JSON.

    Raises:
        OSError: If it cannot be written, for instance on a full disk; nothing of it is left then.
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
        TokenDriftError: If a file is missing, or is not what was written.
        OSError: If the disk fails to return it; the checkpoint may be complete.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        tensors = {}
        for group, digest in state["sha256"].items():
            file = place / f"{group}.safetensors"
            if file_digest(file) != digest:
                raise fail(f"{file} was changed after it was written: its SHA-256 differs.")
            tensors[group] = load_file(file)
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise fail(f"the checkpoint {place} cannot be read: {error}.") from None
    return Stored(tensors, state)


def latest_checkpoint(folder: Path, warn: Callable[[str], object]) -> tuple[Path, Stored] | None:
    """Return the newest complete checkpoint, or None if there is none.

    Damaged checkpoints that are newer are reported to ``warn`` and renamed to ``broken-...``, so that they no longer
    count. A checkpoint that the disk failed to return keeps its name: it may be readable next time.

    Raises:
        TokenDriftError: If there are checkpoints and none can be read; all keep their names.
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
                warn(f"{reason} The previous checkpoint is used instead.")
            for broken in damaged:
                aside = broken.with_name(BROKEN + broken.name)
                shutil.rmtree(aside, ignore_errors=True)
                broken.rename(aside)
            return place, found
    if reasons:
        raise fail(
            f"none of {len(places)} checkpoints in {folder} can be read. For the newest: {reasons[0]}",
            "Restore one from a backup, or remove the folder to begin again.",
        )
    return None


def checkpoint_place(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return folder / f"{NAME}{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; remove what an interruption left half written."""
    if not folder.is_dir():
        return []
    for left in [*folder.glob(f"{UNFINISHED}*"), *(p for p in folder.glob(f"{NAME}*") if not (p / STATE).exists())]:
        shutil.rmtree(left, ignore_errors=True)
    return sorted(folder.glob(f"{NAME}*"))


def prune_checkpoints(folder: Path, keep: int, spare: Collection[int] = ()) -> None:
    """Remove all checkpoints except the newest ``keep`` and those of the steps in ``spare``."""
    spared = {f"{NAME}{step:08d}" for step in spare}
    for place in list_checkpoints(folder)[:-keep]:
        if place.name not in spared:
            remove_checkpoint(place)


def remove_checkpoint(place: Path) -> None:
    """Remove a checkpoint, its state first, so that an interruption leaves nothing that looks complete."""
    (place / STATE).unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
