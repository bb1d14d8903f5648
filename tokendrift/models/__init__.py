"""Denoising networks: the backbone of MDLM and DUO, its checkpoints, and adapters for networks from other libraries."""

from tokendrift.models.adapters import MaskedLMDenoiser, OfficialDenoiser
from tokendrift.models.checkpoints import (
    Checkpoint,
    LoadedDenoiser,
    build,
    checkpoint_fields,
    load_denoiser,
    process_of,
    read_checkpoint,
    save_denoiser,
)
from tokendrift.models.dit import DiT, DiTConfig

__all__ = [
    "Checkpoint",
    "DiT",
    "DiTConfig",
    "LoadedDenoiser",
    "MaskedLMDenoiser",
    "OfficialDenoiser",
    "build",
    "checkpoint_fields",
    "load_denoiser",
    "process_of",
    "read_checkpoint",
    "save_denoiser",
]
