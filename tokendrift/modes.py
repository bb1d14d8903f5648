"""Modes for a block of code: without gradient, evaluation mode, and autocast off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def without_gradient() -> Iterator[None]:
    """Run a block without gradient, from which an autocast block around it keeps nothing.

    Autocast keeps the weights that it has converted for later calls. In older versions of PyTorch (2.6 is one), those
    that it has converted without gradient are among them, and a later call with gradient would not train them.
    """
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Run a block with a model in evaluation mode and without gradient.

    Every submodule gets back the mode that it had, so a model that is partly frozen stays so. A model that is no
    ``nn.Module``, such as a function, has no mode, and only gradients are switched off.

    ``torch.no_grad`` is used rather than inference mode, in which a model might cache tensors that training cannot use.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with without_gradient():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a block in which autocast is off, on a device that has none too."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
