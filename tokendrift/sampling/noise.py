"""Random numbers of each sample: every sample has its own stream, whatever batch it is in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokendrift._checks import check_count
from tokendrift.models.random_input import random_numbers

WORD = 2**32  # PyTorch's CPU generator reads 32 bits of a seed


def mixed(value: int) -> int:
    """Scramble 32 bits, one to one (the finaliser of MurmurHash3)."""
    value = (value ^ value >> 16) * 0x85EBCA6B % WORD
    value = (value ^ value >> 13) * 0xC2B2AE35 % WORD
    return value ^ value >> 16


def subseed(seed: int, index: int) -> int:
    """Return the seed of the index-th part of a run, 32 bits.

    One to one in the index: up to 2^32 samples of one seed share no stream. Streams of different seeds meet with
    chance 2^-32 for each pair.
    """
    start = mixed(mixed(seed % WORD) ^ seed // WORD % WORD)
    return mixed((start + index) % WORD)


class RowNoise:
    """One CPU generator for each row of a batch: the same numbers on every device and in every split.

    Args:
        seed: Seed of the run.
        first_row: Number of the first row within the run.
        rows: B.
        device: Where the numbers are wanted.
    """

    def __init__(self, seed: int, first_row: int, rows: int, device: torch.device) -> None:
        check_count("seed", seed)
        check_count("first_row", first_row)
        self.seeds = [subseed(seed, row) for row in range(first_row, first_row + rows)]
        self.generators = [torch.Generator().manual_seed(own) for own in self.seeds]
        self.device = device

    def uniform(self, *shape: int) -> Tensor:
        """Return float64 numbers in [0, 1) of shape (B, *shape)."""
        numbers = torch.empty(len(self.generators), *shape, dtype=torch.float64)
        for row, generator in zip(numbers, self.generators, strict=True):
            row.uniform_(generator=generator)
        return numbers.to(self.device)

    def normal(self, step: int, *shape: int) -> Tensor:
        """Return standard normal numbers of shape (B, *shape) that depend on seed, row and step alone.

        They leave the streams of `uniform` where these are.
        """
        generators = (torch.Generator().manual_seed(subseed(own, step)) for own in self.seeds)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)


def random_input(denoiser: object, noise: Callable[[Tensor], RowNoise], ids: Tensor) -> dict[str, Tensor]:
    """Return the keyword arguments of a call that hold the numbers of a random input; none for other denoisers.

    Args:
        denoiser: The network, wrapped or not.
        noise: Returns the streams of the rows of ids; it is called only if the denoiser has a random input.
        ids: What the denoiser is called with, (B, L).
    """
    numbers = random_numbers(denoiser)
    return {"normals": noise(ids).normal(0, ids.shape[1], numbers)} if numbers else {}
