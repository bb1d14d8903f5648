"""Denoising networks and their checkpoints."""

from tokendrift.models.dit import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig"]
