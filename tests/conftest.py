"""What the tests share: golden fixtures, small backbones, and the hypothesis profiles."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

from tokendrift.diffusion import Process
from tokendrift.models import DiT, DiTConfig

FIXTURES = Path(__file__).parent / "fixtures"

# "fixed" draws the same examples in every run; --hypothesis-profile=explore looks further.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=20, database=None)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the device of the tests that are marked ``cuda``; a CPU, to check these tests themselves."""
    parser.addoption("--cuda-device", default="cuda", help=argparse.SUPPRESS)


gc.disable()  # importing frees little, and the collector would go through what was imported, again and again


def pytest_collection_finish() -> None:
    """Exempt what was imported from the garbage collector; start what forks processes."""
    gc.collect()
    gc.freeze()
    gc.enable()
    if "forked" in sys.modules:
        sys.modules["forked"].start()


def pytest_unconfigure() -> None:
    """End what forks processes."""
    if "forked" in sys.modules:
        sys.modules["forked"].stop()


def pytest_runtest_setup() -> None:
    """Seed the global generator, so that a test draws the same numbers alone, in any order and in any process."""
    torch.manual_seed(0)


class Golden:
    """One fixture file: numbers of the official code, and the tolerance that index.json grants."""

    def __init__(self, name: str) -> None:
        index = json.loads((FIXTURES / "index.json").read_text())
        self.entry = next(entry for entry in index["fixtures"] if entry["name"] == name)
        self.params, self.tolerance = self.entry["params"], self.entry["tolerance"]
        self.data = load_file(FIXTURES / self.entry["file"])

    def __getitem__(self, key: str) -> Tensor:
        return self.data[key]

    def assert_matches(self, actual: Tensor, key: str, *, tolerance: dict[str, float] | None = None) -> None:
        """Assert |actual - golden| <= atol + rtol * |golden| for every element."""
        expected, granted = self.data[key], tolerance or self.tolerance
        actual = actual.detach().reshape(expected.shape) if actual.numel() == expected.numel() == 1 else actual.detach()
        torch.testing.assert_close(
            actual, expected, rtol=granted["rtol"], atol=granted["atol"], check_dtype=True, msg=lambda m: f"{key}: {m}"
        )


@pytest.fixture(scope="session")
def golden():
    """Load a fixture by name."""
    return Golden


def make_dit(*, vocab_size: int = 13, length: int = 8, time_conditioning: bool = False, seed: int = 0) -> DiT:
    """Build a small backbone with random values also where it is initialised to zero."""
    config = DiTConfig(
        vocab_size, length, hidden_dim=16, cond_dim=8, n_blocks=2, n_heads=2, time_conditioning=time_conditioning
    )
    model = DiT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def noised_batch(
    process: Process, seed: int = 0, rows: int = 4, length: int = 6, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random logits (B, L, V) in float64, clean ids without masks, their corruption (B, L), and times (B,)."""
    generator = torch.Generator().manual_seed(seed)
    size, mask = process.vocab_size, process.mask_id
    logits = torch.randn(rows, length, size, generator=generator, dtype=torch.float64) * scale
    clean = torch.randint(size if mask is None else size - 1, (rows, length), generator=generator)
    if mask is not None:
        clean = clean + (clean >= mask)
    t = 0.05 + 0.9 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return logits, clean, process.corrupt(clean, t, generator=generator).x_t, t


@pytest.fixture(scope="session")
def backbone():
    """Build small backbones: ``backbone(vocab_size=..., time_conditioning=...)``."""
    return make_dit


@pytest.fixture
def generator():
    """Return a seeded generator."""
    return torch.Generator().manual_seed(20_260_519)
