"""The table of checkpoint formats: weight files, and folders in the layout of the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tokendrift._checks import fail
from tokendrift.files import readable
from tokendrift.models import lightning

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FETCH = "Fetch the file again."
FOLDER_WEIGHTS = (WEIGHTS, INDEX, "pytorch_model.bin")  # the first that a folder has is read


class WeightFile(NamedTuple):
    """What a weight file holds.

    Attributes:
        tensors: Weights by their stored names.
        label: Description of the weights, such as ``"safetensors"``.
        config: Configuration of the network that the file contains, with the field names of ``config.json``; may be
            empty.
    """

    tensors: dict[str, Tensor]
    label: str
    config: dict[str, Any]


def read_weights(path: Path, *, ema: bool) -> WeightFile:
    """Read a folder or a weight file. If the file has no configuration, the ``config.json`` in its folder is read.

    Args:
        path: A folder with ``config.json`` and weights, or a weight file whose name ends as one of `FORMATS`.
        ema: Whether averaged weights are preferred where the file has both.

    Raises:
        TokenDriftError: If a file is missing, unreadable or of no format of the table.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        expected = f"Pass a folder with {CONFIG} and {WEIGHTS}, or a weight file."
        if not (folder / CONFIG).is_file():
            raise fail(f"{folder} has no {CONFIG}.", expected)
        names = [name for name in FOLDER_WEIGHTS if (folder / name).is_file()]
        if not names:
            raise fail(f"{folder} has no {WEIGHTS}.", expected)
        path = folder / names[0]
    reader = next((reader for ending, reader in FORMATS.items() if path.name.endswith(ending)), None)
    if reader is None:
        raise fail(
            f"{path} is not a weight file; its name must end with one of {', '.join(FORMATS)}.", "Pass a weight file."
        )
    with readable(path, FETCH, what="checkpoint"):
        found = reader(path, ema)
    if found.config or not (folder / CONFIG).is_file():
        return found
    config = read_json(folder / CONFIG)
    if isinstance(config.get("model"), dict):  # the configuration of a training run, as SDTT's students have it
        config = lightning.plain_config(config)
    return found._replace(config=config)


def _read_safetensors(path: Path, ema: bool) -> WeightFile:
    from safetensors.torch import load_file

    with readable(path, FETCH, what="checkpoint"):  # the shard rather than the index
        return WeightFile(load_file(path), "safetensors", {})


def _read_shards(path: Path, ema: bool) -> WeightFile:
    placed = read_json(path).get("weight_map")
    names = sorted({str(name) for name in placed.values()}) if isinstance(placed, dict) else []
    shards = [path.parent / Path(name).name for name in names]  # never outside the folder
    if not shards:
        raise fail(f"{path} does not list any shards.", FETCH)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise fail(f"{path} lists shards that do not exist: {', '.join(missing)}.", "Fetch the whole checkpoint.")
    parts = [_read_safetensors(shard, ema).tensors for shard in shards]
    return WeightFile({name: tensor for part in parts for name, tensor in part.items()}, "safetensors", {})


def _read_pickle(path: Path, ema: bool) -> WeightFile:
    state = lightning.read_pickle(path)
    if "state_dict" in state:
        config = lightning.hub_config(state)
        return WeightFile(*lightning.weights(state, ema=ema), config)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise fail(f"{path} holds neither a Lightning checkpoint nor named tensors.", "", entries=list(state)[:3])
    return WeightFile(state, "pickled tensors", {})


FORMATS: dict[str, Callable[[Path, bool], WeightFile]] = {
    ".safetensors": _read_safetensors,
    ".ckpt": _read_pickle,
    ".bin": _read_pickle,
    ".pt": _read_pickle,
    ".pth": _read_pickle,
    ".safetensors.index.json": _read_shards,
}
"""Readers by the ending of a file's name. A reader takes the path, and whether averaged (EMA) weights are preferred."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        TokenDriftError: If it cannot be read, or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise fail(f"{path} is not readable JSON: {error}.", FETCH) from None
    if not isinstance(value, dict):
        raise fail(f"{path} must hold a JSON object.", FETCH, value=value)
    return value
