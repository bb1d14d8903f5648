"""What sampling leaves alone and does not hold: the network's logits, wide copies of them, graphs, half-done state."""

from __future__ import annotations

import pytest
import torch
from sampling_laws import PROCESSES, Table, V
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.sampling import Psi, chain, sample

EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


@EVERY_PROCESS
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"noise_removal": "greedy"}])
def test_the_logits_of_the_network_are_not_written_to(process, options):
    kept = torch.randn(2, 5, V)
    before = kept.clone()
    sample(lambda x, sigma: kept[: len(x)], process, (2, 5), steps=3, seed=0, **options)
    assert torch.equal(kept, before)


@EVERY_PROCESS
def test_half_precision_logits_are_sampled_in_float32(process):
    table = (torch.randn(2, 5, V) * 3).bfloat16()
    half, full = (
        sample(lambda x, sigma, t=t: t[: len(x)], process, (2, 5), steps=3, seed=0).ids for t in (table, table.float())
    )
    assert torch.equal(half, full)


class Largest(TorchDispatchMode):
    """Note the largest tensor of each dtype that an operator makes."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements[leaf.dtype] = max(self.elements.get(leaf.dtype, 0), size)
        return out


@pytest.mark.parametrize("kind", [MaskedDiffusion, UniformDiffusion])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50}, {"sampler": Psi(middle="pure-pc")}]
)
def test_no_wide_copy_of_all_logits_is_made(monkeypatch, kind, dtype, options):
    rows, length, vocab = 4, 32, 2000
    monkeypatch.setattr(chain, "CPU_ELEMENTS", 8 * vocab)
    table = torch.randn(rows, length, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    with Largest() as largest:
        sample(lambda x, sigma: table[: len(x)], kind(vocab), (rows, length), steps=2, seed=0, **options)
    float64 = largest.elements[torch.float64]
    assert float64 <= 8 * vocab * 1.01 < rows * length * vocab / 10
    if dtype == torch.bfloat16:
        assert largest.elements[torch.float32] <= 8 * vocab
    else:
        assert largest.elements[torch.float32] == rows * length * vocab  # a view of what the network returned


@EVERY_PROCESS
def test_a_backbone_is_sampled_without_graph(backbone, process):
    model = backbone(vocab_size=V, time_conditioning=process.mask_id is None)
    found = sample(model, process, (2, 8), steps=2, seed=0)
    assert 0 <= found.ids.min() <= found.ids.max() < V
    assert all(parameter.grad is None for parameter in model.parameters())


@EVERY_PROCESS
def test_interruption_leaves_nothing_behind(process):
    """Ctrl-C in the middle of a run: the same call afterwards gives what it would have given."""
    calls, denoiser = 0, Table(5)

    def interrupted(x_t, sigma):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return denoiser(x_t, sigma)

    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        sample(interrupted, process, (8, 5), steps=4, seed=0)
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    again, clean = (sample(d, process, (8, 5), steps=4, seed=0).ids for d in (interrupted, denoiser))
    assert torch.equal(again, clean)
