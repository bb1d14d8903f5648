"""Checkpoints in the layout of the released models: ``config.json`` beside ``model.safetensors``.

Tensors carry the prefix ``backbone.``, as those of `kuleshov-group/mdlm-owt` and `s-sahoo/duo` do.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendrift._checks import fail
from tokendrift.diffusion import MaskedDiffusion, Process, UniformDiffusion
from tokendrift.models.dit import DiT, DiTConfig

PREFIX = "backbone."
MODEL_TYPES = {"mdlm": "masked", "duo": "uniform"}  # config.json writes "DUO" in capitals


def save_denoiser(model: DiT, folder: str | Path, process: Process, *, dtype: torch.dtype | None = None) -> None:
    """Write a model as a folder that `load_denoiser` and the hub's layout share.

    Args:
        model: The network.
        folder: Made if missing; files in it appear whole or not at all.
        process: Masked (written as model_type ``mdlm``) or uniform (``DUO``).
        dtype: Stored dtype; that of the parameters by default.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = dataclasses.asdict(model.config)
    config["model_type"] = "mdlm" if isinstance(process, MaskedDiffusion) else "DUO"
    config["mask_id"] = process.mask_id
    tensors = {PREFIX + name: _stored(tensor, dtype) for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        save_file(tensors, Path(place) / "model.safetensors", metadata={"format": "pt"})
        (Path(place) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in ("model.safetensors", "config.json"):
            (Path(place) / name).replace(folder / name)


def load_denoiser(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[DiT, Process]:
    """Read a model folder.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        dtype: Dtype of the parameters.
        device: Where they go.

    Returns:
        The network in evaluation mode and its process.

    Raises:
        TokenDriftError: If a file is missing, the model type is unknown, or tensors are missing, left over or
            of the wrong shape; all of them are listed.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise fail(f"{folder} has no {name}.", "Pass a folder with config.json and model.safetensors.")
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = MODEL_TYPES.get(str(raw.get("model_type")).lower())
    if kind is None:
        raise fail("config.json must have model_type mdlm or DUO.", model_type=raw.get("model_type"))
    known = {field.name for field in dataclasses.fields(DiTConfig)}
    config = DiTConfig(**{name: value for name, value in raw.items() if name in known})
    model = DiT(config)
    stored = load_file(folder / "model.safetensors")
    _load(model, {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()})
    vocab = config.vocab_size
    process = MaskedDiffusion(vocab, raw.get("mask_id")) if kind == "masked" else UniformDiffusion(vocab)
    return model.to(device=device, dtype=dtype).eval(), process


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()


def _load(model: DiT, tensors: dict[str, Tensor]) -> None:
    expected = model.state_dict()
    problems = [f"missing {name} {tuple(expected[name].shape)}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected {name} {tuple(tensors[name].shape)}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        if expected[name].shape != tensors[name].shape:
            problems.append(f"{name} has {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}")
    if problems:
        raise fail(
            "the checkpoint does not fit its config:\n    " + "\n    ".join(sorted(problems)),
            "Check hidden_dim, n_blocks, cond_dim and vocab_size in config.json.",
        )
    model.load_state_dict(tensors)
