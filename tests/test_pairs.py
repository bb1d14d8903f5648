"""The drift of token pairs: its law, what it counts, and that the lift makes no error in it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from torch.utils.checkpoint import checkpoint

from tokendrift import PairDriftLoss, TokenDriftError
from tokendrift.pairs import frequent_first_classes, pair_drift

WORKER = Path(__file__).with_name("pair_rank_worker.py")
IDS = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laws(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 5, 5, generator=generator, dtype=torch.float64).div(12).unbind()


@given(st.integers(0, 1000), st.floats(0, 1))
def test_the_drift_changes_its_sign_when_real_and_generated_change_places(seed, eps):
    p, q = laws(seed)
    assert torch.equal(pair_drift(p, q, eps), -pair_drift(q, p, eps))
    assert (pair_drift(p, p, eps) == 0).all()
    assert (pair_drift(p, q, eps).abs() <= 1).all()


def test_there_is_no_drift_where_there_is_nothing():
    nothing = torch.zeros(2, 2)
    assert (pair_drift(nothing, nothing, 0.0) == 0).all()


def test_the_generated_law_is_that_of_tokens_drawn_independently():
    """By enumeration of all sequences: products over positions commute with the draw, features of a network do not."""
    logits = random_logits(1, 3, 3)
    p = logits.softmax(-1)[0]
    expected = torch.zeros(2, 3, 3, dtype=torch.float64)
    for sequence in itertools.product(range(3), repeat=3):
        chance = p[range(3), sequence].prod()
        for a, b in itertools.pairwise(sequence):
            expected[0, a, b] += chance / 2
        expected[1, sequence[0], sequence[2]] += chance
    loss = PairDriftLoss(3, lags=(1, 2)).double()
    loss(logits, IDS[:1, :3])
    torch.testing.assert_close(loss.generated[0], expected)


def test_real_pairs_are_counted_over_all_calls():
    loss = PairDriftLoss(3)
    loss.observe(IDS[:1])
    loss.observe(IDS[1:])
    counts = torch.zeros(3, 3)
    for row in IDS.tolist():
        for a, b in itertools.pairwise(row):
            counts[a, b] += 1
    torch.testing.assert_close(loss.real[0], counts / 6)
    other = PairDriftLoss(3)
    other.observe(IDS)
    torch.testing.assert_close(other.real, loss.real)


def test_a_call_weighs_by_its_pairs_padding_apart():
    loss = PairDriftLoss(3, lags=(1, 2))
    loss.observe(IDS, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool())
    loss.observe(torch.tensor([[0, 0]]).repeat(2, 2))
    assert loss.real_weight.tolist() == [10, 6]
    torch.testing.assert_close(loss.real[:, 0, 0], torch.tensor([6 / 10, 4 / 6]))


def test_visible_tokens_stand_for_themselves_and_the_mask_has_no_probability():
    loss = PairDriftLoss(4, mask_id=3)
    noisy = torch.tensor([[0, 3, 2]])
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    loss(logits, torch.tensor([[0, 1, 2]]), noisy_ids=noisy).backward()
    third = 1 / 6
    expected = torch.zeros(4, 4)
    expected[0, :3] = third
    expected[:3, 2] += third
    torch.testing.assert_close(loss.generated[0, 0], expected)
    assert (logits.grad[:, [0, 2]] == 0).all() and (logits.grad[:, 1, 3] == 0).all()
    assert logits.grad[:, 1, :3].abs().sum() > 0


def test_the_gradient_is_that_of_the_pairs_under_a_fixed_drift():
    loss = PairDriftLoss(3).double()
    loss(random_logits(2, 4, 3, seed=1), IDS)
    before = loss.generated[0, 0].clone()
    logits = random_logits(2, 4, 3, seed=2).requires_grad_()
    (found,) = torch.autograd.grad(loss(logits, IDS), logits)
    p = logits.softmax(-1)
    written = torch.einsum("bla,blc->ac", p[:, :-1], p[:, 1:]) / 6
    drift = pair_drift(loss.real[0], before, 0.05 / 6)
    (expected,) = torch.autograd.grad(-(drift * written).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_descent_brings_the_law_of_free_logits_to_the_real_one():
    text = torch.tensor([[0, 1], [1, 2], [2, 0]]).repeat(10, 1)
    loss = PairDriftLoss(3, decay=0.5)
    logits = torch.nn.Parameter(0.1 * torch.randn(30, 2, 3, generator=torch.Generator().manual_seed(0)))
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        optimiser.zero_grad()
        loss(logits, text).backward()
        optimiser.step()
    assert loss.total_variation().item() < 0.1


def test_strata_keep_laws_of_their_own():
    loss = PairDriftLoss(3, strata=2)
    loss(torch.zeros(2, 4, 3), IDS, stratum=1)
    assert (loss.generated[0] == 0).all()
    torch.testing.assert_close(loss.generated[1, 0], torch.full((3, 3), 1 / 9))


def test_evaluation_changes_no_law_and_the_state_is_all_there_is():
    loss = PairDriftLoss(3)
    loss(random_logits(2, 4, 3), IDS)
    kept = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.eval()
    value = loss(random_logits(2, 4, 3, seed=5), IDS)
    assert all(torch.equal(kept[name], now) for name, now in loss.state_dict().items())
    again = PairDriftLoss(3).eval()
    again.load_state_dict(kept)
    assert torch.equal(again(random_logits(2, 4, 3, seed=5), IDS), value)


def test_classes_group_tokens():
    classes = torch.tensor([0, 0, 1])
    grouped, plain = PairDriftLoss(3, classes=classes), PairDriftLoss(3)
    for loss in (grouped, plain):
        loss(random_logits(2, 4, 3).float(), IDS)
    fold = torch.nn.functional.one_hot(classes).float()
    for name in ("real", "generated"):
        torch.testing.assert_close(getattr(grouped, name), fold.T @ getattr(plain, name) @ fold)


@given(st.integers(2, 40), st.integers(0, 60))
def test_the_first_tokens_have_classes_of_their_own_and_the_others_fill_the_rest_evenly(classes, more):
    found = frequent_first_classes(classes + more, classes)
    own = classes // 2
    assert found[:own].tolist() == list(range(own))
    sizes = found[own:].bincount(minlength=classes)[own:]
    assert found[own:].min() == own and found.max() == classes - 1 and sizes.max() - sizes.min() <= 1


def test_the_mask_has_no_probability_among_classes():
    loss = PairDriftLoss(6, classes=frequent_first_classes(6, 4), mask_id=5)
    logits = torch.zeros(1, 3, 6, requires_grad=True)
    loss(logits, torch.tensor([[0, 1, 4]]), noisy_ids=torch.tensor([[5, 5, 5]])).backward()
    share = torch.tensor([1, 1, 2, 1]) / 5  # of tokens 2 and 4 in one class; 3 is alone without the mask
    torch.testing.assert_close(loss.generated[0, 0], torch.outer(share, share))
    assert (logits.grad[..., 5] == 0).all() and logits.grad[..., :5].abs().sum() > 0


@pytest.mark.parametrize("mask_id", [None, 1999])
def test_beside_the_logits_there_are_three_tensors_of_their_size(mask_id):
    logits, ids = torch.zeros(1, 64, 2000, requires_grad=True), torch.zeros(1, 64, dtype=torch.int64)
    loss = PairDriftLoss(2000, classes=frequent_first_classes(2000, 8), mask_id=mask_id)
    with LiveBytes() as live:
        loss(logits, ids).backward()
    assert live.peak <= 3.1 * 4 * logits.numel()


@pytest.mark.parametrize(("length", "size"), [(512, 256), (128, 1024)])
@pytest.mark.parametrize("observed", [None, 0.0, 0.5])
def test_without_classes_there_are_five_tensors_of_the_logits_size_and_four_of_a_laws(length, size, observed):
    logits, ids = torch.zeros(8, length, size, requires_grad=True), torch.zeros(8, length, dtype=torch.int64)
    given = {}
    if observed is not None:
        given = {"noisy_ids": ids, "predicted": torch.arange(length).expand(8, -1) >= observed * length}
    loss = PairDriftLoss(size)
    with LiveBytes() as live:
        loss(logits, ids, **given).backward()
    law, forward = loss.real.numel(), 4 if observed else 3
    assert live.peak <= 1.01 * 4 * max(5 * logits.numel() + law, forward * logits.numel() + 4 * law)


def test_what_is_observed_stands_beside_what_is_predicted_in_classes_too():
    loss = PairDriftLoss(6, classes=frequent_first_classes(6, 4))
    predicted = torch.tensor([[True, False, True]])
    loss(torch.zeros(1, 3, 6), torch.tensor([[0, 1, 4]]), noisy_ids=torch.tensor([[0, 5, 0]]), predicted=predicted)
    share, observed = torch.tensor([1, 1, 2, 2]) / 6, torch.tensor([0.0, 0.0, 0.0, 1.0])
    expected = (torch.outer(share, observed) + torch.outer(observed, share)) / 2
    torch.testing.assert_close(loss.generated[0, 0], expected)


def test_autocast_of_the_caller_changes_nothing():
    found = []
    for autocast in (False, True):
        loss, logits = PairDriftLoss(8), (3 * random_logits(2, 4, 8).float()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(logits, IDS)
        value.backward()
        found.append((value.detach(), logits.grad, loss.generated))
    for plain, under in zip(*found, strict=True):
        assert torch.equal(plain, under)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_laws_stay_wide_in_a_converted_module(dtype):
    loss = PairDriftLoss(3, classes=torch.tensor([0, 1, 1]))
    loss(random_logits(2, 4, 3).float(), IDS)
    loss.real_weight += 2**25  # where float32 would stand still
    kept = {name: value.clone() for name, value in loss.named_buffers()}
    torch.nn.ModuleList([loss]).to(dtype)
    for name, value in loss.named_buffers():
        assert value.dtype == kept[name].dtype and torch.equal(value, kept[name])
    loss.observe(IDS[:1])
    assert loss.real_weight.item() == 2**25 + 6 + 3


def test_fewer_tokens_than_classes_are_refused():
    with pytest.raises(TokenDriftError, match="vocab_size must be an integer of at least 8"):
        frequent_first_classes(7, 8)


@pytest.fixture(scope="module")
def ranks(run_ranks):
    """What one process found, and what each of two found."""
    single, *pair = run_ranks(WORKER, [(0, 1), (0, 2), (1, 2)])
    return single, pair


@pytest.mark.parametrize("case", ["even", "uneven"])
@pytest.mark.parametrize("padded", [False, True])
def test_two_processes_have_the_laws_and_the_gradient_of_one(ranks, case, padded):
    single, pair = ranks[0][case, padded], [each[case, padded] for each in ranks[1]]
    for law in ("real", "generated", "real_weight", "generated_weight"):
        assert torch.equal(pair[0][law], pair[1][law])
        torch.testing.assert_close(pair[0][law], single[law], rtol=0, atol=1e-12)
    for of_mean in ("loss", "gradient"):  # as DDP averages gradients
        torch.testing.assert_close((pair[0][of_mean] + pair[1][of_mean]) / 2, single[of_mean], rtol=0, atol=1e-12)
    assert (single["gradient"].abs().amax(dim=(1, 2)) > 1e-4).all()


def test_an_error_on_one_rank_is_one_on_all(ranks):
    (first, weight), (second, other) = (each["failures"] for each in ranks[1])
    assert "clean_ids has ids from 99" in first[0] and "another rank has failed" in second[0]
    assert first[1] == second[1]
    assert all("different calls of the loss, or at different strata" in said[2] for said in (first, second))
    assert weight.tolist() == other.tolist() == [1, 0]


def test_padding_is_no_text():
    short, long = PairDriftLoss(3), PairDriftLoss(3)
    logits = random_logits(2, 4, 3).float()
    here = torch.tensor([[True] * 3 + [False]] * 2)
    short(logits[:, :3], IDS[:, :3])
    long(logits, IDS, attention_mask=here)
    torch.testing.assert_close(short.generated, long.generated)
    torch.testing.assert_close(short.real, long.real)


def test_backoff_gives_unseen_pairs_the_chance_of_their_tokens():
    loss = PairDriftLoss(3, backoff=0.5)
    loss.observe(torch.tensor([[0, 1, 2]]))
    loss.eval()
    assert loss.total_variation().item() == pytest.approx(0.5)  # of a law without any mass yet
    expected = 0.5 * loss.real[0] + 0.5 * torch.outer(loss.real[0].sum(1), loss.real[0].sum(0))
    torch.testing.assert_close(loss._target()[0], expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lags": ()}, "lags"),
        ({"decay": 1.0}, "decay"),
        ({"backoff": -0.1}, "backoff"),
        ({"smoothing": 0.0}, "smoothing"),
        ({"classes": torch.zeros(2, dtype=torch.int64)}, "classes"),
        ({"mask_id": 3}, "mask_id"),
        ({"strata": 0}, "strata"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(TokenDriftError, match=named):
        PairDriftLoss(3, **options)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"logits": torch.zeros(2, 4, 5)}, "logits"),
        ({"clean_ids": IDS + 2}, "clean_ids"),
        ({"stratum": 1}, "stratum"),
        ({"predicted": IDS > 0}, "predicted"),
        ({"logits": torch.zeros(2, 1, 3), "clean_ids": IDS[:, :1]}, "lag"),
        ({"logits": torch.full((2, 4, 3), torch.nan)}, "NaN"),
    ],
)
def test_input_that_does_not_fit_changes_nothing(change, named):
    loss = PairDriftLoss(3)
    given = {"logits": torch.zeros(2, 4, 3), "clean_ids": IDS, **change}
    with pytest.raises(TokenDriftError, match=named):
        loss(given.pop("logits"), given.pop("clean_ids"), **given)
    assert (loss.real == 0).all() and (loss.generated == 0).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"real": torch.full((1, 3, 3), torch.nan)}, "real must be finite"),
        ({"generated_weight": torch.tensor([-1.0])}, "generated_weight must be finite and nowhere below zero"),
        ({"generated": torch.zeros(2, 1, 3, 3)}, "the stored generated has another shape"),
    ],
)
def test_a_state_that_no_loss_has_is_refused(changes, named):
    loss = PairDriftLoss(3)
    loss(torch.zeros(2, 4, 3), IDS)
    with pytest.raises(TokenDriftError, match=named):
        PairDriftLoss(3).load_state_dict(loss.state_dict() | changes)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_that_is_computed_again_in_the_backward_pass_is_refused(reentrant):
    loss, logits = PairDriftLoss(3), torch.randn(2, 4, 3, requires_grad=True)
    value = checkpoint(loss, logits, IDS, use_reentrant=reentrant)
    with pytest.raises(TokenDriftError, match="computed again during the backward pass"):
        value.backward()
