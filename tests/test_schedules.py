"""Laws of noise schedules and of the times that are drawn for training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import TokenDriftError
from tokendrift.diffusion import Cosine, DuoCosine, Geometric, Linear, LogLinear, Schedule, sample_times
from tokendrift.diffusion.schedules import stratify

SCHEDULES = {
    "loglinear": LogLinear(),
    "mdlm_cosine": Cosine(),
    "mdlm_cosinesqr": Cosine(power=2),
    "mdlm_linear": Linear(),
    "mdlm_geometric": Geometric(),
    "duo_cosine": DuoCosine(),
}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_slope_and_sigma_have_the_golden_values(golden, name):
    numbers, schedule = golden("schedules"), SCHEDULES[name]
    t = numbers["t"]
    numbers.assert_matches(schedule.alpha(t), f"{name}.alpha")
    numbers.assert_matches(schedule.sigma(t), f"{name}.sigma")
    if name == "duo_cosine":
        numbers.assert_matches(schedule.dalpha(t), f"{name}.dalpha_exact")
        schedule = DuoCosine(strict_upstream=True)
    numbers.assert_matches(schedule.dalpha(t), f"{name}.dalpha")
    numbers.assert_matches(-schedule.dalpha(t) / schedule.alpha(t), f"{name}.dsigma")


def test_duo_and_mdlm_share_the_log_linear_schedule(golden):
    numbers, schedule = golden("schedules"), LogLinear()
    numbers.assert_matches(schedule.alpha(numbers["t"]), "duo_loglinear.alpha")
    numbers.assert_matches(schedule.dalpha(numbers["t"]), "duo_loglinear.dalpha")
    numbers.assert_matches(schedule.sigma(numbers["t"]), "duo_loglinear.sigma")


@EVERY_SCHEDULE
@given(t=st.floats(0.01, 0.99))
def test_the_slope_is_the_derivative_of_the_signal(schedule, t):
    t = torch.tensor(t, dtype=torch.float64)
    slope = (schedule.alpha(t + 1e-6) - schedule.alpha(t - 1e-6)) / 2e-6
    torch.testing.assert_close(schedule.dalpha(t), slope, rtol=1e-6, atol=1e-8)


@EVERY_SCHEDULE
def test_the_signal_falls_from_clean_to_noise(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert (alpha.diff() < 0).all()
    assert 0.998 <= alpha[0] <= 1
    assert 0 <= alpha[-1] < 0.4  # the geometric schedule ends at exp(-1)
    torch.testing.assert_close(schedule.sigma(t), -alpha.log(), rtol=1e-12, atol=1e-15)


@EVERY_SCHEDULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedules_keep_shape_and_dtype(schedule, dtype):
    t = torch.rand(3, 1, dtype=dtype)
    for value in (schedule.alpha(t), schedule.dalpha(t), schedule.sigma(t)):
        assert value.shape == t.shape
        assert value.dtype == dtype
    assert isinstance(schedule, Schedule)


@EVERY_SCHEDULE
def test_levels_keep_their_digits_in_float32_at_both_ends_of_time(schedule):
    early = torch.logspace(-5, -0.3, 200)
    t = torch.cat([early, 1 - early])
    for name in ("alpha", "noise", "sigma"):
        single, exact = getattr(schedule, name)(t), getattr(schedule, name)(t.double())
        # A few of the last places, 6e-8 each; 1 - alpha in float32 would be wrong by a hundredth at t = 1e-5. What
        # cos^2 or exp loses goes with the size of its argument.
        torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=0)


@EVERY_SCHEDULE
def test_noise_is_one_minus_the_signal(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(schedule.noise(t), 1 - schedule.alpha(t), rtol=1e-12, atol=1e-15)


@EVERY_SCHEDULE
def test_time_inverts_the_signal_and_stops_at_the_ends(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.alpha(t)), t, rtol=0, atol=1e-7)  # cos is flat at 0: sqrt(1e-15)
    torch.testing.assert_close(schedule.time(schedule.alpha(t))[10:], t[10:], rtol=1e-12, atol=0)
    by_bisection = Schedule.time(schedule, schedule.alpha(t))
    torch.testing.assert_close(by_bisection[10:], t[10:], rtol=1e-11, atol=0)
    ends = schedule.time(torch.tensor([1 - 1e-12, 1e-12], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=2e-6)
    assert schedule.time(torch.tensor([0.5])).dtype == torch.float32


@pytest.mark.parametrize(("name", "schedule"), [("duo_loglinear", LogLinear(eps=0)), ("duo_cosine", DuoCosine(eps=0))])
def test_the_inverse_of_upstream_is_the_one_without_eps(golden, name, schedule):
    numbers = golden("schedules")
    numbers.assert_matches(schedule.time(numbers[f"{name}.inverse_alpha"]), f"{name}.inverse_t")


def test_a_schedule_of_your_own_needs_a_signal_and_its_slope():
    class Square(Schedule):
        def alpha(self, t):
            return 1 - t**2

        def dalpha(self, t):
            return -2 * t

    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(Square().time(Square().alpha(t)), t, rtol=1e-12, atol=0)
    torch.testing.assert_close(Square().sigma(t), -(1 - t**2).log())


# ------------------------------------------------------------------------------------------------ times


def test_stratified_and_plain_times_have_the_golden_values(golden):
    numbers = golden("schedules")
    uniform = numbers["sample_t.uniform"]
    numbers.assert_matches(stratify(uniform), "sample_t.stratified")
    numbers.assert_matches((1 - 1e-3) * uniform + 1e-3, "sample_t.plain")


@given(count=st.integers(1, 100), seed=st.integers(0, 2**31 - 1))
def test_antithetic_times_put_one_time_into_each_stratum(count, seed):
    generator = torch.Generator().manual_seed(seed)
    times = sample_times(count, generator=generator, dtype=torch.float64)
    uniform = (times - 1e-3) / (1 - 1e-3)
    assert torch.equal((uniform * count).floor().long(), torch.arange(count))  # row i owns stratum i


@given(count=st.integers(1, 50), antithetic=st.booleans(), smallest=st.sampled_from([1e-3, 0.2]))
def test_times_lie_between_the_smallest_and_one(count, antithetic, smallest):
    times = sample_times(count, antithetic=antithetic, smallest=smallest)
    assert times.shape == (count,)
    assert times.dtype == torch.float32
    assert (times >= smallest - 1e-7).all()
    assert (times <= 1).all()


@given(count=st.integers(1, 50), levels=st.integers(1, 1000))
def test_discrete_times_are_the_ends_of_their_intervals(count, levels):
    continuous, discrete = (
        sample_times(count, levels=found, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for found in (None, levels)
    )
    upstream = ((continuous * levels).to(torch.int) / levels + 1 / levels).clamp_max(1)  # MDLM, diffusion.py
    torch.testing.assert_close(discrete.float(), upstream, rtol=1e-6, atol=0)
    assert (discrete >= continuous).all()
    assert (discrete * levels - (discrete * levels).round()).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sample_times(3, levels=0), "levels must be an integer of at least 1"),
        (lambda: sample_times(0), "count must be an integer of at least 1"),
        (lambda: sample_times(3, smallest=1.0), r"smallest must lie in \[0, 1\)"),
        (lambda: LogLinear(eps=1.0), r"eps, the signal left at t = 1, must lie in \[0, 1\)"),
        (lambda: Cosine(eps=-0.1), r"eps, the signal left at t = 1, must lie in \[0, 1\)"),
        (lambda: Cosine(power=0), "power must be an integer of at least 1"),
        (lambda: DuoCosine(eps=2), r"eps, the signal left at t = 1, must lie in \[0, 1\)"),
        (lambda: Linear(3.0, 2.0), "sigma_min must be at least 0 and below sigma_max"),
        (lambda: Geometric(0.0, 2.0), "sigma_min must be above 0 and below sigma_max"),
    ],
)
def test_impossible_schedules_and_times_are_refused(build, message):
    with pytest.raises(TokenDriftError, match=message):
        build()


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_same_seed_gives_the_same_times(antithetic):
    one, same, other = (
        sample_times(9, antithetic=antithetic, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_plain_times_are_the_uniforms_of_the_generator():
    draw = torch.rand(9, generator=torch.Generator().manual_seed(4))
    times = sample_times(9, antithetic=False, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(times, 0.999 * draw + 1e-3)
