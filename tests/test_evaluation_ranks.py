"""Two processes that score some of the samples each give what one process gives for all."""

from __future__ import annotations

import evaluation_rank_worker as worker
import pytest
import torch
from forked import run_ranks

from tokendrift.evaluation import GenerativePerplexity


@pytest.fixture(scope="module")
def ranks():
    """What each of two processes found."""
    return run_ranks(worker.main, [(0, 2), (1, 2)])


@pytest.mark.parametrize("split", worker.SPLITS)
@pytest.mark.parametrize("protocol", ["mdlm", "sedd", "sdtt", "bd3", "all"])
def test_two_processes_score_like_one(ranks, protocol, split):
    single = GenerativePerplexity(worker.judge, protocol=protocol, eos_id=0).score(worker.samples())
    for found in (rank[split, protocol] for rank in ranks):
        assert found.perplexity == pytest.approx(single.perplexity, rel=1e-14)
        torch.testing.assert_close(found.sample_nll, single.sample_nll, rtol=1e-14, atol=0)  # in the order of the ranks
        assert torch.equal(found.sample_tokens, single.sample_tokens)
        assert (found.samples, found.protocol, found.precision) == (6, protocol, "float64")


def test_both_ranks_hear_of_what_cannot_be_computed(ranks):
    for found in ranks:
        assert "there are no samples to compute a result from" in found["nothing"]
        assert "the ranks used different options: all in float64, sdtt in float64" in found["protocols"]
        assert "the ranks used different options: all in float32, all in float64" in found["precisions"]
