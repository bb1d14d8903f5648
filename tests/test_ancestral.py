"""Laws of the ancestral sampler."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokendrift import TokenDriftError
from tokendrift.diffusion import Cosine, LogLinear, MaskedDiffusion, UniformDiffusion
from tokendrift.sampling import sample
from tokendrift.sampling.ancestral import step

V, MASK = 7, 6
PROCESSES = {"masked": MaskedDiffusion(V), "uniform": UniformDiffusion(V)}
EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
LOGITS = torch.tensor([0.0, 1.5, -1.0, 2.0, 0.3, -3.0, 0.7], dtype=torch.float64)


class Denoiser:
    """Random but fixed logits for every token and position; remembers what it was asked."""

    def __init__(self, length=5, vocab=V, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocab, length, vocab, generator=generator) * 2
        self.asked = []

    def __call__(self, x_t, sigma):
        self.asked.append((x_t.clone(), sigma))
        position = torch.arange(x_t.shape[1])
        neighbour = x_t.roll(1, dims=1)
        return self.table[x_t, position] + 0.5 * self.table[neighbour, position]


def constant(x_t, sigma):
    return LOGITS.expand(*x_t.shape, V)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_follows(ids, law, *, bound):
    """Pearson's chi-square of ids against a law (V,); impossible tokens must not occur at all."""
    counts = torch.bincount(ids.flatten(), minlength=V).double()
    possible = law > 0
    assert (counts[~possible] == 0).all()
    expected = ids.numel() * law[possible]
    assert ((counts[possible] - expected).square() / expected).sum() < bound


# ------------------------------------------------------------------------------------------------ exact laws


@pytest.mark.statistical
@EVERY_PROCESS
@pytest.mark.parametrize("present", [MASK, 3])
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.5), (0.5, 0.49), (0.3, 0.0), (1.0, 1e-5)])
def test_one_step_follows_the_dense_posterior(process, present, t, s):
    logits, x = LOGITS.clone(), torch.full((1, 200_000), present)
    if process.mask_id is not None:
        logits[process.mask_id] = -torch.inf
    times = torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64)
    law = process.posterior(logits.expand(1, 1, V), x[:, :1], *times)[0, 0].clamp_min(0)
    law[law < 1e-12] = 0
    ids = step(process, logits.expand(*x.shape, V), x, t, s, generator=seeded(int(1e4 * t) + present))
    # Up to 6 degrees of freedom: a right sampler exceeds 30 once in 25,000 seeds.
    assert_follows(ids, law, bound=30)


@pytest.mark.statistical
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("noise_removal", ["ancestral", "none"])
def test_uniform_chains_follow_the_product_of_their_posteriors(steps, noise_removal):
    process = PROCESSES["uniform"]
    times = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64)
    if noise_removal == "ancestral":
        times[-1] = 0
    law = torch.full((V,), 1 / V, dtype=torch.float64)
    for t, s in itertools.pairwise(times):
        kernel = process.posterior(LOGITS.expand(V, 1, V), torch.arange(V)[:, None], t.expand(V), s.expand(V))
        law = law @ kernel[:, 0]
    found = sample(constant, process, (1000, 200), steps=steps, noise_removal=noise_removal, generator=seeded(steps))
    assert_follows(found.ids, law, bound=30)


@pytest.mark.statistical
@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()])
def test_masked_chains_end_in_the_denoisers_law(schedule):
    process = MaskedDiffusion(V, schedule=schedule)
    law = LOGITS.clone()
    law[MASK] = -torch.inf
    found = sample(constant, process, (1000, 200), steps=4, generator=seeded(3))
    assert_follows(found.ids, law.softmax(0), bound=30)


@pytest.mark.statistical
def test_temperature_is_the_law_of_divided_logits():
    law = LOGITS.clone()
    law[MASK] = -torch.inf
    found = sample(constant, PROCESSES["masked"], (1000, 200), steps=2, temperature=0.7, generator=seeded(5))
    assert_follows(found.ids, (law / 0.7).softmax(0), bound=30)


@pytest.mark.statistical
def test_masks_leave_at_the_rate_of_the_schedule():
    process, x = PROCESSES["masked"], torch.full((1, 400_000), MASK)
    out = step(process, LOGITS.index_fill(0, torch.tensor(MASK), -torch.inf).expand(*x.shape, V), x, 0.8, 0.6)
    assert (out == MASK).double().mean().item() == pytest.approx(0.6 / 0.8, abs=0.004)


# ------------------------------------------------------------------------------------------------ promises


@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy", "none"])
def test_observed_tokens_never_change(noise_removal):
    denoiser = Denoiser()
    found = sample(denoiser, PROCESSES["masked"], (64, 5), steps=6, noise_removal=noise_removal, generator=seeded(0))
    states = [x for x, _ in denoiser.asked] + [found.ids]
    assert (states[0] == MASK).all()
    revealed = 0
    for before, after in itertools.pairwise(states):
        observed = before != MASK
        assert torch.equal(before[observed], after[observed])
        revealed += (observed != (after != MASK)).sum().item()
    assert revealed == 64 * 5


@EVERY_PROCESS
@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize(("noise_removal", "extra"), [("ancestral", 0), ("greedy", 1), ("none", 0)])
def test_nfe_is_the_number_of_forward_calls(process, steps, noise_removal, extra):
    denoiser, ticks = Denoiser(), []
    found = sample(
        denoiser, process, (3, 5), steps=steps, noise_removal=noise_removal, generator=seeded(0), progress=ticks.append
    )
    assert found.nfe == len(denoiser.asked) == steps + extra == sum(ticks)
    assert found.steps == steps
    assert found.ids.shape == (3, 5)
    assert found.ids.dtype == torch.int64


@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy"])
@pytest.mark.parametrize("steps", [1, 3])
def test_no_mask_is_left_whatever_the_network_thinks_of_it(noise_removal, steps):
    def fond_of_masks(x_t, sigma):
        return torch.zeros(*x_t.shape, V).index_fill(-1, torch.tensor(MASK), 1e4)

    found = sample(fond_of_masks, PROCESSES["masked"], (50, 20), steps=steps, noise_removal=noise_removal)
    assert (found.ids != MASK).all()


@EVERY_PROCESS
def test_the_cold_limit_takes_the_most_likely_token(process):
    law = LOGITS.clone()
    if process.mask_id is not None:
        law[process.mask_id] = -torch.inf
    found = sample(constant, process, (50, 20), steps=3, temperature=1e-4, generator=seeded(0))
    assert (found.ids == law.argmax()).all()


def test_greedy_noise_removal_takes_the_most_likely_token_everywhere_in_uniform_diffusion():
    denoiser = Denoiser()
    found = sample(denoiser, PROCESSES["uniform"], (8, 5), steps=2, noise_removal="greedy", generator=seeded(0))
    last, _ = denoiser.asked[-1]
    assert torch.equal(found.ids, denoiser(last, None).argmax(-1))


@EVERY_PROCESS
def test_dividing_the_logits_beforehand_is_the_same_temperature(process):
    denoiser = Denoiser()
    inside = sample(denoiser, process, (8, 5), steps=4, temperature=0.5, generator=seeded(0))
    outside = sample(lambda x, sigma: denoiser(x, sigma) / 0.5, process, (8, 5), steps=4, generator=seeded(0))
    assert torch.equal(inside.ids, outside.ids)
    warm = sample(denoiser, process, (8, 5), steps=4, generator=seeded(0))
    assert not torch.equal(inside.ids, warm.ids)


@EVERY_PROCESS
def test_the_same_seed_gives_the_same_samples(process):
    one, same, other = (sample(Denoiser(), process, (8, 5), steps=4, generator=seeded(s)).ids for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("index", [0, 1, 2])
@EVERY_PROCESS
def test_the_denoiser_sees_the_published_grid_of_times(golden, process, index):
    numbers = golden("transitions")
    grid = numbers[f"grid.{index}.timesteps"]
    denoiser = Denoiser()
    sample(denoiser, process, (2, 5), steps=len(grid) - 1, noise_removal="greedy")
    seen = torch.stack([sigma for _, sigma in denoiser.asked])
    assert seen.dtype == torch.float32
    expected = process.sigma(grid)[:, None].expand(-1, 2)  # greedy's extra call stands at the last time, 1e-5
    torch.testing.assert_close(seen.double(), expected, rtol=1e-6, atol=0)


def test_the_logits_of_the_network_are_not_written_to():
    kept = torch.randn(2, 5, V)
    before = kept.clone()
    sample(lambda x, sigma: kept, PROCESSES["masked"], (2, 5), steps=3)
    assert torch.equal(kept, before)


def test_half_precision_logits_are_sampled_in_float32():
    table = (torch.randn(2, 5, V) * 3).bfloat16()
    half = sample(lambda x, sigma: table, PROCESSES["uniform"], (2, 5), steps=3, generator=seeded(0))
    full = sample(lambda x, sigma: table.float(), PROCESSES["uniform"], (2, 5), steps=3, generator=seeded(0))
    assert torch.equal(half.ids, full.ids)


@EVERY_PROCESS
def test_a_backbone_is_sampled_without_graph(backbone, process):
    model = backbone(vocab_size=V, time_conditioning=process.mask_id is None)
    found = sample(model, process, (2, 8), steps=2, generator=seeded(0))
    assert 0 <= found.ids.min() <= found.ids.max() < V
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------ errors


@EVERY_PROCESS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_bad_number_stops_the_sampler(process, value):
    """Compared with NaN, every chance is false: without a check the prior would come back as a sample."""
    denoiser = Denoiser()
    denoiser.table[:, 3, 0] = value
    with pytest.raises(TokenDriftError, match="logits of the denoiser are not finite"):
        sample(denoiser, process, (2, 5), steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"steps": 2.0}, "steps must be an integer of at least 1"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"temperature": -1.0}, "temperature must be a finite number above 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number above 0"),
        ({"noise_removal": "argmax"}, "noise_removal must be one of 'ancestral', 'greedy', 'none'"),
        ({"shape": (2,)}, r"shape must be \(B, L\), both at least 1"),
        ({"shape": (0, 5)}, r"shape must be \(B, L\), both at least 1"),
        ({"denoiser": Denoiser(vocab=V + 1)}, r"the denoiser must return logits \(B, L, V\) = \(2, 5, 7\)"),
        ({"denoiser": lambda x, sigma: torch.zeros(2, V)}, r"denoiser\(x_t, sigma\) must have shape \(B, L, V\)"),
        ({"denoiser": lambda x, sigma: None}, r"denoiser\(x_t, sigma\) must be a tensor of shape \(B, L, V\)"),
        ({"denoiser": lambda x, sigma: torch.full((2, 5, V), torch.nan)}, "logits of the denoiser are not finite"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    good = {"denoiser": Denoiser(), "process": PROCESSES["masked"], "shape": (2, 5), "steps": 2}
    options = good | arguments
    with pytest.raises(TokenDriftError, match=message):
        sample(options.pop("denoiser"), options.pop("process"), options.pop("shape"), **options)
