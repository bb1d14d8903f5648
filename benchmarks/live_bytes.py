"""Exact peak bytes and products of a computation, counted on meta tensors: no data, no clock, the same everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tokendrift._operators import IMPLEMENTATIONS  # of the operators whose inside counts

PRODUCTS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


class LiveBytes(TorchDispatchMode):
    """Follow every storage that is made inside the context, from its operator to its end.

    What existed before, the inputs, does not count. Nor does what one operator of PyTorch allocates and frees within.

    Attributes:
        peak: Most bytes that were alive after any operator.
        flops: Floating-point operations of matrix products, two for each multiplication and addition.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or the kernel of one of ours, and note what it made."""
        kwargs = kwargs or {}
        with self:
            if func in IMPLEMENTATIONS:
                return IMPLEMENTATIONS[func](*args, **kwargs)
            parts = func.decompose(*args, **kwargs)  # matmul, linear and their like are made of others
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if func._overloadpacket in PRODUCTS:
            self.flops += PRODUCTS[func._overloadpacket](*args, **kwargs, out_val=out)
        given = {_key(leaf) for leaf in _tensors((args, kwargs))}
        made = [leaf for leaf in _tensors(out) if _key(leaf) not in given]
        if made:  # else there is no new peak
            self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
            for storage in (leaf.untyped_storage() for leaf in made):
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operator, which come in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for each in value for tensor in _tensors(each)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
