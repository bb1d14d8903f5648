"""Reference features that outlive their batch: first-in-first-out queues."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tokendrift._checks import check_count, check_tensor, fail


class FeatureQueue(nn.Module):
    """A first-in-first-out queue of detached features; part of ``state_dict``.

    Args:
        capacity: Most features kept; 0 keeps none.
        width: M, the feature width. Lazy when omitted: set by the first push or by ``load_state_dict``.
    """

    buffer: Tensor
    pushed: Tensor

    def __init__(self, capacity: int, width: int | None = None) -> None:
        super().__init__()
        _keep_eager()
        self.capacity = check_count("capacity", capacity)
        self.register_buffer("buffer", torch.zeros(capacity, width or 0))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self._pushed = 0  # host copy of `pushed`, so that reading the fill never waits for the device

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    def features(self) -> Tensor:
        """Return the features, oldest first, (len(self), M)."""
        if self._pushed <= self.capacity:
            return self.buffer[: self._pushed]
        return self.buffer.roll(-(self._pushed % self.capacity), dims=0)

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Append detached features (K, M); the oldest make room.

        Raises:
            TokenDriftError: If the width differs from that of the features already kept.
        """
        check_tensor("features", features, ("K", "M"))
        if self.capacity == 0:
            return
        if self.buffer.shape[1] == 0:
            dtype = torch.promote_types(features.dtype, torch.float32)
            self.buffer = features.new_zeros(self.capacity, features.shape[1], dtype=dtype)
        if features.shape[1] != self.buffer.shape[1]:
            raise fail(
                f"features has width M = {features.shape[1]} but the queue holds M = {self.buffer.shape[1]}.",
                "One queue belongs to one feature map: build a new loss for a new one.",
                features=features,
            )
        kept = features.detach()[-self.capacity :]
        first = self._pushed + len(features) - len(kept)
        slots = torch.arange(first, first + len(kept), device=self.buffer.device) % self.capacity
        self.buffer.index_copy_(0, slots, kept.to(self.buffer.dtype))
        self._pushed += len(features)
        self.pushed.fill_(self._pushed)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "buffer")
        if stored is not None:
            if len(stored) != self.capacity:
                raise fail(
                    f"the stored queue has room for {len(stored)} features but this one for {self.capacity}.",
                    f"Build the loss with queue_size={len(stored)}.",
                )
            if stored.shape[1] != self.buffer.shape[1]:
                self.buffer = self.buffer.new_zeros(stored.shape, dtype=stored.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._pushed = int(self.pushed)


@functools.cache
def _keep_eager() -> None:
    """Keep the methods that count on the host out of compiled graphs, which would be rebuilt at every push.

    Done at the first construction: as decorators they would import the compiler with the package.
    """
    for name in ("features", "push"):
        setattr(FeatureQueue, name, torch.compiler.disable(getattr(FeatureQueue, name)))
