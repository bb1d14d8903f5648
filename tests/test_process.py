"""What both processes keep: corruption and objective go through the compiler whole, whatever the size of the batch."""

from __future__ import annotations

import pytest
import torch

from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion

V = 11
PROCESSES = pytest.mark.parametrize("process", [MaskedDiffusion(V), UniformDiffusion(V)], ids=["masked", "uniform"])


@PROCESSES
def test_the_objective_compiles_into_one_graph(process):
    torch.compiler.reset()
    clean = torch.randint(V - 1, (4, 8))
    noisy = process.corrupt(clean)
    logits = torch.randn(4, 8, V, requires_grad=True)
    compiled = torch.compile(process.nelbo, fullgraph=True, backend="aot_eager")
    found, expected = (loss(logits, clean, noisy.x_t, noisy.t).mean() for loss in (compiled, process.nelbo))
    assert torch.equal(found, expected)
    grads = (torch.autograd.grad(value, logits)[0] for value in (found, expected))
    assert torch.equal(*grads)


@PROCESSES
def test_corruption_compiles_for_batches_of_any_size(process):
    torch.compiler.reset()
    corrupt = torch.compile(process.corrupt, backend="eager", dynamic=True)
    for rows in (4, 3, 5):
        clean = torch.randint(V - 1, (rows, 8))
        torch.manual_seed(rows)
        found = corrupt(clean)
        torch.manual_seed(rows)
        expected = process.corrupt(clean)
        assert torch.equal(found.x_t, expected.x_t)
        torch.testing.assert_close(found.t, expected.t)
