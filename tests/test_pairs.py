"""The drift of token pairs and n-grams: its law, what it counts, and that the lift makes no error in it."""

from __future__ import annotations

import itertools
import math

import pair_rank_worker
import pytest
import torch
from forked import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from torch.utils.checkpoint import checkpoint

from tokendrift import PairDriftLoss, TokenDriftError, _ngram_laws
from tokendrift._checks import check_clean_ids
from tokendrift._ngram_laws import Corrupted, ExactPairs, HashedNgrams, expected_sums
from tokendrift.pairs import pair_drift

IDS = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
FORMS = {
    "exact": {},
    "hashed": {"buckets": 7},
    "narrow": {"buckets": 2},
    "triples": {"order": 3, "buckets": 8},
}


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


@pytest.mark.parametrize(("order", "lags"), [(2, (1, 2)), (3, (1, 2)), (4, (1,))])
def test_the_hashed_law_is_that_of_tokens_drawn_independently(order, lags):
    """By enumeration of all sequences, each of whose n-grams is counted like one of real text."""
    loss = PairDriftLoss(3, order=order, lags=lags, buckets=5).double()
    logits = random_logits(1, 5, 3)
    loss(logits, torch.zeros(1, 5, dtype=torch.int64))
    chances, expected = logits.softmax(-1)[0], torch.zeros_like(loss.generated[0])
    for sequence in itertools.product(range(3), repeat=5):
        counted = PairDriftLoss(3, order=order, lags=lags, buckets=5).double()
        counted.observe(torch.tensor([sequence]))
        expected += chances[range(5), sequence].prod() * counted.real
    torch.testing.assert_close(loss.generated[0], expected)


@given(st.integers(2, 40), st.integers(2, 12), st.integers(2, 3))
def test_buckets_add_up_the_cells_of_the_exact_law_and_blocks_of_tokens_do_not_collide(vocab_size, buckets, order):
    law = HashedNgrams(vocab_size, order, buckets)
    first = torch.arange(vocab_size)
    for bucket in law.bucket:
        for block in bucket[:vocab_size].split(buckets):
            assert len(block.unique()) == len(block) and block.min() >= 0 and block.max() < buckets
    ids = torch.cartesian_prod(*[first] * 2)
    exact = PairDriftLoss(vocab_size, buckets=None)
    hashed = PairDriftLoss(vocab_size, buckets=buckets)
    text = torch.randint(vocab_size, (3, 6), generator=torch.Generator().manual_seed(vocab_size))
    for loss in (exact, hashed):
        loss(random_logits(3, 6, vocab_size).float(), text)
    cells = hashed.law.cells([ids[:, 0], ids[:, 1]])
    for name in ("real", "generated"):
        summed = torch.zeros(buckets).index_add_(0, cells, getattr(exact, name).flatten())
        torch.testing.assert_close(getattr(hashed, name).flatten(), summed, atol=1e-6, rtol=0)
    assert (hashed.total_variation() <= exact.total_variation() + 1e-5).all()


@pytest.mark.parametrize("law", [ExactPairs(4), HashedNgrams(4, 2, 3), HashedNgrams(4, 3, 6), HashedNgrams(4, 2, 9)])
def test_the_gradient_of_an_expected_law_is_its_derivative_whatever_the_tiles(law, monkeypatch):
    logits = random_logits(2, 7, 4).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randint(3, (2, 7), generator=generator)
    predicted, text = torch.rand(2, 2, 7, generator=generator) < 0.7
    for corrupted in (Corrupted(None, None, None, None), Corrupted(noisy, predicted, text, 3)):
        assert torch.autograd.gradcheck(lambda x, c=corrupted: expected_sums(x, c, law, (1, 2)), logits)
        whole = expected_sums(logits, corrupted, law, (1, 2))
        upstream = random_logits(*whole.shape, seed=2)
        (derivative,) = torch.autograd.grad(whole, logits, upstream)
        for tile in (1, 20):
            with monkeypatch.context() as context:
                context.setattr(_ngram_laws, "TILE", {"cpu": tile})
                tiled = expected_sums(logits, corrupted, law, (1, 2))
                torch.testing.assert_close(tiled, whole)
                torch.testing.assert_close(torch.autograd.grad(tiled, logits, upstream)[0], derivative)


@pytest.mark.parametrize(
    ("vocab_size", "order", "shape"), [(4096, 2, (4096, 4096)), (4097, 2, (65536,)), (3, 3, (65536,))]
)
def test_laws_have_a_cell_for_each_pair_up_to_4096_tokens(vocab_size, order, shape):
    with torch.device("meta"):
        assert PairDriftLoss(vocab_size, order=order).real.shape[1:] == shape


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


@pytest.mark.parametrize("form", ["exact", "hashed"])
def test_descent_brings_the_law_of_free_logits_to_the_real_one(form):
    text = torch.tensor([[0, 1], [1, 2], [2, 0]]).repeat(10, 1)
    loss = PairDriftLoss(3, decay=0.5, **FORMS[form])
    logits = torch.nn.Parameter(0.1 * torch.randn(30, 2, 3, generator=torch.Generator().manual_seed(0)))
    optimiser = torch.optim.Adam([logits], lr=0.1)
    divergence = []
    for _ in range(150):
        optimiser.zero_grad()
        loss(logits, text).backward()
        optimiser.step()
        divergence.append(loss.divergence().item())
    assert loss.total_variation().item() < 0.1
    assert divergence[0] > divergence[30] > divergence[-1] and divergence[-1] < 0.05 * divergence[0]


@given(st.integers(0, 1000))
def test_the_drift_is_minus_the_gradient_of_the_divergence(seed):
    loss = PairDriftLoss(5).double()
    real, generated = laws(seed)
    loss.real.copy_(real / real.sum())
    loss.generated = (generated / generated.sum()).view(1, 1, 5, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(loss.divergence().sum(), loss.generated)
    constant = 1  # the divergence lacks the sum of Q, which is 1
    torch.testing.assert_close(constant + gradient[0], -pair_drift(loss.real, loss.generated[0].detach(), 0.0))


def test_the_divergence_is_zero_for_equal_laws_and_largest_for_laws_apart():
    loss = PairDriftLoss(4)
    loss.observe(torch.tensor([[0, 1, 0, 1]]))
    assert loss.divergence().item() == pytest.approx(2 * math.log(2))
    loss.generated[0].copy_(loss.real)
    assert loss.divergence().item() == pytest.approx(0, abs=1e-6)


def test_strata_keep_laws_of_their_own():
    loss = PairDriftLoss(3, strata=2)
    loss(torch.zeros(2, 4, 3), IDS, stratum=1)
    assert (loss.generated[0] == 0).all()
    torch.testing.assert_close(loss.generated[1, 0], torch.full((3, 3), 1 / 9))


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_changes_no_law_and_the_state_is_all_there_is(form):
    loss = PairDriftLoss(3, **FORMS[form])
    loss(random_logits(2, 4, 3), IDS)
    kept = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.eval()
    value = loss(random_logits(2, 4, 3, seed=5), IDS)
    assert all(torch.equal(kept[name], now) for name, now in loss.state_dict().items())
    again = PairDriftLoss(3, **FORMS[form]).eval()
    again.load_state_dict(kept)
    assert torch.equal(again(random_logits(2, 4, 3, seed=5), IDS), value)


@pytest.mark.parametrize("form", ["exact", "hashed"])
@pytest.mark.parametrize("mask_id", [None, 499])
@pytest.mark.parametrize("observed", [None, 0.0, 0.5])
def test_beside_the_gradient_there_are_tiles_and_five_laws(form, mask_id, observed, monkeypatch):
    monkeypatch.setattr(_ngram_laws, "TILE", {"cpu": 2**16})
    logits, ids = torch.zeros(4, 128, 500, requires_grad=True), torch.zeros(4, 128, dtype=torch.int64)
    given = {}
    if observed is not None:
        given = {"noisy_ids": ids, "predicted": torch.arange(128).expand(4, -1) >= observed * 128}
    loss = PairDriftLoss(500, mask_id=mask_id, buckets=None if form == "exact" else 256)
    with LiveBytes() as live:
        loss(logits, ids, **given).backward()
    laws, tiles = 5 * loss.real.nbytes, 8 * 4 * _ngram_laws.TILE["cpu"]
    assert live.peak <= max(laws, logits.nbytes + 2 * loss.real.nbytes) + tiles


def test_for_a_vocabulary_of_real_size_the_gradient_of_the_logits_is_all():
    loss = PairDriftLoss(50258, mask_id=50257).to("meta")
    logits = torch.zeros(2, 1024, 50258, device="meta", requires_grad=True)
    ids = torch.zeros(2, 1024, dtype=torch.int64, device="meta")
    with LiveBytes() as live:
        loss(logits, ids, noisy_ids=ids).backward()
    assert live.peak <= 1.2 * logits.nbytes


def test_where_nothing_waits_for_the_device_logits_that_are_not_finite_change_no_generated_law(monkeypatch):
    loss = PairDriftLoss(3)
    loss(random_logits(2, 4, 3), IDS)
    before = loss.generated.clone(), loss.generated_weight.clone()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert loss(torch.full((2, 4, 3), torch.nan), IDS).isnan()
    assert torch.equal(loss.generated, before[0]) and torch.equal(loss.generated_weight, before[1])


def test_the_mask_has_no_probability_among_buckets():
    loss = PairDriftLoss(6, buckets=4, mask_id=5)
    logits = torch.zeros(1, 3, 6, requires_grad=True)
    loss(logits, torch.tensor([[0, 1, 4]]), noisy_ids=torch.tensor([[5, 5, 5]])).backward()
    first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).unbind(1)
    expected = loss.law.cells([first, second]).bincount(minlength=4) / 25
    torch.testing.assert_close(loss.generated[0, 0], expected)
    assert (logits.grad[..., 5] == 0).all() and logits.grad[..., :5].abs().sum() > 0


def test_what_is_observed_stands_beside_what_is_predicted_in_buckets_too():
    exact, hashed = PairDriftLoss(6), PairDriftLoss(6, buckets=4)
    predicted = torch.tensor([[True, False, True]])
    for loss in (exact, hashed):
        loss(torch.zeros(1, 3, 6), torch.tensor([[0, 1, 4]]), noisy_ids=torch.tensor([[0, 5, 0]]), predicted=predicted)
    share, observed = torch.ones(6) / 6, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    expected = (torch.outer(share, observed) + torch.outer(observed, share)) / 2
    torch.testing.assert_close(exact.generated[0, 0], expected)
    first, second = torch.cartesian_prod(torch.arange(6), torch.arange(6)).unbind(1)
    summed = torch.zeros(4).index_add_(0, hashed.law.cells([first, second]), expected.flatten())
    torch.testing.assert_close(hashed.generated[0, 0], summed)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_of_the_caller_changes_nothing(form):
    found = []
    for autocast in (False, True):
        loss, logits = PairDriftLoss(8, **FORMS[form]), (3 * random_logits(2, 4, 8).float()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(logits, IDS)
        value.backward()
        found.append((value.detach(), logits.grad, loss.generated))
    for plain, under in zip(*found, strict=True):
        assert torch.equal(plain, under)


@pytest.mark.parametrize("form", ["exact", "hashed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_laws_stay_wide_in_a_converted_module(dtype, form):
    loss = PairDriftLoss(3, **FORMS[form])
    loss(random_logits(2, 4, 3).float(), IDS)
    loss.real_weight += 2**25  # where float32 would stand still
    kept = {name: value.clone() for name, value in loss.named_buffers()}
    torch.nn.ModuleList([loss]).to(dtype)
    for name, value in loss.named_buffers():
        assert value.dtype == kept[name].dtype and torch.equal(value, kept[name])
    loss.observe(IDS[:1])
    assert loss.real_weight.item() == 2**25 + 6 + 3


@pytest.fixture(scope="module")
def ranks():
    """What one process found, and what each of two found."""
    single, *pair = run_ranks(pair_rank_worker.main, [(0, 1), (0, 2), (1, 2)])
    return single, pair


@pytest.mark.parametrize("case", ["even", "uneven"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("buckets", [None, 16])
def test_two_processes_have_the_laws_and_the_gradient_of_one(ranks, case, padded, buckets):
    single, pair = ranks[0][case, padded, buckets], [each[case, padded, buckets] for each in ranks[1]]
    for law in ("real", "generated", "real_weight", "generated_weight"):
        assert torch.equal(pair[0][law], pair[1][law])
        torch.testing.assert_close(pair[0][law], single[law], rtol=0, atol=1e-12)
    for of_mean in ("loss", "gradient"):  # as DDP averages gradients
        torch.testing.assert_close((pair[0][of_mean] + pair[1][of_mean]) / 2, single[of_mean], rtol=0, atol=1e-12)
    assert (single["gradient"].abs().amax(dim=(1, 2)) > 1e-4).all()


def test_an_error_on_one_rank_is_one_on_all(ranks):
    (first, weight, real), (second, other, others_real) = (each["failures"] for each in ranks[1])
    assert "clean_ids has ids from 99" in first[0] and "another rank has failed" in second[0]
    assert first[1] == second[1]
    assert all("differ in stratum or number of calls" in said[2] for said in (first, second))
    assert weight.tolist() == other.tolist() == [1, 0]
    assert torch.equal(real, others_real)


def test_where_nothing_waits_for_the_device_an_error_on_one_rank_is_nan_on_the_others(ranks):
    (first, weight, real), (second, other, others_real) = (each["blind"] for each in ranks[1])
    assert "clean_ids has ids from 99" in first[0]
    assert all(math.isnan(value) for value in (second[0], first[2], second[2]))
    assert first[1] == second[1] and math.isfinite(first[1])
    assert weight.tolist() == other.tolist() == [1, 0]
    assert torch.equal(real, others_real)


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_no_text(form):
    short, long = PairDriftLoss(3, **FORMS[form]), PairDriftLoss(3, **FORMS[form])
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
        ({"lags": 2}, r"lags must name at least one distance, such as \(1,\)"),
        ({"decay": 1.0}, "decay"),
        ({"backoff": -0.1}, "backoff"),
        ({"smoothing": 0.0}, "smoothing"),
        ({"buckets": 1}, "buckets"),
        ({"buckets": None, "order": 3}, "buckets"),
        ({"order": 1}, "order"),
        ({"backoff": 0.1, "buckets": 8}, "backoff"),
        ({"mask_id": 3}, "mask_id"),
        ({"strata": 0}, "strata"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(TokenDriftError, match=named):
        PairDriftLoss(3, **options)


def test_laws_with_other_cells_are_not_loaded():
    with pytest.raises(TokenDriftError, match=r"stored laws have \(5,\) cells .* \(3, 3\)"):
        PairDriftLoss(3).load_state_dict(PairDriftLoss(3, buckets=5).state_dict())


def test_the_form_of_the_law_is_shown():
    assert "order=2, lags=(1,), buckets=one for each pair" in repr(PairDriftLoss(3))
    assert "order=3, lags=(1, 4), buckets=8" in repr(PairDriftLoss(3, order=3, lags=(1, 4), buckets=8))


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
        ({"generated": torch.zeros(2, 1, 3, 3)}, r"the stored generated has shape \(2, 1, 3, 3\)"),
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


def test_a_loss_stands_on_one_device_whatever_the_default():
    with torch.device("meta"):
        loss = PairDriftLoss(9, buckets=4)
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}


def test_ids_of_a_narrow_dtype_are_not_taken_for_a_mask_that_they_cannot_hold():
    ids = torch.tensor([[43, 44, 45, 46]], dtype=torch.uint8)  # 299 is 43 modulo 256
    loss, logits = PairDriftLoss(300, mask_id=299), torch.randn(1, 4, 300)
    assert torch.equal(loss.eval()(logits, ids, noisy_ids=ids), loss(logits, ids.long(), noisy_ids=ids.long()))
    check_clean_ids(ids, 299, None)
