"""Laws of uniform-state diffusion (DUO)."""

from __future__ import annotations

import pytest
import torch
from conftest import noised_batch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes

from tokendrift import TokenDriftError
from tokendrift.diffusion import DuoCosine, LogLinear, UniformDiffusion

V = 7
UNIFORM = UniformDiffusion(V)
CASES = ["mid", "extreme", "cosine", "peaked", "large_vocab"]


def posterior_of_bayes(p, x_t, alpha_t, alpha_s):
    """q(x_s | x_t) by Bayes' rule with x0 ~ p, from the two forward kernels; (V,) for one position."""
    size = len(p)
    ratio = alpha_t / alpha_s
    step = ratio * torch.eye(size).double() + (1 - ratio) / size  # q(x_t | x_s), rows x_s
    start = alpha_s * p + (1 - alpha_s) / size  # q(x_s) with x0 ~ p
    joint = start * step[:, x_t]
    return joint / joint.sum()


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("case", CASES)
def test_the_objective_has_the_golden_values(golden, case):
    numbers = golden("duo_objective")
    schedule = DuoCosine(strict_upstream=True) if case == "cosine" else LogLinear()
    process = UniformDiffusion(numbers.params[case]["V"], schedule)
    logits, x0, x_t, t = (numbers[f"{case}.{name}"] for name in ("logits", "x0", "x_t", "t"))
    loss = process.nelbo(logits, x0, x_t, t)
    numbers.assert_matches(loss, f"{case}.token_loss_exact")
    numbers.assert_matches(loss, f"{case}.token_loss", tolerance={"rtol": 1e-7, "atol": 1e-8})
    numbers.assert_matches(process.schedule.alpha(t)[:, None], f"{case}.alpha")
    numbers.assert_matches(process.schedule.dalpha(t)[:, None], f"{case}.dalpha")


@pytest.mark.parametrize("case", CASES)
def test_the_objective_holds_in_float32(golden, case):
    numbers = golden("duo_objective")
    schedule = DuoCosine(strict_upstream=True) if case == "cosine" else LogLinear()
    process = UniformDiffusion(numbers.params[case]["V"], schedule)
    loss = process.nelbo(
        numbers[f"{case}.logits"].float(), numbers[f"{case}.x0"], numbers[f"{case}.x_t"], numbers[f"{case}.t"].float()
    )
    expected = numbers[f"{case}.token_loss_exact"]
    # At t = 1e-3 the loss is near 1e4; elsewhere it stays below 150. A few of the last places, 6e-8 each.
    assert loss.dtype == torch.float32
    assert (loss - expected).abs().max() <= (2e-3 if case == "extreme" else 1e-5)


def test_the_reverse_step_has_the_golden_values(golden):
    numbers = golden("transitions")
    process = UniformDiffusion(numbers.params["duo"]["V"])
    logits, x_t = numbers["duo.logits"], numbers["duo.x_t"]
    t, s = numbers["duo.t"][:, 0], numbers["duo.s"][:, 0]
    numbers.assert_matches(process.posterior(logits, x_t, t, s), "duo.posterior")
    numbers.assert_matches(process.posterior(logits, x_t, t, torch.zeros_like(s)), "duo.posterior_final")


def test_objective_and_posterior_have_the_values_of_the_reference():
    """Numbers computed apart from this package, in float64, from the formulas of the paper."""
    row, column = torch.meshgrid(torch.arange(4), torch.arange(7), indexing="ij")
    logits = (2 * torch.sin(1 + 3.0 * row.double() + column))[None]
    x0, x_t = torch.tensor([[2, 5, 0, 3]]), torch.tensor([[2, 1, 0, 6]])
    t = torch.tensor([0.4 / 0.999], dtype=torch.float64)  # alpha = 0.6
    loss = UniformDiffusion(7).nelbo(logits, x0, x_t, t)
    expected = [[1.6309703436, 3.0960536326, 0.6320787687, 3.2665081111]]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    t, s = (torch.tensor([(1 - alpha) / 0.999], dtype=torch.float64) for alpha in (0.5, 0.7))
    posterior = UniformDiffusion(7).posterior(logits, x_t, t, s)[0, :2]
    expected = [
        [0.096290873, 0.1079542085, 0.6621933242, 0.0192951522, 0.0182032664, 0.0245427539, 0.0715204218],
        [0.0285351134, 0.4930433581, 0.0375901968, 0.1186532666, 0.2090728888, 0.0815644108, 0.0315407654],
    ]
    torch.testing.assert_close(posterior, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------------ laws


@given(seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_objective_is_a_divergence(seed, scale):
    """A generalised Kullback-Leibler sum: never negative, and zero where p is certain of the truth."""
    logits, clean, x_t, t = noised_batch(UNIFORM, seed, scale=scale)
    process = UniformDiffusion(V)
    assert (process.nelbo(logits, clean, x_t, t) >= -1e-10).all()
    certain = torch.nn.functional.one_hot(clean, V).double() * 1e3
    torch.testing.assert_close(process.nelbo(certain, clean, x_t, t), torch.zeros(4, 6).double(), rtol=0, atol=1e-9)


@given(seed=st.integers(0, 2**31 - 1))
def test_the_objective_is_the_sum_it_is_defined_by(seed):
    logits, clean, x_t, t = noised_batch(UNIFORM, seed)
    process = UniformDiffusion(V)
    alpha, slope = process.schedule.alpha(t)[:, None, None], process.schedule.dalpha(t)[:, None, None]
    kappa = V * alpha / (1 - alpha)
    truth = 1 + kappa * torch.nn.functional.one_hot(clean, V)
    model = 1 + kappa * logits.softmax(-1)
    r, r_hat = (x / x.gather(-1, x_t[..., None]) for x in (truth, model))
    expected = (-slope / (V * alpha) * (r * (r / r_hat).log() - r + r_hat)).sum(-1)
    torch.testing.assert_close(process.nelbo(logits, clean, x_t, t), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_objective_has_its_limits_at_both_ends_of_time(dtype):
    clean = torch.tensor([[2, 5, 0, 3]])
    logits = torch.sin(torch.arange(4.0 * V, dtype=dtype)).view(1, 4, V).requires_grad_()
    start = UNIFORM.nelbo(logits, clean, clean, torch.zeros(1, dtype=dtype))  # -alpha' / V (1 / p - 1)
    p = logits.softmax(-1).gather(-1, clean[..., None])[..., 0]
    torch.testing.assert_close(start, (1 - UNIFORM.schedule.eps) / V * (1 / p - 1), rtol=1e-4, atol=0)
    end = UniformDiffusion(V, LogLinear(eps=0)).nelbo(logits, clean, clean, torch.ones(1, dtype=dtype))
    assert torch.equal(end, torch.zeros_like(end))  # alpha = 0: x_t does not depend on x0
    (slope,) = torch.autograd.grad((start + end).sum(), logits)
    assert slope.isfinite().all()


@given(seed=st.integers(0, 2**31 - 1), final=st.booleans())
def test_the_posterior_is_bayes_rule_and_equals_its_mixture(seed, final):
    logits, _, x_t, t = noised_batch(UNIFORM, seed, rows=1)
    process = UniformDiffusion(V)
    s = torch.zeros_like(t) if final else t * 0.6
    posterior, p = process.posterior(logits, x_t, t, s)[0], logits.softmax(-1)[0]
    alpha_t, alpha_s = process.schedule.alpha(t), torch.ones(1).double() if final else process.schedule.alpha(s)
    expected = torch.stack([posterior_of_bayes(p[i], x_t[0, i], alpha_t, alpha_s) for i in range(6)])
    torch.testing.assert_close(posterior, expected, rtol=0, atol=1e-14)
    log_p = process.log_probs(logits, x_t).gather(-1, x_t[..., None])[..., 0]
    stay, denoise = (part[0, :, None] for part in process.mixture(log_p, x_t, t.item(), s.item()))
    mixed = stay * torch.nn.functional.one_hot(x_t[0], V) + denoise * p + (1 - stay - denoise) / V
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-14)
    assert (1 - stay - denoise >= -1e-15).all()


def test_the_mixture_needs_the_chance_of_the_present_token():
    with pytest.raises(TokenDriftError, match="needs the log-probability of the present tokens"):
        UniformDiffusion(V).mixture(None, torch.zeros(1, 1, dtype=torch.int64), 0.5, 0.4)


@given(seed=st.integers(0, 2**31 - 1))
def test_the_surprise_is_that_of_the_log_probabilities(seed):
    logits, clean, x_t, _ = noised_batch(UNIFORM, seed)
    process = UniformDiffusion(V)
    expected = -process.log_probs(logits, x_t).gather(-1, clean[..., None])[..., 0]
    found = process.nll(logits, clean, x_t)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(found[~process.predicted(x_t)], torch.zeros_like(found[~process.predicted(x_t)]))


def test_the_gradient_of_the_objective_is_that_of_finite_differences():
    logits, clean, x_t, t = noised_batch(UNIFORM, rows=2, length=3)
    assert torch.autograd.gradcheck(lambda x: UniformDiffusion(V).nelbo(x, clean, x_t, t), logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: UniformDiffusion(V).nll(x, clean, x_t), logits)


def test_half_precision_logits_are_evaluated_in_float32():
    logits, clean, x_t, t = noised_batch(UNIFORM)
    half = UniformDiffusion(V).nelbo(logits.bfloat16(), clean, x_t, t.float())
    assert half.dtype == torch.float32
    assert torch.equal(half, UniformDiffusion(V).nelbo(logits.bfloat16().float(), clean, x_t, t.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_objective_holds_little_beside_the_gradient_of_the_logits(dtype):
    logits = torch.zeros(8, 256, 8192, dtype=dtype, requires_grad=True)
    x_t = clean = torch.zeros(8, 256, dtype=torch.int64)
    with LiveBytes() as count:
        UniformDiffusion(8192).nelbo(logits, clean, x_t, torch.full((8,), 0.5)).sum().backward()
    # Tiles of 1 MB, in float32, of the 64 MB that float32 logits have here.
    assert count.peak - logits.grad.nbytes < 0.1 * 4 * logits.numel()


# ------------------------------------------------------------------------------------------------ corruption


def test_every_position_is_predicted():
    _, clean, *_ = noised_batch(UNIFORM)
    found = UniformDiffusion(V).corrupt(clean)
    assert found.predicted.all()
    assert found.x_t.shape == clean.shape
    assert 0 <= found.x_t.min() <= found.x_t.max() < V


def test_the_same_seed_gives_the_same_corruption():
    _, clean, *_ = noised_batch(UNIFORM)
    one, same, other = (
        UniformDiffusion(V).corrupt(clean, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.x_t, other.x_t)


def test_little_changes_early_and_much_late(generator):
    clean = torch.zeros(2, 2000, dtype=torch.int64)
    found = UniformDiffusion(V).corrupt(clean, torch.tensor([0.05, 0.95]), generator=generator)
    early, late = (found.x_t != clean).float().mean(-1).tolist()
    assert 0 < early < 0.1
    assert 0.75 < late < 1


@pytest.mark.statistical
def test_noise_is_uniform_and_may_redraw_the_token(generator):
    clean = torch.full((3, 200_000), 2)
    t = torch.tensor([0.1, 0.5, 0.9])
    noisy = UniformDiffusion(V).corrupt(clean, t, generator=generator).x_t
    share = torch.stack([(noisy == token).float().mean(-1) for token in range(V)], dim=-1)
    alpha = (1 - 0.999 * t)[:, None]
    expected = (1 - alpha) / V + alpha * torch.nn.functional.one_hot(torch.tensor(2), V)
    torch.testing.assert_close(share, expected, rtol=0, atol=0.005)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"logits": torch.zeros(4, 6, V - 1)},
            "logits must have V = 7 columns, one for each entry of the vocabulary of the process",
        ),
        ({"x0": torch.full((4, 6), V)}, "x0 has ids from 7 to 7"),
        ({"x_t": torch.full((4, 6), V)}, "x_t has ids from 7 to 7"),
        ({"x_t": torch.zeros(4, 6)}, "x_t must hold integer token ids"),
        ({"t": torch.rand(4, 6)}, r"t must have shape \(B,\), but it has 2 axes"),
    ],
)
def test_bad_arguments_of_the_objective_are_refused(arguments, message):
    logits, clean, x_t, t = noised_batch(UNIFORM)
    good = {"logits": logits, "x0": clean, "x_t": x_t, "t": t}
    with pytest.raises(TokenDriftError, match=message):
        UniformDiffusion(V).nelbo(**(good | arguments))
