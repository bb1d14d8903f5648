"""A model wrapped by DDP or FSDP2 trains with the loss as the bare model does in one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import wrapping_worker
from forked import run_ranks

CASES = ["model", "owner", "windows", "head"]
on_cpu = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP2 on the CPU")
WRAPS = ["ddp", pytest.param("fsdp2", marks=on_cpu)]


@pytest.fixture(scope="module")
def ranks():
    """What one process with the bare model found, and what each of two with wrapped models found."""
    single, *pair = run_ranks(wrapping_worker.main, [(0, 1), (0, 2), (1, 2)])
    return single, pair


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_models_have_the_loss_and_gradients_of_the_bare_one(ranks, wrap, case):
    single, pair = ranks[0]["bare", case], [each[wrap, case] for each in ranks[1]]
    for rank in pair:
        for name in ("gradient", "parameters"):
            torch.testing.assert_close(rank[name], single[name], rtol=0, atol=1e-9)
        for queue, expected in zip(rank["queues"], single["queues"], strict=True):
            torch.testing.assert_close(queue, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close((pair[0]["loss"] + pair[1]["loss"]) / 2, single["loss"], rtol=0, atol=1e-9)
    assert (single["gradient"].norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_the_wrapper_does_not_see_the_frozen_encoder(ranks, wrap, case):
    single, (rank, _) = ranks[0]["bare", case], [each[wrap, case] for each in ranks[1]]
    assert rank["frozen"]
    for listed in ("names", "stored"):
        assert sorted(name.replace("module.", "") for name in rank[listed]) == single[listed]
        assert not any("encoder" in name for name in rank[listed])


@pytest.mark.parametrize(
    ("wrap", "message"),
    [("ddp", "inside the wrapper: encoder.module"), pytest.param("fsdp2", "encoder is sharded", marks=on_cpu)],
)
def test_a_wrapped_model_is_refused_as_an_encoder_with_the_way_out(ranks, wrap, message):
    for rank in ranks[1]:
        assert message in rank[wrap, "model"]["error"]
