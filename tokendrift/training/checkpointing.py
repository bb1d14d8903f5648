"""Checkpoints of a run: written completely or not at all, verified when read, with a fallback to the one before.

A checkpoint is a folder with named tensors as safetensors and with ``state.json``, which holds everything else, the
SHA-256 of each tensor file and its own. It is written under another name, flushed to the disk and then renamed. Nothing
is pickled. What has another name than a checkpoint gets is never read, renamed or removed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from tokendrift._checks import fail
from tokendrift.errors import TokenDriftError
from tokendrift.files import file_digest, flush_to_disk, write_atomically

STATE = "state.json"
NAME, UNFINISHED, REMOVED, BROKEN = "step-", ".saving-", ".removing-", "broken-"
OWN = "state_sha256"  # the digest of the state itself

# What reading a state of any other content may raise.
_UNREADABLE = (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError, RecursionError)


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
        (made / STATE).write_text(_with_digest({**state, "step": step, "sha256": digests}), encoding="utf-8")
        for path in (made / STATE, made):
            flush_to_disk(path)
        old = _put_aside(place)  # of the same step
        made.rename(place)
        flush_to_disk(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return place


def _with_digest(state: Mapping[str, Any]) -> str:
    """Return a state as JSON with its own SHA-256."""
    plain = json.loads(json.dumps(state))
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    return json.dumps({**plain, OWN: digest}, indent=1) + "\n"


def update_state(place: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of the state of a checkpoint.

    Raises:
        TokenDriftError: If it cannot be read.
        OSError: If it cannot be written; it is as before then.
    """
    try:
        state = _read_state(place)
    except _UNREADABLE as error:
        raise fail(f"the checkpoint {place} cannot be read: {str(error).rstrip('.')}.") from None
    write_atomically(place / STATE, _with_digest({**state, **changes}))


def _read_state(place: Path) -> dict[str, Any]:
    """Return the state of a checkpoint, which must be what was written."""
    state: dict[str, Any] = json.loads((place / STATE).read_text(encoding="utf-8"))
    own = state.pop(OWN, None)  # versions before 0.1 wrote none
    if own is not None and json.loads(_with_digest(state))[OWN] != own:
        raise fail(f"{place / STATE} was changed after it was written: its SHA-256 differs.")
    if checkpoint_place(place.parent, state["step"]) != place:
        raise fail(f"{place / STATE} belongs to step {state['step']}.")
    return state


def load_checkpoint(place: Path, needs: Mapping[str, type | tuple[type, ...]] = MappingProxyType({})) -> Stored:
    """Read a checkpoint.

    Args:
        place: Its folder.
        needs: Entries that the state must have, with their types. Default: none.

    Raises:
        TokenDriftError: If a file is missing, or is not what was written.
        OSError: If the disk fails to return it; the checkpoint may be complete.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = _read_state(place)
        tensors = {}
        for group, digest in state["sha256"].items():
            file = place / f"{group}.safetensors"
            if file_digest(file) != digest:
                raise fail(f"{file} was changed after it was written: its SHA-256 differs.")
            tensors[group] = load_file(file)
        for name, kind in needs.items():
            if name not in state or not isinstance(state[name], kind):
                raise fail(f"{place / STATE} has no valid entry {name!r}.")
    except (*_UNREADABLE, SafetensorError) as error:
        raise fail(f"the checkpoint {place} cannot be read: {str(error).rstrip('.')}.") from None
    return Stored(tensors, state)


def latest_checkpoint(
    folder: Path,
    warn: Callable[[str], object],
    needs: Mapping[str, type | tuple[type, ...]] = MappingProxyType({}),
) -> tuple[Path, Stored] | None:
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
            found = load_checkpoint(place, needs)
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
    """Return the checkpoints of a run, oldest first; tidy up what an interruption left half written or half removed."""
    if not folder.is_dir():
        return []
    found = {}
    for path in sorted(folder.iterdir(), reverse=True):  # what has its name before what was put aside
        parts = re.fullmatch(rf"({NAME}|\{UNFINISHED}|\{REMOVED})(\d{{8,}})", path.name)
        kind, step = (parts[1], int(parts[2])) if parts else ("", 0)
        if kind == NAME and (path / STATE).exists():
            found[step] = path
        elif kind == NAME:
            with suppress(OSError):
                path.rmdir()  # without its files; with any, it may belong to someone else
        elif kind == REMOVED and (path / STATE).exists() and step not in found:
            # The one that was to take its place had not come yet.
            found[step] = path.rename(checkpoint_place(folder, step))
        elif kind:
            shutil.rmtree(path, ignore_errors=True)
    return [found[step] for step in sorted(found)]


def prune_checkpoints(folder: Path, keep: int, spare: Collection[int] = ()) -> None:
    """Remove all checkpoints except the newest ``keep`` and those of the steps in ``spare``."""
    spared = {f"{NAME}{step:08d}" for step in spare}
    for place in list_checkpoints(folder)[:-keep]:
        if place.name not in spared:
            shutil.rmtree(_put_aside(place), ignore_errors=True)


def _put_aside(place: Path) -> Path:
    """Give a checkpoint, if there is one, the name of one that is being removed; return that."""
    aside = place.with_name(place.name.replace(NAME, REMOVED))
    shutil.rmtree(aside, ignore_errors=True)
    if place.exists():
        place.rename(aside)
    return aside
