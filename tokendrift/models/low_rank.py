"""Low-rank adapters: a trainable copy of a frozen model that shares its weights."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendrift._checks import check_count, fail

__all__ = ["LowRankLinear", "low_rank_copy"]

Model = TypeVar("Model", bound=nn.Module)


class LowRankLinear(nn.Linear):
    r"""A linear layer with frozen weights and a trainable product of rank r beside them.

    .. math:: y = W x + b + U (D x)

    U starts at zero, so that the layer starts as the frozen one. D and U are float32 or wider. A loss that is handed
    the weight itself, as a `DiT` does with its ``head``, does not see the product.

    Args:
        linear: The frozen layer; its parameters are shared, not copied.
        rank: r, at least 1.
        generator: Source of the entries of D, on the CPU.

    Source: LoRA (arXiv 2106.09685), section 4.1, with alpha = r.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        down = torch.randn(rank, self.in_features, generator=generator, dtype=dtype) / self.in_features**0.5
        self.down = nn.Parameter(down.to(self.weight.device))
        self.up = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=self.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        frozen = F.linear(input, self.weight, self.bias)
        return frozen + F.linear(F.linear(input.to(self.down.dtype), self.down), self.up).to(frozen.dtype)


def low_rank_copy(model: Model, rank: int, *, seed: int = 0) -> Model:
    """Return a copy of a frozen model whose linear layers have trainable low-rank adapters.

    The copy shares all weights and buffers of the model. Its own are the adapters, r (inputs + outputs) numbers
    a layer, and only they require gradients: an optimiser keeps moments for them alone.

    Args:
        model: A frozen network with at least one ``nn.Linear``.
        rank: r of every adapter, at least 1.
        seed: Seed of the adapters' first values, the same on every process. Default: 0.

    Raises:
        TokenDriftError: If a parameter of the model requires gradients, or there is no linear layer.

    >>> model = nn.Sequential(nn.Linear(4, 3)).requires_grad_(False)
    >>> adapted = low_rank_copy(model, 2)
    >>> adapted[0].weight is model[0].weight, sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    (True, 14)
    """
    check_count("rank", rank, least=1)
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise fail("model must be frozen: the copy shares its weights.", "Call model.requires_grad_(False) first.")
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    copied = copy.deepcopy(model, shared)
    generator = torch.Generator().manual_seed(seed)
    layers = [
        (parent, name, layer)
        for parent in list(copied.modules())
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
    ]
    if not layers:
        raise fail("model has no nn.Linear layer to adapt.", "Train a full copy of it instead.")
    for parent, name, layer in layers:
        setattr(parent, name, LowRankLinear(layer, rank, generator))
    return copied
