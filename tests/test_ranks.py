"""Two processes give what one process gives: loss, gradients and queues, for batches of equal and unequal size."""

from __future__ import annotations

import pytest
import rank_worker
import torch
from forked import run_ranks

from tokendrift import TokenDriftError
from tokendrift.references import gather

LOSSES = ["joint", "two_sided", "sinkhorn", "no_pair", "windows", "mirror"]
SPLITS = ["even", "uneven", "one"]


@pytest.fixture(scope="module")
def ranks():
    """What one process found, and what each of two found."""
    single, *pair = run_ranks(rank_worker.main, [(0, 1), (0, 2), (1, 2)])
    return single, pair


@pytest.mark.parametrize("case", SPLITS)
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_train_like_one(ranks, name, case):
    single, pair = ranks[0][name, case], [each[name, case] for each in ranks[1]]
    for rank in pair:  # DDP has averaged the gradients
        torch.testing.assert_close(rank["gradient"], single["gradient"], rtol=0, atol=1e-10)
        torch.testing.assert_close(rank["rms"], single["rms"], rtol=0, atol=1e-10)
    torch.testing.assert_close((pair[0]["loss"] + pair[1]["loss"]) / 2, single["loss"], rtol=0, atol=1e-10)
    assert (single["gradient"].norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("case", SPLITS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_queues_are_the_same_on_every_rank(ranks, name, case):
    single, pair = ranks[0][name, case], [each[name, case] for each in ranks[1]]
    for queue in ("real", "generated"):
        assert len(single[queue]) == 8
        assert torch.equal(pair[0][queue], pair[1][queue])
        torch.testing.assert_close(pair[0][queue], single[queue], rtol=0, atol=1e-10)


def test_ranks_that_do_not_gather_keep_to_themselves(ranks):
    single, pair = ranks[0]["joint", "uneven"], [each["alone"] for each in ranks[1]]
    assert not torch.equal(pair[0]["real"], pair[1]["real"])
    assert (pair[0]["gradient"] - single["gradient"]).abs().max() > 1e-3


@pytest.mark.parametrize("counts", [(2, 2), (3, 1), (0, 2)])
def test_gathered_features_stand_in_the_order_of_the_ranks(ranks, counts):
    for rank, found in enumerate(ranks[1]):
        features, offset = found["gather", counts]
        assert torch.equal(features, torch.arange(sum(counts)).float()[:, None].expand(-1, 2))
        assert not features.requires_grad
        assert offset == sum(counts[:rank])


@pytest.mark.parametrize("kind", ["width", "dtype"])
def test_ranks_that_disagree_all_hear_of_it(ranks, kind):
    for found in ranks[1]:
        assert "features differ between ranks: widths M [2, " in found["error", kind]
        assert "same feature map in the same precision" in found["error", kind]


def test_an_error_on_one_rank_is_one_on_all_and_a_skipped_batch_leaves_them_in_step(ranks):
    (first, queues), (second, others) = (each["failures"] for each in ranks[1])
    own = ["logits contain NaN", "clean_ids has ids from", "logits is empty"]
    for said, heard, part in zip(first, second, own, strict=False):
        assert part in said
        assert "rank 0 could not compute its features" in heard
    assert first[3] == second[3] >= 0
    assert torch.equal(queues, others) and len(queues) == 4  # the good batch of both, once
    assert all("ranks are at different calls of the loss: [5, 6]" in said[4] for said in (first, second))


def test_alone_the_features_come_back_as_they_are():
    features = torch.ones(2, 3, requires_grad=True)
    gathered, offset = gather(features)
    assert gathered.data_ptr() == features.data_ptr()
    assert not gathered.requires_grad
    assert offset == 0


@pytest.mark.parametrize("features", [torch.zeros(3), [1.0]])
def test_what_is_no_cloud_is_not_gathered(features):
    with pytest.raises(TokenDriftError, match=r"features must be a tensor of shape \(K, M\)"):
        gather(features)
