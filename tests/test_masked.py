"""Laws of masked diffusion (MDLM)."""

from __future__ import annotations

import pytest
import torch
from conftest import noised_batch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes

from tokendrift import TokenDriftError
from tokendrift.diffusion import Cosine, DuoCosine, Geometric, Linear, LogLinear, MaskedDiffusion

CASES = {
    "loglinear": LogLinear(),
    "mdlm_cosine": Cosine(),
    "mdlm_cosinesqr": Cosine(power=2),
    "mdlm_linear": Linear(),
    "mdlm_geometric": Geometric(),
    "loglinear_midmask": LogLinear(),
    "duo_cosine": DuoCosine(strict_upstream=True),
}
V, MASK = 7, 6
MASKED = MaskedDiffusion(V, MASK)


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("case", CASES)
def test_the_objective_has_the_golden_values(golden, case):
    numbers = golden("mdlm_objective")
    process = MaskedDiffusion(numbers.params["V"], numbers.params["cases"][case]["mask_id"], CASES[case])
    x0, x_t, t = (numbers[f"{case}.{name}"] for name in ("x0", "x_t", "t"))
    loss = process.nelbo(numbers["logits"], x0, x_t, t)
    numbers.assert_matches(loss, f"{case}.token_loss")
    valid = numbers["valid"] if "valid" in numbers.data else torch.ones_like(loss)
    numbers.assert_matches((loss * valid).sum() / valid.sum(), f"{case}.mean_loss")
    numbers.assert_matches(process.schedule.alpha(t)[:, None], f"{case}.alpha")
    numbers.assert_matches(process.schedule.dalpha(t)[:, None], f"{case}.dalpha")
    log_p, expected = process.log_probs(numbers["logits"], x_t), numbers[f"{case}.log_probs"]
    open_entries = expected > -1e5
    granted = numbers.tolerance
    torch.testing.assert_close(log_p[open_entries], expected[open_entries], rtol=granted["rtol"], atol=granted["atol"])
    assert (log_p[~open_entries] < -1e5).all()


def test_the_reverse_step_has_the_golden_values(golden):
    numbers = golden("transitions")
    process = MaskedDiffusion(numbers.params["mdlm"]["V"], numbers.params["mdlm"]["mask_id"])
    logits, x_t = numbers["mdlm.logits"], numbers["mdlm.x_t"]
    t, s = numbers["mdlm.t"][:, 0], numbers["mdlm.s"][:, 0]
    posterior = process.posterior(logits, x_t, t, s)
    numbers.assert_matches(posterior, "mdlm.posterior")
    numbers.assert_matches(process.posterior(logits, x_t, t, torch.zeros_like(s)), "mdlm.posterior_final")
    masked, granted = x_t == process.mask_id, numbers.tolerance
    assert masked.any()
    for rule in ("ddpm", "ddpm_cache", "analytic"):  # three upstream rules, one law on masked rows
        weights = numbers[f"mdlm.{rule}_weights"]
        law = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(posterior[masked], law[masked], rtol=granted["rtol"], atol=granted["atol"])


def test_objective_and_posterior_have_the_values_of_the_reference():
    """Numbers computed apart from this package, in float64, from the formulas of the paper."""
    row, column = torch.meshgrid(torch.arange(4), torch.arange(7), indexing="ij")
    logits = (2 * torch.sin(1 + 3.0 * row.double() + column))[None]
    x0, x_t = torch.tensor([[2, 5, 0, 3]]), torch.tensor([[2, 6, 6, 3]])
    t = torch.tensor([0.4 / 0.999], dtype=torch.float64)  # alpha = 0.6
    loss = MaskedDiffusion(7, 6).nelbo(logits, x0, x_t, t)
    expected = torch.tensor([[0, 4.5632635915, 3.3180642261, 0]], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    t, s = (torch.tensor([(1 - alpha) / 0.999], dtype=torch.float64) for alpha in (0.5, 0.7))
    posterior = MaskedDiffusion(7, 6).posterior(logits, x_t, t, s)[0, 1]
    expected = [0.0062120442, 0.0041464248, 0.0161394085, 0.1050113254, 0.2041411162, 0.0643496811, 0.6]
    torch.testing.assert_close(posterior, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------------ laws


@given(seed=st.integers(0, 2**31 - 1), mask_id=st.integers(0, V - 1))
def test_subs_is_a_law_without_the_mask_that_copies_what_is_observed(seed, mask_id):
    logits, _, x_t, _ = noised_batch(MaskedDiffusion(V, mask_id), seed)
    process = MaskedDiffusion(V, mask_id)
    before = logits.clone()
    p = process.log_probs(logits, x_t).exp()
    assert torch.equal(logits, before)  # upstream writes into its input
    torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:2]).double(), rtol=0, atol=1e-14)
    masked = x_t == mask_id
    assert torch.equal(p[..., mask_id][masked], torch.zeros_like(p[..., mask_id][masked]))
    assert torch.equal(p[~masked].argmax(-1), x_t[~masked])
    assert torch.equal(p[~masked].amax(-1), torch.ones_like(p[~masked].amax(-1)))


@given(seed=st.integers(0, 2**31 - 1), name=st.sampled_from(list(CASES)))
def test_the_objective_is_the_weighted_surprise_at_masks_and_nothing_elsewhere(seed, name):
    logits, clean, x_t, t = noised_batch(MASKED, seed)
    process = MaskedDiffusion(V, MASK, CASES[name])
    loss = process.nelbo(logits, clean, x_t, t)
    surprise = -process.log_probs(logits, x_t).gather(-1, clean[..., None])[..., 0]
    sigma = process.sigma(t)
    rate = torch.autograd.functional.jvp(process.sigma, t, torch.ones_like(t))[1] if name != "duo_cosine" else None
    masked = x_t == MASK
    assert torch.equal(loss[~masked], torch.zeros_like(loss[~masked]))
    if rate is not None:  # sigma' / (e^sigma - 1)
        expected = (rate / sigma.expm1())[:, None] * surprise
        torch.testing.assert_close(loss[masked], expected[masked], rtol=1e-9, atol=1e-12)
    if name == "loglinear":  # the weight is 1/t whatever eps is
        torch.testing.assert_close(loss[masked], (surprise / t[:, None])[masked], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_objective_is_zero_at_the_clean_end(name):
    process, clean = MaskedDiffusion(V, MASK, CASES[name]), torch.tensor([[2, 5, 0, 3]])
    logits = torch.randn(1, 4, V, requires_grad=True)
    loss = process.nelbo(logits, clean, clean, torch.zeros(1))
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(torch.autograd.grad(loss.sum(), logits)[0], torch.zeros_like(logits))


@given(seed=st.integers(0, 2**31 - 1), final=st.booleans())
def test_the_posterior_is_a_law_and_equals_its_mixture(seed, final):
    logits, _, x_t, t = noised_batch(MASKED, seed, rows=1)
    process = MaskedDiffusion(V, MASK)
    s = torch.zeros_like(t) if final else t * 0.6
    posterior = process.posterior(logits, x_t, t, s)
    torch.testing.assert_close(posterior.sum(-1), torch.ones_like(posterior[..., 0]), rtol=0, atol=1e-14)
    stay, denoise = process.mixture(None, x_t, t.item(), s.item())
    here = torch.nn.functional.one_hot(x_t, V)
    mixed = stay[..., None] * here + denoise[..., None] * process.log_probs(logits, x_t).exp()
    torch.testing.assert_close(posterior, mixed, rtol=0, atol=1e-14)
    if final:
        assert (posterior[..., MASK][x_t == MASK] == 0).all()


def test_float32_objectives_are_close_to_float64():
    logits, clean, x_t, t = noised_batch(MASKED)
    x_t, t[0] = torch.full_like(x_t, MASK), 1e-3  # where 1 - alpha in float32 would be wrong by 6e-5
    process = MaskedDiffusion(V, MASK)
    exact = process.nelbo(logits, clean, x_t, t)
    single = process.nelbo(logits.float(), clean, x_t, t.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-6, atol=0)
    half = process.nelbo(logits.bfloat16(), clean, x_t, t.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, process.nelbo(logits.bfloat16().float(), clean, x_t, t.float()), rtol=0, atol=0)


@given(seed=st.integers(0, 2**31 - 1))
def test_the_surprise_is_that_of_the_log_probabilities(seed):
    logits, clean, x_t, _ = noised_batch(MASKED, seed)
    process = MaskedDiffusion(V, MASK)
    expected = -process.log_probs(logits, x_t).gather(-1, clean[..., None])[..., 0]
    found = process.nll(logits, clean, x_t)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(found[~process.predicted(x_t)], torch.zeros_like(found[~process.predicted(x_t)]))


def test_the_gradient_of_the_objective_is_that_of_finite_differences():
    logits, clean, x_t, t = noised_batch(MASKED, rows=2, length=3)
    process = MaskedDiffusion(V, MASK)
    assert torch.autograd.gradcheck(lambda x: process.nelbo(x, clean, x_t, t), logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: process.nll(x, clean, x_t), logits)
    process.nelbo(logits, clean, x_t, t).sum().backward()
    assert torch.equal(logits.grad[..., MASK], torch.zeros_like(logits.grad[..., MASK]))


def test_observed_rows_are_not_read_and_get_no_gradient():
    logits, clean, x_t, t = noised_batch(MASKED)
    seen = x_t != MASK
    expected = MaskedDiffusion(V, MASK).nelbo(logits, clean, x_t, t)
    logits[seen] = torch.nan
    logits.requires_grad_()
    loss = MaskedDiffusion(V, MASK).nelbo(logits, clean, x_t, t)
    assert torch.equal(loss, expected)
    loss.sum().backward()
    assert torch.equal(logits.grad[seen], torch.zeros_like(logits.grad[seen]))
    assert logits.grad.isfinite().all()
    nothing_masked = MaskedDiffusion(V, MASK).nelbo(logits, clean, clean, t)
    assert torch.equal(nothing_masked, torch.zeros_like(nothing_masked))
    nothing_masked.sum().backward()  # attached to the graph


def test_a_clean_mask_is_expensive_but_can_be_multiplied_away():
    """Padding that shares its id with the mask: MDLM's vocabulary."""
    logits, clean, x_t, t = noised_batch(MASKED)
    clean[:, -1] = x_t[:, -1] = MASK
    logits.requires_grad_()
    loss = MaskedDiffusion(V, MASK).nelbo(logits, clean, x_t, t)
    assert (loss[:, -1] > 1e5).all()
    valid = torch.ones_like(loss).index_fill(1, torch.tensor([5]), 0.0)
    (loss * valid).sum().backward()
    assert torch.equal(logits.grad[:, -1], torch.zeros_like(logits.grad[:, -1]))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_objective_holds_little_beside_the_gradient_of_the_logits(dtype):
    logits = torch.zeros(8, 256, 8192, dtype=dtype, requires_grad=True)
    masked = torch.arange(256).expand(8, 256) % 2 == 0
    clean = torch.zeros(8, 256, dtype=torch.int64)
    with LiveBytes() as count:
        loss = MaskedDiffusion(8192).nelbo(logits, clean, torch.where(masked, 8191, clean), torch.full((8,), 0.5))
        loss.sum().backward()
    # Tiles of 1 MB, in float32, of the 64 MB that float32 logits have here.
    assert count.peak - logits.grad.nbytes < 0.1 * 4 * logits.numel()


# ------------------------------------------------------------------------------------------------ corruption


@given(seed=st.integers(0, 2**31 - 1), mask_id=st.integers(0, V - 1))
def test_corruption_only_puts_masks(seed, mask_id):
    _, clean, _, t = noised_batch(MaskedDiffusion(V, mask_id), seed)
    process = MaskedDiffusion(V, mask_id)
    found = process.corrupt(clean, t, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(found.predicted, found.x_t == mask_id)
    assert torch.equal(found.x_t[~found.predicted], clean[~found.predicted])
    torch.testing.assert_close(found.sigma, process.sigma(t))
    assert torch.equal(found.t, t)


def test_the_same_seed_gives_the_same_corruption():
    _, clean, *_ = noised_batch(MASKED)
    one, same, other = (
        MaskedDiffusion(V).corrupt(clean, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.x_t, other.x_t)


def test_little_changes_early_and_much_late(generator):
    clean = torch.zeros(2, 2000, dtype=torch.int64)
    found = MaskedDiffusion(V).corrupt(clean, torch.tensor([0.05, 0.95]), generator=generator)
    early, late = found.predicted.float().mean(-1).tolist()
    assert 0 < early < 0.1
    assert 0.75 < late < 1


@pytest.mark.statistical
def test_the_share_of_masks_is_one_minus_alpha(generator):
    clean = torch.zeros(3, 200_000, dtype=torch.int64)
    t = torch.tensor([0.1, 0.5, 0.9])
    share = MaskedDiffusion(V).corrupt(clean, t, generator=generator).predicted.float().mean(-1)
    # One binomial deviation is sqrt(1/4 / 2e5) = 0.0011 at most.
    torch.testing.assert_close(share, 0.999 * t, rtol=0, atol=0.005)


def test_the_prior_is_all_masks():
    assert (MaskedDiffusion(V, 3).prior((2, 5)) == 3).all()
    assert MaskedDiffusion(V).mask_id == V - 1
    assert "mask_id=6" in repr(MaskedDiffusion(V))


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("mask_id", [-1, V])
def test_a_mask_outside_the_vocabulary_is_refused(mask_id):
    with pytest.raises(TokenDriftError, match=r"mask_id must lie in \[0, V\) with V = 7"):
        MaskedDiffusion(V, mask_id)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"logits": torch.zeros(4, 6, V + 1)},
            "logits must have V = 7 columns, one for each entry of the vocabulary of the process",
        ),
        ({"logits": torch.zeros(4, 6)}, r"logits must have shape \(B, L, V\)"),
        ({"x0": torch.full((4, 6), V)}, "x0 has ids from 7 to 7"),
        ({"x0": torch.zeros(4, 5, dtype=torch.int64)}, r"x0 must have shape \(B, L\)"),
        ({"x0": torch.zeros(4, 6)}, "x0 must hold integer token ids"),
        ({"x_t": torch.full((4, 6), -1)}, "x_t has ids from -1 to -1"),
        ({"t": torch.rand(5)}, r"t must have shape \(B,\) = \(4,\): one time for each row"),
        ({"t": torch.rand(4, 1)}, r"t must have shape \(B,\), but it has 2 axes"),
        ({"t": 0.5}, r"t must be a tensor of shape \(B,\)"),
        ({"t": torch.full((4,), 2.0)}, r"t must lie in \[0, 1\]"),
        ({"logits": torch.zeros(4, 6, V, dtype=torch.int64)}, "logits must be floating point"),
    ],
)
def test_bad_arguments_of_the_objective_are_refused(arguments, message):
    logits, clean, x_t, t = noised_batch(MASKED)
    good = {"logits": logits, "x0": clean, "x_t": x_t, "t": t}
    with pytest.raises(TokenDriftError, match=message):
        MaskedDiffusion(V).nelbo(**(good | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x0": torch.zeros(6, dtype=torch.int64)}, r"x0 must have shape \(B, L\), but it has 1 axes"),
        ({"x0": torch.zeros(0, 6, dtype=torch.int64)}, "x0 is empty: B is 0"),
        ({"x0": torch.full((4, 6), V)}, "x0 has ids from 7 to 7"),
        ({"t": torch.rand(3)}, r"t must have shape \(B,\) = \(4,\): one time for each row"),
        ({"t": torch.full((4,), 1.5)}, r"t must lie in \[0, 1\]"),
        ({"t": torch.full((4,), torch.nan)}, r"t must lie in \[0, 1\]"),
        ({"t": torch.ones(4, dtype=torch.int64)}, "t must be floating point"),
        ({"t": torch.rand(4, 1)}, r"t must have shape \(B,\)"),
        ({"t": 0.5}, r"t must be a tensor of shape \(B,\)"),
    ],
)
def test_bad_arguments_of_the_corruption_are_refused(arguments, message):
    _, clean, _, t = noised_batch(MASKED)
    with pytest.raises(TokenDriftError, match=message):
        MaskedDiffusion(V).corrupt(**({"x0": clean, "t": t} | arguments))


@pytest.mark.parametrize("vocab_size", [1, 0, 2.0])
def test_a_vocabulary_below_two_is_refused(vocab_size):
    with pytest.raises(TokenDriftError, match="vocab_size must be an integer of at least 2"):
        MaskedDiffusion(vocab_size)
