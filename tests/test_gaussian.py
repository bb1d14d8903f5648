"""Laws of DUO's curriculum: the argmax of a Gaussian diffusion is a uniform-state one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import TokenDriftError
from tokendrift.diffusion import (
    GaussianCurriculum,
    GaussianDuality,
    GaussianUniformDiffusion,
    SoftCorruption,
    UniformDiffusion,
)
from tokendrift.diffusion._order_statistics import log_mean_exp_below
from tokendrift.evaluation import validation_nelbo
from tokendrift.training import Continuation, CurriculumContinuation, Optimization, train
from tokendrift.training.optimization import LoopConfig

V = 7


# ------------------------------------------------------------------------------------------------ noise levels


def test_signal_and_slope_have_the_values_of_upstreams_table():
    """Goldens of DUO's cached integral for GPT-2's vocabulary."""
    schedule = GaussianDuality(50257)
    gamma = torch.tensor([-3.5, -3.0, -2.5, -2.0, -1.75], dtype=torch.float64)
    t = (gamma + 3.5) / 1.75
    torch.testing.assert_close(schedule.gamma(t), gamma, rtol=1e-14, atol=0)
    expected = torch.tensor([0.92834, 0.59624, 0.23797, 0.07203, 0.03828], dtype=torch.float64)
    # The table is read at the nearest of 1e5 points over 4 units of gamma: 2e-5 times a slope of at most 0.84.
    torch.testing.assert_close(schedule.alpha(t), expected, rtol=0, atol=2e-5)
    series = torch.tensor([0.92835, 0.23797, 0.03828], dtype=torch.float64)  # the series of its main branch: 5 digits
    torch.testing.assert_close(schedule.alpha(t)[[0, 2, 4]], series, rtol=0, atol=5e-6)
    slopes = torch.tensor([-0.65657, -0.91402, -0.16958], dtype=torch.float64)
    torch.testing.assert_close(schedule.dalpha(t)[[0, 2, 4]], slopes, rtol=0, atol=5e-6)


@given(low=st.floats(-8, 3), width=st.floats(0.1, 4))
def test_for_two_tokens_the_integral_is_a_normal_distribution_function(low, width):
    """The difference of two entries is normal: alpha = 2 Phi(m / sqrt 2) - 1."""
    schedule, t = GaussianDuality(2, low, low + width), torch.linspace(0, 1, 9, dtype=torch.float64)
    mean = torch.exp(-schedule.gamma(t) / 2)
    torch.testing.assert_close(schedule.alpha(t), torch.erf(mean / 2), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(schedule.noise(t), torch.erfc(mean / 2), rtol=1e-11, atol=1e-22)
    slope = torch.exp(-(mean**2) / 4) / math.sqrt(math.pi) * -mean / 2 * width
    torch.testing.assert_close(schedule.dalpha(t), slope, rtol=1e-11, atol=1e-21)


@given(t=st.floats(0.01, 0.99), size=st.sampled_from([2, 30, 50258]))
def test_the_slope_is_the_derivative_of_the_signal(t, size):
    schedule, t = GaussianDuality(size), torch.tensor(t, dtype=torch.float64)
    slope = (schedule.alpha(t + 1e-5) - schedule.alpha(t - 1e-5)) / 2e-5
    torch.testing.assert_close(schedule.dalpha(t), slope, rtol=1e-7, atol=0)
    torch.testing.assert_close(schedule.noise(t), 1 - schedule.alpha(t), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(schedule.time(schedule.alpha(t)), t, rtol=1e-10, atol=0)


@pytest.mark.parametrize("size", [2, 1024, 50258])
def test_a_range_of_signal_levels_gives_its_range_of_gamma(size):
    schedule = GaussianDuality.between(size, 0.9, 0.05)
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.9, 0.05], dtype=torch.float64), rtol=1e-10, atol=0)


def test_levels_keep_shape_and_dtype():
    t = torch.rand(3, 1)
    for value in (GaussianDuality(V).alpha(t), GaussianDuality(V).dalpha(t), GaussianDuality(V).sigma(t)):
        assert value.shape == t.shape
        assert value.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ corruption


def test_the_noisy_token_is_the_largest_entry_of_the_soft_input(generator):
    process = GaussianUniformDiffusion(V, 0.1)
    x0 = torch.randint(V, (4, 6), generator=generator)
    found = process.corrupt(x0, generator=generator)
    assert found.soft.shape == (4, 6, V)
    assert torch.equal(found.soft.argmax(-1), found.x_t)
    assert found.predicted.all()
    torch.testing.assert_close(found.sigma, -GaussianDuality(V).alpha(found.t).log())
    again = [process.corrupt(x0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(again[0].soft, again[1].soft)
    assert not torch.equal(again[0].soft, again[2].soft)


def test_the_soft_input_is_the_noised_one_hot_over_the_temperature():
    x0, t = torch.tensor([[3, 1]]), torch.tensor([0.4])
    hot, warm = (
        GaussianUniformDiffusion(V, tau).corrupt(x0, t, generator=torch.Generator().manual_seed(5)).soft
        for tau in (1.0, 0.25)
    )
    torch.testing.assert_close(warm, hot * 4)
    noise = torch.randn(1, 2, V, generator=torch.Generator().manual_seed(5))
    gamma = torch.tensor(-3.5 + 0.4 * 1.75)
    expected = noise * gamma.sigmoid().sqrt() + torch.nn.functional.one_hot(x0, V) * (-gamma).sigmoid().sqrt()
    torch.testing.assert_close(hot, expected)


@pytest.mark.statistical
def test_the_largest_entry_follows_the_uniform_state_law(generator):
    process = GaussianUniformDiffusion(V, 0.1, gamma_min=-1.5, gamma_max=1.5)
    t, x0 = torch.tensor([0.1, 0.5, 0.9]), torch.full((3, 200_000), 2)
    x_t = process.corrupt(x0, t, generator=generator).x_t
    share = torch.stack([(x_t == token).float().mean(-1) for token in range(V)], dim=-1)
    alpha = process.schedule.alpha(t)[:, None]
    expected = (1 - alpha) / V + alpha * torch.nn.functional.one_hot(torch.tensor(2), V)
    # One binomial deviation is sqrt(1/4 / 2e5) = 0.0011 at most.
    torch.testing.assert_close(share, expected, rtol=0, atol=0.005)


def test_the_objective_is_that_of_the_hard_token_at_its_signal_level(generator):
    process, plain = GaussianUniformDiffusion(V, 0.1), UniformDiffusion(V, GaussianDuality(V))
    x0 = torch.randint(V, (4, 6), generator=generator)
    found = process.corrupt(x0, generator=generator)
    logits = torch.randn(4, 6, V, generator=generator, dtype=torch.float64)
    loss = process.nelbo(logits, x0, found.x_t, found.t)
    assert torch.equal(loss, plain.nelbo(logits, x0, found.x_t, found.t))
    assert (loss >= 0).all()


# ------------------------------------------------------------------------------------------------ the largest entries


@pytest.mark.parametrize("top_k", [1, 3, V - 1])
def test_the_largest_entries_are_different_tokens_with_their_weights(generator, top_k):
    process = GaussianUniformDiffusion(V, 0.1, top_k=top_k)
    x0 = torch.randint(V, (4, 6), generator=generator)
    found = process.corrupt(x0, generator=generator)
    assert found.soft.shape == found.weights.shape == (4, 6, top_k + 1)
    assert found.soft.dtype == torch.int64
    assert torch.equal(found.soft[..., 0], x0)
    assert all(len(set(ids)) == top_k + 1 for ids in found.soft.flatten(0, 1).tolist())
    assert torch.equal(found.soft.gather(-1, found.weights.argmax(-1, keepdim=True))[..., 0], found.x_t)
    assert (found.weights[..., 1:].diff(dim=-1) <= 0).all()
    total = found.weights.sum(-1)
    assert (total <= 1 + 1e-6).all()
    if top_k == V - 1:
        torch.testing.assert_close(total, torch.ones(4, 6))
    again = [process.corrupt(x0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(again[0].weights, again[1].weights)
    assert not torch.equal(again[0].weights, again[2].weights)


def test_a_backbone_reads_the_largest_entries_as_it_reads_all(backbone, generator):
    model, process = backbone(time_conditioning=True), GaussianUniformDiffusion(13, 0.2, top_k=12)
    found = process.corrupt(torch.randint(13, (3, 8), generator=generator), generator=generator)
    dense = SoftCorruption(found, torch.zeros(3, 8, 13).scatter(-1, found.soft, found.weights.log()))
    torch.testing.assert_close(found.denoise(model), dense.denoise(model), rtol=1e-4, atol=1e-5)


def test_a_soft_input_survives_the_replacement_of_another_field(backbone, generator):
    model, process = backbone(time_conditioning=True), GaussianUniformDiffusion(13, 0.2, top_k=4)
    found = process.corrupt(torch.randint(13, (3, 8), generator=generator), generator=generator)
    other = found._replace(t=found.t / 2)
    assert torch.equal(other.t, found.t / 2)
    assert torch.equal(other.denoise(model), found.denoise(model))


@pytest.mark.statistical
def test_both_forms_have_the_same_law(generator):
    """Where the noisy token is, how heavy it weighs, and how heavy the clean one."""
    x0, t = torch.full((2, 100_000), 2), torch.tensor([0.3, 0.9])
    dense, sparse = (
        GaussianUniformDiffusion(V, 0.3, gamma_min=-1.5, gamma_max=1.5, top_k=top_k).corrupt(x0, t, generator=generator)
        for top_k in (None, V - 1)
    )
    weights = dense.soft.softmax(-1)
    spread = torch.zeros_like(weights).scatter(-1, sparse.soft, sparse.weights)
    for of_dense, of_sparse in (
        (dense.x_t == 2, sparse.x_t == 2),
        (dense.x_t == 5, sparse.x_t == 5),
        (weights[..., 2], spread[..., 2]),
        (weights[..., 5], spread[..., 5]),
        (weights.square().sum(-1), spread.square().sum(-1)),
        (weights.topk(2).values[..., 1], spread.topk(2).values[..., 1]),
    ):
        # Two means over 1e5 draws of what lies in [0, 1]: one deviation is 0.0022 at most.
        torch.testing.assert_close(of_dense.float().mean(-1), of_sparse.float().mean(-1), rtol=0, atol=0.01)


@pytest.mark.statistical
def test_what_is_left_out_counts_with_its_mean_mass(generator):
    x0, t = torch.full((1, 4000), 2), torch.tensor([0.5])
    dense, sparse = (
        GaussianUniformDiffusion(2000, 0.15, top_k=top_k).corrupt(x0, t, generator=generator) for top_k in (None, 20)
    )
    weights = dense.soft.softmax(-1)
    heavy = weights[..., 2] + weights.index_fill(-1, torch.tensor(2), 0.0).topk(20).values.sum(-1)
    share = sparse.weights.sum(-1)
    assert 0.2 < share.mean() < 0.8
    # The deviation of a share is about 0.2, so that of the difference of two means 0.2 * sqrt(2 / 4000) = 0.0045.
    torch.testing.assert_close(heavy.mean(), share.mean(), rtol=0, atol=0.02)


@given(bound=st.floats(-2, 6), scale=st.sampled_from([0.1, 1.0, 5.0, 30.0, 300.0, 3e9]))
def test_the_mean_exponential_below_a_bound_is_its_integral(bound, scale):
    found = log_mean_exp_below(torch.tensor(bound, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))
    # z = bound - width u: the integrand at bound is split off, so that nothing overflows.
    width = min(1.0, 1 / scale)
    u = torch.linspace(0, 60, 600_001, dtype=torch.float64)
    inside = torch.exp(-(scale + 0.0) * width * u + bound * width * u - (width * u) ** 2 / 2)
    integral = torch.trapezoid(inside, u) * width
    edge = scale * bound - bound**2 / 2 - math.log(math.sqrt(2 * math.pi))
    expected = edge + integral.log() - torch.special.log_ndtr(torch.tensor(bound, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7)


# ------------------------------------------------------------------------------------------------ curriculum


def test_the_temperature_falls_as_upstreams_does():
    constant = GaussianCurriculum(UniformDiffusion(V), temperatures=(1e-3, 1e-3), first_step=0, last_step=500)
    assert 1 / constant.temperature(100) == pytest.approx(1000)
    assert 1 / constant.temperature(500) == pytest.approx(1e10)
    default = GaussianCurriculum(UniformDiffusion(V))
    steps = (0, 100_000, 150_000, 200_000)
    assert [default.temperature(step) for step in steps] == pytest.approx([0.1, 0.1, 10**-1.5, 1e-10])


def test_after_the_last_step_training_goes_on_with_the_process_itself():
    curriculum = GaussianCurriculum(UniformDiffusion(V), first_step=2, last_step=4)
    assert [type(curriculum.at(step)).__name__ for step in (0, 4, 5)] == [
        "GaussianUniformDiffusion",
        "GaussianUniformDiffusion",
        "UniformDiffusion",
    ]
    assert curriculum.at(5) is curriculum.process
    at_once = GaussianCurriculum(UniformDiffusion(V), first_step=3, last_step=3)
    assert [at_once.temperature(step) for step in (2, 3)] == [0.1, 1e-10]


def test_a_hard_soft_input_is_the_token_to_the_backbone(backbone, generator):
    process, model = GaussianUniformDiffusion(13, 1e-10), backbone(time_conditioning=True)
    found = process.corrupt(torch.randint(13, (3, 8), generator=generator), generator=generator)
    torch.testing.assert_close(found.denoise(model), model(found.x_t, found.sigma))
    softer = SoftCorruption(found, found.soft * 1e-9)
    assert (softer.denoise(model) - model(found.x_t, found.sigma)).abs().max() > 1e-2


def test_training_follows_the_curriculum_and_counts_its_steps(backbone):
    batches = [torch.randint(13, (4, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    model = backbone(time_conditioning=True)
    curriculum = GaussianCurriculum(UniformDiffusion(13), first_step=0, last_step=1)
    objective = CurriculumContinuation(curriculum, torch.Generator().manual_seed(3))
    train(model, objective, iter(batches), LoopConfig(2, batch_size=4))
    assert objective.step == 2
    with torch.no_grad():  # an evaluation
        objective(model, batches[2])
    resumed = CurriculumContinuation(curriculum)
    resumed.load_state_dict(objective.state_dict())
    assert objective.step == resumed.step == 2
    state = objective.generator.get_state()
    after = objective(model, batches[2]).loss
    plain = Continuation(curriculum.process, torch.Generator().set_state(state))
    assert torch.equal(after, plain(model, batches[2]).loss)
    assert math.isfinite(validation_nelbo(model, GaussianUniformDiffusion(13, 0.1), batches[3]))


def test_micro_batches_of_a_step_move_the_curriculum_once(backbone):
    rows = torch.randint(13, (4, 8), generator=torch.Generator().manual_seed(0)).split(2)
    curriculum, asked = GaussianCurriculum(UniformDiffusion(13), first_step=0, last_step=2), []
    objective = CurriculumContinuation(SimpleNamespace(at=lambda step: asked.append(step) or curriculum.at(step)))
    optimization = Optimization(backbone(time_conditioning=True), LoopConfig(2))
    for step in range(2):
        optimization.step(step, objective, rows, count=2)
    assert asked == [0, 0, 1, 1] and objective.step == 2


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianDuality(V, -1.0, -1.0), "gamma_max must lie above gamma_min"),
        (lambda: GaussianDuality(V, -1.0, math.inf), "gamma_max must lie above gamma_min"),
        (lambda: GaussianDuality.between(V, 0.1, 0.9), "signal levels with 0 < last < first < 1"),
        (lambda: GaussianDuality(1), "vocab_size must be an integer of at least 2"),
        (lambda: GaussianUniformDiffusion(V, 0.1, top_k=V), r"top_k must lie in \[1, V\) with V = 7"),
        (lambda: GaussianUniformDiffusion(V, 0.1, top_k=0), "top_k must be an integer of at least 1"),
        (lambda: GaussianCurriculum(UniformDiffusion(V), top_k=V), r"top_k must lie in \[1, V\)"),
        (lambda: GaussianUniformDiffusion(V, 0.0), "temperature must be a finite number above 0"),
        (lambda: GaussianCurriculum(UniformDiffusion(V), (0.1, -1)), "temperatures must be a finite number above 0"),
        (
            lambda: GaussianCurriculum(UniformDiffusion(V), first_step=5, last_step=4),
            "last_step must be an integer of at least 5",
        ),
        (lambda: GaussianCurriculum(UniformDiffusion(V), gamma_max=-4.0), "gamma_max must lie above gamma_min"),
    ],
)
def test_bad_curricula_are_refused(build, message):
    with pytest.raises(TokenDriftError, match=message):
        build()
