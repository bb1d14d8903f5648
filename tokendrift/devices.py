"""Which device to compute on."""

from __future__ import annotations

import torch

from tokendrift._checks import check_device, fail


def resolve_device(device: torch.device | str | None = "auto", *, needs_float64: bool = False) -> torch.device:
    """Return the device that a name stands for.

    Args:
        device: ``"auto"`` or None for CUDA if it is available, else MPS, else the CPU; or a device such as ``"cpu"``
            or ``"cuda:0"``, which is returned as it is.
        needs_float64: Whether the computation needs float64, which MPS does not have. ``"auto"`` then does not
            choose MPS.

    Raises:
        TokenDriftError: If this machine does not have the device, or it lacks float64 where that is needed.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() and not needs_float64 else "cpu")
    if check_device(device).type == "mps" and needs_float64:
        raise fail("device 'mps' has no float64, which this computation needs.", "Pass device='cpu'.")
    return torch.device(device)
