"""No loss waits for an accelerator, except where the number of chosen positions decides the sizes of what follows."""

from __future__ import annotations

import pytest
import torch
from equality import cases
from waits import Waits

from tokendrift import PairDriftLoss
from tokendrift._checks import looks_like_probabilities
from tokendrift.loss import token_entropy
from tokendrift.training.objectives.own_chains import pair_logs

CASES = cases()
PREDICTED = {"lift._predicted_rows"}
LONG = ("drift, two-sided", "drift, Sinkhorn")  # the same loss with other fields
WAITS = {
    "drift, masked": PREDICTED,
    "drift, straight through": PREDICTED,
    "mirror teacher": PREDICTED,
    "drift, Laplace kernel": {"kernels.squared_distances"},
    "NELBO, masked": {"process.nll"},
    "cross-entropy": {"process.nll"},
    "matching, log_ratio": {"distribution_matching.distribution_matching_loss"},
    "matching, bounded": {"distribution_matching.distribution_matching_loss"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in CASES]
)
def test_a_loss_and_its_gradient_wait_for_an_accelerator_only_to_count_positions(name):
    with Waits():
        run = CASES[name](torch.device("meta"), torch.float32)
    with Waits() as waits:
        run()
    assert waits.found == WAITS.get(name, set())


def test_reads_of_the_host_are_found():
    logits, some = torch.zeros(1, 2, 3, device="meta"), torch.ones(1, 2, dtype=torch.bool, device="meta")
    pairs = PairDriftLoss(3).to("meta")
    with Waits() as waits:
        token_entropy(logits, some)
        looks_like_probabilities(logits)
        pair_logs(pairs)
    places = {"_diagnostics.token_entropy", "_checks.looks_like_probabilities", "own_chains.pair_logs"}
    assert waits.found == places
