"""The moving average of the weights, which is the model that is evaluated and written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """An exponential moving average of parameters, kept beside them.

    Args:
        parameters: The parameters to average.
        decay: Share that the average keeps at each step; step n uses (1 + n) / (10 + n) while that is less. 0 keeps no
            average.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in self.parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after a step in the average; steps are numbered from 0."""
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def take(self) -> None:
        """Set the average to the present parameters."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.copy_(parameter)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average exactly."""
        for parameter, value in zip(self.parameters, self.values, strict=False):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the parameters have their averaged values inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
