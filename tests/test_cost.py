"""Counted floating-point operations of a function evaluation, and where they are reported."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.evaluation import GenerativePerplexity, measure
from tokendrift.evaluation.sample_reader import read_samples
from tokendrift.sampling import SamplingSetting, denoiser_samples
from tokendrift.sampling.cost import flops_per_evaluation

L, D, V = 8, 16, 13


class OneProduct(nn.Module):
    """An embedding and a linear head: 2 L D V operations."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)

    def forward(self, x_t, sigma=None):
        return self.head(self.embed(x_t))


class WithAttention(OneProduct):
    """The same with attention of two heads without projections: 4 L L D operations more."""

    def forward(self, x_t, sigma=None):
        heads = self.embed(x_t).unflatten(-1, (2, D // 2)).transpose(1, 2)
        return self.head(nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("process", [MaskedDiffusion(V), UniformDiffusion(V)], ids=["masked", "uniform"])
def test_products_and_attention_are_counted_and_nothing_else(process):
    assert flops_per_evaluation(OneProduct(), process, L) == 2 * L * D * V
    assert flops_per_evaluation(WithAttention(), process, L) == 2 * L * D * V + 4 * L * L * D


def test_a_set_in_memory_costs_its_mean_number_of_evaluations():
    torch.manual_seed(0)
    draw = denoiser_samples(OneProduct(), MaskedDiffusion(V), L)
    drawn = draw(SamplingSetting(16), 32)
    per_evaluation = 2 * L * D * V
    assert per_evaluation < drawn.flops < drawn.nfe * per_evaluation  # rows without a change skip a call
    assert draw(SamplingSetting(1), 2).flops == per_evaluation
    judge = GenerativePerplexity(lambda ids, attention_mask: torch.zeros(*ids.shape, V), protocol="all")
    found = measure(drawn, judge)
    assert found.flops == drawn.flops == found.summary()["flops"]


@pytest.mark.parametrize("stated", ["much", -1.0, True, None, [1], float("nan")])
def test_a_header_that_states_no_number_has_none(tmp_path, stated):
    path = tmp_path / "samples.jsonl"
    lines = [{"tokendrift": {"flops": stated}}, {"ids": [1, 2, 3], "nfe": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_samples(path).flops is None
