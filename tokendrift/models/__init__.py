"""Denoising networks and their checkpoints."""

from tokendrift.models.checkpoints import load_denoiser, save_denoiser
from tokendrift.models.dit import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig", "load_denoiser", "save_denoiser"]
