"""Finished stages on disk: a stage appears whole or not at all, so an interrupted run resumes after the last one."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fingerprint(value: Any) -> str:
    """Return twelve hex digits that change with any part of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def place_of(folder: Path, name: str, key: Any) -> Path:
    """Return where `cached` puts the result of a stage, whether it is there or not."""
    return folder / f"{name}-{fingerprint(key)}"


def cached(folder: Path, name: str, key: Any, make: Callable[[Path], object]) -> tuple[Path, bool]:
    """Return the folder of a stage, making it only if no run with the same key finished it before.

    Args:
        folder: Where stages live.
        name: Name of the stage, the start of its folder's name.
        key: Everything the result depends on, JSON-like.
        make: Writes the stage's files into the (temporary) folder that it is given.

    Returns:
        The stage's folder, and whether it was there already.
    """
    final = place_of(folder, name, key)
    if final.is_dir():
        return final, True
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
    try:
        make(place)
        (place / "key.json").write_text(json.dumps(key, indent=2, sort_keys=True, default=str), encoding="utf-8")
        if not final.is_dir():  # another process may have been faster
            place.rename(final)
    except BaseException:  # Ctrl-C too: nothing half-made stays
        shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)
    return final, False
