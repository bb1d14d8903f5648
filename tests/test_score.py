"""Laws of concrete scores and score entropy (SEDD)."""

from __future__ import annotations

import pytest
import torch
from conftest import noised_batch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import TokenDriftError
from tokendrift.diffusion import (
    Cosine,
    DuoCosine,
    GaussianDuality,
    Geometric,
    Linear,
    LogLinear,
    MaskedDiffusion,
    ScoreDenoiser,
    UniformDiffusion,
    log_probs_from_score,
    log_score,
    network_log_score,
    score_entropy,
    score_posterior,
)
from tokendrift.sampling import Analytic, Ancestral, sample
from tokendrift.training import Drift, LoopConfig, ScoreEntropy, train

V, MASK = 7, 4
SCHEDULES = [LogLinear(), Cosine(), DuoCosine(), Linear(0.01, 5.0), Geometric(1e-3, 20.0), GaussianDuality(V)]
PROCESSES = {"masked": MaskedDiffusion(V, MASK), "uniform": UniformDiffusion(V)}
BOTH = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
SEEDS = st.integers(0, 2**31 - 1)


def one_hot(ids):
    return torch.nn.functional.one_hot(ids, V).bool()


# ------------------------------------------------------------------------------------------------ parity


def test_the_absorbing_loss_has_the_values_of_the_reference():
    """Goldens of upstream's loss, weight -alpha'/alpha = .999/.6 included."""
    row, column = torch.meshgrid(torch.arange(4), torch.arange(7), indexing="ij")
    logits = (2 * torch.sin(1 + 3.0 * row.double() + column))[None]
    x0, x_t = torch.tensor([[2, 5, 0, 3]]), torch.tensor([[2, 6, 6, 3]])
    process, t = MaskedDiffusion(7, 6), torch.tensor([0.4 / 0.999], dtype=torch.float64)  # alpha = 0.6
    log_s = network_log_score(process, logits, x_t, process.sigma(t))
    expected = torch.tensor([[0, 5.8185803598, 4.5435284215, 0]], dtype=torch.float64)
    torch.testing.assert_close(score_entropy(process, log_s, x0, x_t, t), expected, rtol=1e-9, atol=1e-9)


def test_the_analytic_step_has_the_golden_values(golden):
    numbers = golden("transitions")
    granted = {"rtol": numbers.tolerance["rtol"], "atol": numbers.tolerance["atol"]}
    for name, process in (("mdlm", MaskedDiffusion(11, 10)), ("duo", UniformDiffusion(11))):
        logits, x_t = numbers[f"{name}.logits"], numbers[f"{name}.x_t"]
        t, s = numbers[f"{name}.t"][:, 0], numbers[f"{name}.s"][:, 0]
        log_s = log_score(process, process.log_probs(logits, x_t), x_t, process.sigma(t))
        numbers.assert_matches(score_posterior(process, log_s, x_t, t, s), f"{name}.posterior")
        final = score_posterior(process, log_s, x_t, t, torch.zeros_like(s))
        numbers.assert_matches(final, f"{name}.posterior_final")
    weights, process = numbers["mdlm.analytic_weights"], MaskedDiffusion(11, 10)
    logits, x_t = numbers["mdlm.logits"], numbers["mdlm.x_t"]
    t, s = numbers["mdlm.t"][:, 0], numbers["mdlm.s"][:, 0]
    log_s = log_score(process, process.log_probs(logits, x_t), x_t, process.sigma(t))
    law, masked = weights / weights.sum(-1, keepdim=True), x_t == 10
    assert masked.any()
    torch.testing.assert_close(score_posterior(process, log_s, x_t, t, s)[masked], law[masked], **granted)


# ------------------------------------------------------------------------------------------------ the map


@BOTH
@given(seed=SEEDS)
def test_scores_are_ratios_of_the_chances_of_noisy_tokens(process, seed):
    """A single position, where q_t is known: that of x0 drawn from p and noised."""
    logits, _, x_t, t = noised_batch(process, seed, length=1)
    p = process.log_probs(logits, torch.full_like(x_t, MASK)).exp()  # the law of x0, whatever is seen
    alpha = process.schedule.alpha(t)[:, None, None]
    prior = one_hot(torch.tensor(MASK)).double() if process.mask_id is not None else torch.ones(V).double() / V
    q_t = alpha * p + (1 - alpha) * prior
    ratio = q_t / q_t.gather(-1, x_t[..., None])
    found = log_score(process, p.log(), x_t, process.sigma(t)).exp()
    known = process.predicted(x_t)[..., None] | one_hot(x_t)  # of an observed token only rates to the mask count
    torch.testing.assert_close(found[known], ratio.masked_fill(one_hot(x_t), 1.0)[known], rtol=1e-12, atol=1e-14)


@BOTH
@given(seed=SEEDS, index=st.integers(0, len(SCHEDULES) - 1), scale=st.sampled_from([0.1, 1.0, 4.0]))
def test_the_map_to_scores_and_back_is_the_identity(process, seed, index, scale):
    process = type(process)(V, *([MASK] if process.mask_id is not None else []), schedule=SCHEDULES[index])
    logits, _, x_t, t = noised_batch(process, seed, scale=scale)
    sigma, log_p = process.sigma(t), process.log_probs(logits, x_t)
    log_s = log_score(process, log_p, x_t, sigma)
    back = log_probs_from_score(process, log_s, x_t, sigma)
    magnified = 4e-15 * sigma.expm1().max().item() / V  # some roundings of logs near 2, which the map divides by kappa
    torch.testing.assert_close(back.exp(), log_p.exp(), rtol=0, atol=1e-12 + magnified)
    again = log_score(process, back, x_t, sigma)
    torch.testing.assert_close(again.exp(), log_s.exp(), rtol=1e-12, atol=1e-12)


@given(seed=SEEDS)
def test_scores_of_no_law_give_the_nearest_sense(seed):
    """Uniform noise: a score below what any p allows means no probability, and the rest is normalised."""
    process = UniformDiffusion(V)
    logits, _, x_t, t = noised_batch(process, seed, scale=5.0)
    log_s = network_log_score(process, logits, x_t, process.sigma(t)).requires_grad_()
    log_p = log_probs_from_score(process, log_s, x_t, process.sigma(t))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(4, 6).double(), rtol=0, atol=1e-12)
    log_p.gather(-1, log_p.argmax(-1, keepdim=True)).sum().backward()
    assert log_s.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ the loss


@BOTH
@given(seed=SEEDS, index=st.integers(0, len(SCHEDULES) - 1))
def test_the_score_entropy_of_a_law_of_x0_is_its_nelbo(process, seed, index):
    process = type(process)(V, *([MASK] if process.mask_id is not None else []), schedule=SCHEDULES[index])
    logits, clean, x_t, t = noised_batch(process, seed)
    log_s = log_score(process, process.log_probs(logits, x_t), x_t, process.sigma(t))
    entropy = score_entropy(process, log_s, clean, x_t, t)
    torch.testing.assert_close(entropy, process.nelbo(logits, clean, x_t, t), rtol=1e-10, atol=1e-11)


@given(seed=SEEDS)
def test_the_entropy_of_any_absorbing_score_is_a_nelbo_and_the_price_of_its_total(seed):
    process = MaskedDiffusion(V, MASK)
    logits, clean, x_t, t = noised_batch(process, seed)
    sigma = process.sigma(t)
    log_s = network_log_score(process, logits, x_t, sigma)
    masked = (x_t == MASK).double()
    total = sigma.expm1()[:, None] * (log_s.exp().sum(-1) - 1)  # C
    weight = (-process.schedule.dalpha(t) / process.schedule.noise(t))[:, None]
    price = masked * weight * (total - 1 - total.clamp_min(1e-300).log())
    entropy = score_entropy(process, log_s, clean, x_t, t)
    torch.testing.assert_close(entropy, process.nelbo(logits, clean, x_t, t) + price, rtol=1e-10, atol=1e-11)
    assert (price >= -1e-12).all()


@BOTH
@given(seed=SEEDS)
def test_the_score_entropy_is_a_divergence(process, seed):
    """Never negative, and zero at the scores of the known token."""
    logits, clean, x_t, t = noised_batch(process, seed, scale=3.0)
    log_s = network_log_score(process, logits, x_t, process.sigma(t))
    assert (score_entropy(process, log_s, clean, x_t, t) >= -1e-10).all()
    certain = process.log_probs(one_hot(clean).double() * 1e3, x_t)
    best = score_entropy(process, log_score(process, certain, x_t, process.sigma(t)), clean, x_t, t)
    torch.testing.assert_close(best, torch.zeros_like(best), rtol=0, atol=1e-9)


@BOTH
def test_the_gradient_of_the_score_entropy_is_that_of_finite_differences(process):
    logits, clean, x_t, t = noised_batch(process, rows=2, length=3)

    def loss(output):
        return score_entropy(process, network_log_score(process, output, x_t, process.sigma(t)), clean, x_t, t)

    def loss_of_law(output):
        log_s = log_score(process, process.log_probs(output, x_t), x_t, process.sigma(t))
        return score_entropy(process, log_probs_and_back(log_s), clean, x_t, t)

    def log_probs_and_back(log_s):
        log_p = log_probs_from_score(process, log_s, x_t, process.sigma(t))
        return log_score(process, log_p, x_t, process.sigma(t))

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    assert torch.autograd.gradcheck(loss_of_law, logits)


@BOTH
def test_float32_scores_are_close_to_float64(process):
    logits, clean, x_t, _ = noised_batch(process)
    t = torch.tensor([1e-3, 0.1, 0.9, 0.999], dtype=torch.float64)

    def loss(output, time):
        return score_entropy(process, network_log_score(process, output, x_t, process.sigma(time)), clean, x_t, time)

    single = loss(logits.bfloat16().float(), t.float())
    exact = loss(logits.bfloat16().double(), t.float().double())
    assert single.dtype == torch.float32
    # Terms of size kappa log kappa cancel: at t = 1e-3 kappa is 7000 and the weight 1/7.
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(single[1:].double(), exact[1:], rtol=1e-5, atol=2e-5)


# ------------------------------------------------------------------------------------------------ the reverse step


@BOTH
@given(seed=SEEDS, final=st.booleans())
def test_the_analytic_step_of_a_law_of_x0_is_the_ancestral_one(process, seed, final):
    logits, _, x_t, t = noised_batch(process, seed)
    s = torch.zeros_like(t) if final else t * 0.6
    log_s = log_score(process, process.log_probs(logits, x_t), x_t, process.sigma(t))
    found = score_posterior(process, log_s, x_t, t, s)
    torch.testing.assert_close(found, process.posterior(logits, x_t, t, s), rtol=0, atol=1e-12)


@BOTH
@given(seed=SEEDS, final=st.booleans())
def test_the_analytic_step_is_a_law_for_any_scores(process, seed, final):
    logits, _, x_t, t = noised_batch(process, seed, scale=3.0)
    s = torch.zeros_like(t) if final else t * 0.9
    law = score_posterior(process, network_log_score(process, logits, x_t, process.sigma(t)), x_t, t, s)
    torch.testing.assert_close(law.sum(-1), torch.ones(4, 6).double(), rtol=0, atol=1e-12)
    assert (law >= 0).all()
    if process.mask_id is not None:
        assert torch.equal(law[x_t != MASK].argmax(-1), x_t[x_t != MASK])  # observed tokens stay
        if final:
            assert (law[..., MASK] == 0).all()


# ------------------------------------------------------------------------------------------------ as a denoiser


@BOTH
def test_a_score_network_becomes_a_denoiser_of_the_same_law(process, backbone):
    logits, _, x_t, t = noised_batch(process)
    sigma, log_p = process.sigma(t), process.log_probs(logits, x_t)

    def network(x_t, sigma):
        return log_score(process, process.log_probs(logits, x_t), x_t, sigma)

    found = process.log_probs(ScoreDenoiser(network, process)(x_t, sigma), x_t)
    torch.testing.assert_close(found.exp(), log_p.exp(), rtol=0, atol=1e-12)
    raw = backbone(vocab_size=V, time_conditioning=True)

    def scaled(x_t, sigma):
        return network_log_score(process, raw(x_t, sigma), x_t, sigma)

    one, other = (ScoreDenoiser(net, process)(x_t, sigma.float()) for net in (raw, scaled))
    torch.testing.assert_close(process.log_probs(one, x_t), process.log_probs(other, x_t), rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("law", [Ancestral(), Analytic()], ids=["ancestral", "analytic"])
def test_scores_and_probabilities_of_one_model_give_the_same_samples(process, law, backbone):
    model = backbone(vocab_size=V, length=6, time_conditioning=True).double()

    def network(x_t, sigma):
        return log_score(process, process.log_probs(model(x_t, sigma), x_t), x_t, sigma.double())

    one, other = (
        sample(denoiser, process, (16, 6), steps=5, sampler=law, seed=7, device="cpu")
        for denoiser in (model, ScoreDenoiser(network, process))
    )
    assert torch.equal(one.ids, other.ids)
    assert len(one.ids.unique()) > 2


def test_whether_a_denoiser_of_scores_depends_on_time_is_told(backbone):
    timeless = backbone(vocab_size=V)
    assert not ScoreDenoiser(timeless, PROCESSES["masked"]).time_conditioned
    assert ScoreDenoiser(timeless, PROCESSES["uniform"]).time_conditioned  # the map needs kappa
    assert ScoreDenoiser(lambda x_t, sigma: x_t, PROCESSES["masked"]).time_conditioned


@BOTH
def test_a_score_model_can_be_trained_and_then_refined_by_the_drifting_loss(process, backbone, drift_loss):
    network = backbone(vocab_size=V, time_conditioning=True)
    batches = [noised_batch(process, seed)[1] for seed in range(5)]
    objective = ScoreEntropy(process, torch.Generator().manual_seed(0))
    records = train(network, objective, iter(batches), LoopConfig(3, batch_size=4, log_every=1))
    assert all(record["score_entropy"] >= 0 for record in records)
    denoiser = ScoreDenoiser(network, process)
    loss, _ = Drift(process, drift_loss, generator=torch.Generator().manual_seed(0))(denoiser, batches[3])
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) > 0


@pytest.fixture
def drift_loss():
    """A drifting loss with a random frozen embedding and mean pooling."""
    from tokendrift import TokenDriftLoss

    table = torch.randn(V, 5, generator=torch.Generator().manual_seed(1))
    return TokenDriftLoss(table, lambda embeds: embeds.mean(dim=1))


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("function", [network_log_score, log_score, log_probs_from_score])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"value": torch.zeros(4, 6, V + 1)},
            "must have V = 7 columns, one for each entry of the vocabulary of the process",
        ),
        ({"value": torch.zeros(4, 6)}, r"must have shape \(B, L, V\)"),
        ({"x_t": torch.full((4, 6), V)}, "x_t has ids from 7 to 7"),
        ({"x_t": torch.zeros(4, 5, dtype=torch.int64)}, r"x_t must have shape \(B, L\)"),
        ({"sigma": torch.rand(4, 1)}, r"sigma \(or t\) must have shape \(B,\)"),
        ({"sigma": 0.5}, r"sigma \(or t\) must have shape \(B,\)"),
    ],
)
def test_bad_arguments_of_the_maps_are_refused(function, arguments, message):
    good = {"value": torch.zeros(4, 6, V), "x_t": torch.zeros(4, 6, dtype=torch.int64), "sigma": torch.ones(4)}
    with pytest.raises(TokenDriftError, match=message):
        function(PROCESSES["uniform"], *(good | arguments).values())


def test_bad_arguments_of_the_score_entropy_are_refused():
    ids = torch.zeros(4, 6, dtype=torch.int64)
    with pytest.raises(TokenDriftError, match="log_s must have V = 7 columns"):
        score_entropy(PROCESSES["uniform"], torch.zeros(4, 6, V + 1), ids, ids, torch.rand(4))
    with pytest.raises(TokenDriftError, match=r"t must have shape \(B,\)"):
        score_entropy(PROCESSES["uniform"], torch.zeros(4, 6, V), ids, ids, torch.rand(5))
