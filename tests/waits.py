"""Finds where code would wait for an accelerator, without one: meta tensors stand for its tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tokendrift
from tokendrift._operators import IMPLEMENTATIONS

PACKAGE = str(Path(tokendrift.__file__).parent)
_AUTOCAST = torch.autocast
NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray}


class Waits:
    """Note every place in the package that reads an accelerator from the host, or copies to it from plain memory.

    Numbers that are read are 1, and conditions true. As many positions are found as there could be.

    Attributes:
        found: Module and function of each wait.
    """

    def __init__(self) -> None:
        self.found: set[str] = set()
        # Autocast has no meta tensors: switched off for a CPU, it is switched off for them.
        autocast = patch.object(torch, "autocast", lambda device, *a, **k: _AUTOCAST(_spoken(device), *a, **k))
        self._modes = autocast, _Operators(self), _Numbers(self)

    def __enter__(self) -> Waits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self) -> None:
        """Note the function of the package that is running."""
        frame = sys._getframe()
        while frame is not None:
            name = frame.f_code.co_filename
            # Python 3.11 gives comprehensions a frame of their own.
            if name.startswith(PACKAGE) and not frame.f_code.co_name.startswith("<"):
                self.found.add(f"{Path(name).stem}.{frame.f_code.co_name}")
                return
            frame = frame.f_back


class _Operators(TorchDispatchMode):
    """Sees every operator, those inside the operators of the package too."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if func in IMPLEMENTATIONS:
                return IMPLEMENTATIONS[func](*args, **kwargs)
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name = func._overloadpacket
        places = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if name in {aten._to_copy, aten.copy_}:
            source = args[-1] if name is aten.copy_ else args[0]
            target = args[0].device if name is aten.copy_ else kwargs.get("device") or source.device
            if source.device.type == target.type:
                return func(*args, **kwargs)
            self.waits.note()
            dtype = kwargs.get("dtype") or source.dtype
            return args[0] if name is aten.copy_ else torch.ones(source.shape, device=target, dtype=dtype)
        if "meta" not in places:
            return func(*args, **kwargs)
        return self._read(func, name, args, kwargs)

    def _read(self, func: Any, name: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on an accelerator, or say what it would read there."""
        if name in READS:
            self.waits.note()
            return READS[name](*args)
        if name in {aten.index, aten.index_put, aten.index_put_} and _by_mask(args[1]):
            self.waits.note()
            if name is not aten.index:
                return args[0]
            mask = next(index for index in args[1] if index is not None)
            return args[0].new_empty(mask.numel(), *args[0].shape[mask.ndim :])
        return func(*args, **kwargs)


class _Numbers(TorchFunctionMode):
    """Sees tensors that are made of numbers of the host, which are copied."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        of_tensor = getattr(func, "__name__", "") == "new_tensor"
        device = args[0].device if of_tensor else kwargs.get("device")
        if (of_tensor or func in NUMBERS) and device is not None and torch.device(device).type == "meta":
            self.waits.note()
        return func(*args, **kwargs)


def _one(x: Tensor) -> float | int | bool:
    return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1


def _every_position(x: Tensor) -> Tensor:
    return torch.empty(x.numel(), x.ndim, dtype=torch.int64, device="meta")


def _each_once(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.flatten(), x.flatten().long(), x.flatten().long()


aten = torch.ops.aten
READS = {
    aten._local_scalar_dense: _one,
    aten.is_nonzero: lambda x: True,
    aten.equal: lambda x, y: False,
    aten.nonzero: _every_position,
    aten._unique2: _each_once,
}


def _spoken(device: str) -> str:
    return "cpu" if device == "meta" else device


def _by_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
