"""Which device is chosen where none is named."""

from __future__ import annotations

import pytest
import torch

from tokendrift import TokenDriftError, devices
from tokendrift.devices import resolve_device


@pytest.mark.parametrize(
    ("cuda", "mps", "needs_float64", "expected"),
    [
        (True, True, False, "cuda"),
        (True, False, True, "cuda"),
        (False, True, False, "mps"),
        (False, True, True, "cpu"),
        (False, False, False, "cpu"),
    ],
)
@pytest.mark.parametrize("device", ["auto", None])
def test_the_fastest_device_that_can_do_the_work_is_chosen(monkeypatch, device, cuda, mps, needs_float64, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device(device, needs_float64=needs_float64) == torch.device(expected)


def test_a_device_by_name_is_kept_and_one_that_cannot_do_the_work_is_refused(monkeypatch):
    assert str(resolve_device("cpu")) == "cpu" and resolve_device(torch.device("cpu")).index is None
    with pytest.raises(TokenDriftError, match="device 'abacus' cannot be used"):
        resolve_device("abacus")
    monkeypatch.setattr(devices, "check_device", torch.device)
    assert str(resolve_device("mps")) == "mps"
    with pytest.raises(TokenDriftError, match="'mps' has no float64"):
        resolve_device("mps", needs_float64=True)
