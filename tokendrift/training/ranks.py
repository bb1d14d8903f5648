"""What processes share: noise that does not depend on how many they are, and what one of them knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokendrift.diffusion import Corruption, Process


class RowsOfRank:
    """A process that corrupts this rank's rows as one process would within the batch of all ranks.

    Times and noise are drawn for all rows, from a generator that is in the same state on every rank, and the own rows
    are kept: numbers are cheap beside a forward call. Everything else is the process's own.

    Args:
        process: The corruption process.
        rank: Number of this rank.
        ranks: How many there are; each has as many rows.
    """

    def __init__(self, process: Process, rank: int, ranks: int) -> None:
        self.process, self.rank, self.ranks = process, rank, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.process, name)

    def corrupt(self, x0: Tensor, *, generator: torch.Generator | None = None) -> Corruption:
        """Draw noisy ids of the own rows (B, L)."""
        if self.ranks == 1:
            return self.process.corrupt(x0, generator=generator)
        own = slice(self.rank * len(x0), (self.rank + 1) * len(x0))
        rows = x0.repeat(self.ranks, 1)  # where the own rows stand, they are; what the others hold does not matter
        drawn = self.process.corrupt(rows, generator=generator)
        fields: dict[str, Any] = {
            name: None if value is None else value[own] for name, value in drawn._asdict().items()
        }
        return Corruption(**fields)


def anywhere(accelerator: Any, here: bool) -> bool:
    """Return whether something holds on any process."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device), "sum"))


def told(accelerator: Any, value: Any) -> Any:
    """Return what the main process has."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
