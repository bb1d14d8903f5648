"""Training checkpoints of the official repositories, read without running any of their code.

A Lightning ``.ckpt`` is a pickle: besides tensors it holds the Hydra configuration and the tokenizer as Python objects.
``torch.load(weights_only=True)`` refuses to make such objects. Here, each class that these checkpoints are known to
contain is replaced by an inert placeholder, so that their contents can be read as plain data. Every other class is
refused. No class or function of the pickle is imported or called.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendrift._checks import fail

PREFIX = "backbone."
BUFFER = "rotary_emb.inv_freq"

# What the configurations, tokenizers and loop states of the official checkpoints are made of.
STAND_IN_PACKAGES = (
    "lightning",
    "lightning_fabric",
    "numpy",
    "omegaconf",
    "pytorch_lightning",
    "tokenizers",
    "torchmetrics",
    "transformers",
)
STAND_IN_NAMES = (
    "collections.defaultdict",
    "pathlib.Path",
    "pathlib.PosixPath",
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
)

ALGORITHMS = {
    "distillation": "DUO",
    "duo": "DUO",
    "duo_base": "DUO",
    "mdlm": "mdlm",
    "subs": "mdlm",
    "didi_instruct": "mdlm",
    "multi-round-sdtt": "mdlm",
}
NETWORKS = ("dit", "hf_dit", "ddit-orig")  # the DiT, as MDLM's and DUO's hub classes hold it, as SDTT calls it
BERT_VOCABULARY, BERT_MASK = 30522, 103  # bert-base-uncased, the LM1B models' tokenizer


class StandIn(dict[Any, Any]):
    """Placeholder for any object of a pickle: keeps the state that it is given, and does nothing."""

    state: Any = None
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __new__(cls, *_: object) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        self.state = state


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a ``.ckpt``, ``.bin``, ``.pt`` or ``.pth`` file as plain data.

    Raises:
        TokenDriftError: If the file is damaged or names a class or function that such checkpoints do not need.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        zipped = True
    except (ValueError, RuntimeError):  # the format before torch 1.6: plain weights at most
        names, zipped = [], False
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    foreign = sorted(
        name for name in names if name not in STAND_IN_NAMES and name.split(".")[0] not in STAND_IN_PACKAGES
    )
    if foreign:
        raise _refused(path, f"it wants to use {', '.join(foreign)}")
    try:
        with torch.serialization.safe_globals([_stand_in(name) for name in names]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise _refused(path, str(error)) from None
    if not isinstance(state, dict):
        raise _refused(path, f"it holds a {type(state).__name__} instead of named tensors")
    return state


def weights(checkpoint: dict[str, Any], *, ema: bool) -> tuple[dict[str, Tensor], str]:
    """Return the backbone's tensors of a Lightning checkpoint by name, and what they are.

    ``ckpt["ema"]["shadow_params"]`` is a list without names, in the order of the backbone's ``parameters()``
    (models/ema.py, filled by diffusion.py and trainer_base.py upstream). ``ckpt["state_dict"]`` was written by
    the same module, so its ``backbone.*`` entries stand in that order too, with the one buffer between them:
    the file's own order gives the names.

    Raises:
        TokenDriftError: If the averaged weights do not match the names.
    """
    stored = {
        name.removeprefix(PREFIX).replace("_orig_mod.", ""): value
        for name, value in _section(checkpoint, "state_dict").items()
        if isinstance(name, str) and name.startswith(PREFIX) and isinstance(value, Tensor)
    }
    if not stored:
        raise fail(
            "the checkpoint's state_dict has no entry that starts with 'backbone.'.",
            "Pass a checkpoint of the MDLM or DUO repository.",
            entries=list(_section(checkpoint, "state_dict"))[:3],
        )
    step = checkpoint.get("global_step", "unknown")
    shadows = _section(checkpoint, "ema").get("shadow_params")
    if not ema or not shadows:
        return stored, f"raw weights of step {step}"
    if not isinstance(shadows, (list, tuple)) or not all(isinstance(shadow, Tensor) for shadow in shadows):
        raise fail("the averaged weights are not a list of tensors.", "Pass ema=False to load the raw weights.")
    names = [name for name in stored if name != BUFFER]
    apart = [
        f"{name} {tuple(stored[name].shape)} against {tuple(shadow.shape)}"
        for name, shadow in zip(names, shadows, strict=False)
        if stored[name].shape != shadow.shape
    ]
    if len(names) != len(shadows) or apart:
        raise fail(
            f"the averaged weights do not match the {len(names)} parameters: {len(shadows)} tensors"
            + "".join(f"\n    {line}" for line in apart),
            "Pass ema=False to load the raw weights.",
        )
    return stored | dict(zip(names, shadows, strict=True)), f"averaged (EMA) weights of step {step}"


def hub_config(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what a Lightning checkpoint's configuration says, see `plain_config`."""
    return plain_config(_section(_plain(checkpoint.get("hyper_parameters")), "config"))


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the Hydra configuration of a run says, under the names of the hub's ``config.json``.

    Fields that it does not hold as plain values are left out.

    Raises:
        TokenDriftError: If it says that the network is not a bidirectional DiT of MDLM or DUO.
    """
    algo, sizes = _section(config, "algo"), _section(config, "model")
    name = algo.get("name", config.get("parameterization"))
    backbone = algo.get("backbone", config.get("backbone", "dit"))
    if isinstance(name, dict):  # SDTT's, whose networks are named beside their sizes
        name, backbone = name.get("name"), sizes.get("type")
    if not config:
        return {}
    if not isinstance(name, str) or name not in ALGORITHMS or backbone not in NETWORKS:
        raise fail(
            f"the checkpoint holds a {backbone!r} network trained as {name!r}; "
            f"supported are 'dit' networks trained as {', '.join(ALGORITHMS)}.",
        )
    found = {
        "model_type": ALGORITHMS[name],
        "model_length": sizes.get("length"),
        "hidden_dim": sizes.get("hidden_size"),
        "cond_dim": sizes.get("cond_dim"),
        "n_blocks": sizes.get("n_blocks"),
        "n_heads": sizes.get("n_heads"),
        "dropout": sizes.get("dropout"),
        "time_conditioning": algo.get("time_conditioning", config.get("time_conditioning")),
        "schedule": _schedule(_section(config, "noise"), duo_repository=bool(algo)),
    }
    if found["model_type"] == "mdlm" and "bert" in str(_section(config, "data").get("tokenizer_name_or_path")):
        found["mask_id"] = BERT_MASK  # its tokenizer has a mask token; otherwise one is added behind the vocabulary
    # A string where a size belongs is an unresolved reference to another field.
    return {
        key: value for key, value in found.items() if key == "model_type" or not isinstance(value, (str, type(None)))
    }


def _stand_in(name: str) -> type[StandIn]:
    """Return an empty class that goes by the full name of another."""
    module, _, own = name.rpartition(".")
    return type(own, (StandIn,), {"__module__": module, "__qualname__": own})


def _schedule(noise: dict[str, Any], *, duo_repository: bool) -> dict[str, Any] | None:
    stated = noise.get("type") or "loglinear"
    kind = str(stated).replace("-", "")
    ends = {name: noise[name] for name in ("sigma_min", "sigma_max") if isinstance(noise.get(name), (int, float))}
    if kind == "cosine" and duo_repository:
        return {"name": "DuoCosine"}
    schedules: dict[str, dict[str, Any] | None] = {
        "loglinear": None,
        "cosine": {"name": "Cosine"},
        "cosinesqr": {"name": "Cosine", "power": 2},
        "linear": {"name": "Linear", **ends},
        "geometric": {"name": "Geometric", **ends},
    }
    return schedules.get(kind, {"name": stated})  # one that is not known is refused when the process is built


def _section(config: Any, name: str) -> dict[str, Any]:
    """Return a part of a configuration, empty where there is none or it is a reference to another."""
    found = config.get(name) if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    """Turn stand-ins of OmegaConf's containers and nodes into dicts, lists and values."""
    if isinstance(value, StandIn):
        state = value.state if isinstance(value.state, dict) else {}
        return _plain(state.get("_content", state.get("_val")))
    if isinstance(value, dict):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _refused(path: Path, reason: str) -> Exception:
    return fail(
        f"{path} is not loaded: {reason.strip().splitlines()[0]}.",
        "Only tensors and plain data are read from pickles, since a pickle can run any code. Convert the file to "
        "safetensors where you trust it.",
    )
