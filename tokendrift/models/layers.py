"""Layers of the MDLM / DUO backbone: norm, embedding, rotary positions, and the conditioning on sigma."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256  # width of the sinusoidal embedding of sigma, fixed upstream


class LayerNorm(nn.Module):
    """Layer norm in float32 (or float64) with a weight and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            return F.layer_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype))


class Embedding(nn.Module):
    """Token embedding: a look-up of ids (B, L), or what a function makes of the matrix (V, D)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, ids: Tensor, embed: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return F.embedding(ids, self.embedding) if embed is None else embed(self.embedding)


def rotary_frequencies(head_dim: int) -> Tensor:
    """Return the angle per position of each pair of channels, float32 (head_dim / 2,), as upstream computes it."""
    return 1.0 / (10_000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim))


class Rotary(nn.Module):
    """Rotary positions in the half-split form, base 10000, always in float32 or wider.

    bfloat16 represents integers exactly only up to 256: in a model converted to it, later positions would coincide.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotary_frequencies(head_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        before = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.inv_freq.dtype.itemsize < 4:
            self.inv_freq = before.to(self.inv_freq.device)
        return self

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(length, device=self.inv_freq.device, dtype=self.inv_freq.dtype), self.inv_freq)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (c, c + half) of (B, H, L, C) by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class SigmaMap(nn.Module):
    """Conditioning vector (B, C) from sigma (B,): sinusoids, then a two-layer network."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        steps = torch.arange(half, device=sigma.device, dtype=torch.float32) / half
        angle = sigma[:, None] * torch.exp(-math.log(10_000.0) * steps).to(sigma.dtype)
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return F.silu(self.mlp(waves.to(next(self.parameters()).dtype)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply adaptive shift and scale (B, 1, D) to (B, L, D)."""
    return torch.addcmul(shift, x, 1 + scale)
