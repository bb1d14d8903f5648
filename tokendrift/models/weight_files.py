"""Weight files as they lie on disk: folders in the hub's layout, safetensors and their shards, pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tokendrift._checks import fail
from tokendrift.models import lightning

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".ckpt", ".bin", ".pt", ".pth")

Files = tuple[dict[str, Any], dict[str, Tensor], str]  # configuration, tensors by stored name, what they are


def read_folder(folder: Path) -> Files:
    """Read ``config.json`` and the weights beside it.

    Raises:
        TokenDriftError: If one of them is missing or unreadable.
    """
    if not (folder / CONFIG).is_file():
        raise fail(f"{folder} has no {CONFIG}.", f"Pass a folder with {CONFIG} and {WEIGHTS}, or a weight file.")
    for name in (WEIGHTS, INDEX, "pytorch_model.bin"):
        if (folder / name).is_file():
            return _read_json(folder / CONFIG), *_read_weights(folder / name)
    raise fail(f"{folder} has no {WEIGHTS}.", f"Pass a folder with {CONFIG} and {WEIGHTS}, or a weight file.")


def read_file(path: Path, *, ema: bool) -> Files:
    """Read one weight file, with the ``config.json`` beside it or what a Lightning checkpoint says of itself.

    Raises:
        TokenDriftError: If it is no weight file, or unreadable.
    """
    beside = path.parent / CONFIG
    own = _read_json(beside) if beside.is_file() else {}
    if path.suffix in PICKLES:
        state = lightning.read_pickle(path)
        if "state_dict" in state:
            return lightning.hub_config(state), *lightning.weights(state, ema=ema)
        return own, *_named_tensors(path, state)
    if path.suffix == ".safetensors":
        return own, *_read_weights(path)
    raise fail(f"{path} is no weight file: expected .safetensors, {', '.join(PICKLES)}.", "Pass a weight file.")


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix in PICKLES:
        return _named_tensors(path, lightning.read_pickle(path))
    shards = [path]
    if path.name == INDEX:
        placed = _read_json(path).get("weight_map")
        names = sorted({str(name) for name in placed.values()}) if isinstance(placed, dict) else []
        shards = [path.parent / Path(name).name for name in names]  # never outside the folder
    gone = [shard.name for shard in shards if not shard.is_file()]
    if not shards:
        raise fail(f"{path} names no shards.", "Fetch the file again.")
    if gone:
        raise fail(f"{path} names shards that are not there: {', '.join(gone)}.", "Fetch the whole checkpoint.")
    try:
        parts = [load_file(shard) for shard in shards]
    except (SafetensorError, OSError) as error:
        raise fail(f"{path} cannot be read: {error}.", "Fetch the file again.") from None
    return {name: tensor for part in parts for name, tensor in part.items()}, "safetensors"


def _named_tensors(path: Path, state: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise fail(f"{path} holds neither a Lightning checkpoint nor named tensors.", "", entries=list(state)[:3])
    return state, "pickled tensors"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail(f"{path} is not readable JSON: {error}.", "Fetch the file again.") from None
    if not isinstance(value, dict):
        raise fail(f"{path} must hold a JSON object.", "Fetch the file again.", value=value)
    return value
