"""What the sampler loop promises, whatever the sampler: counts, clamping, seeds, errors."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from sampling_laws import MASK, PROCESSES, Table, V

from tokendrift import TokenDriftError
from tokendrift.diffusion import Mixture
from tokendrift.sampling import Analytic, Ancestral, FirstHitting, Psi, ReMDM, remdm_loop, sample

EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
EITHER = [Ancestral(), Analytic(), Psi(middle="constant-0.5"), remdm_loop()]
MASKED = [*EITHER, ReMDM(), ReMDM("rescale"), ReMDM("conf"), FirstHitting()]
CASES = [("masked", s) for s in MASKED] + [("uniform", s) for s in EITHER]
EVERY_SAMPLER = pytest.mark.parametrize(
    ("process", "sampler"),
    [(PROCESSES[name], sampler) for name, sampler in CASES],
    ids=[f"{name}-{type(sampler).__name__}{getattr(sampler, 'rule', '')}" for name, sampler in CASES],
)


def steps_of(sampler, steps=6):
    return None if isinstance(sampler, FirstHitting) else steps


# ------------------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy", "none"])
@pytest.mark.parametrize("sampler", [Ancestral(), Analytic(), FirstHitting()])
def test_observed_tokens_never_change_and_every_mask_is_filled_once(sampler, noise_removal):
    found = sample(
        Table(5),
        PROCESSES["masked"],
        (64, 5),
        steps=steps_of(sampler),
        sampler=sampler,
        noise_removal=noise_removal,
        seed=0,
        trajectory=True,
    )
    assert (found.trajectory[0] == MASK).all()
    for before, after in itertools.pairwise(found.trajectory):
        assert torch.equal(before[before != MASK], after[before != MASK])
    assert torch.equal(found.trajectory[-1], found.ids)
    left = (found.ids == MASK).sum()
    assert left == 0 or (noise_removal == "none" and left < 5)  # 320 masks stay with chance 1e-5 each


@EVERY_SAMPLER
@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy"])
def test_given_tokens_stay_and_gaps_are_filled(process, sampler, noise_removal):
    given = torch.randint(0, V - 1, (40, 6), generator=torch.Generator().manual_seed(1))
    given_mask = torch.rand(40, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    given_mask[0] = True  # nothing to draw at all
    given_mask[1] = False
    found = sample(
        Table(6),
        process,
        (40, 6),
        steps=steps_of(sampler),
        sampler=sampler,
        given=torch.where(given_mask, given, 0),
        given_mask=given_mask,
        noise_removal=noise_removal,
        seed=0,
        trajectory=True,
    )
    assert (found.trajectory[:, given_mask] == given[given_mask]).all()
    assert process.mask_id is None or (found.ids != MASK).all()
    assert (found.ids[~given_mask] != found.trajectory[0][~given_mask]).any()


@EVERY_SAMPLER
def test_the_same_seed_gives_the_same_ids_in_any_split(process, sampler):
    options = {"steps": steps_of(sampler), "sampler": sampler, "seed": 11}
    together = sample(Table(5), process, (12, 5), **options)
    parts = [
        sample(Table(5), process, (size, 5), first_row=start, **options) for start, size in ((0, 1), (1, 7), (8, 4))
    ]
    assert torch.equal(together.ids, torch.cat([part.ids for part in parts]))
    assert torch.equal(together.row_nfe, torch.cat([part.row_nfe for part in parts])) or process.mask_id is None
    assert not torch.equal(together.ids, sample(Table(5), process, (12, 5), **options | {"seed": 12}).ids)


@EVERY_SAMPLER
@pytest.mark.parametrize("batch_size", [5, 40, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 12))])
def test_the_batch_size_does_not_change_the_samples(process, sampler, batch_size):
    options = {"steps": steps_of(sampler), "sampler": sampler, "seed": 11, "first_row": 3}
    given = torch.randint(0, V - 1, (12, 5), generator=torch.Generator().manual_seed(1))
    given_mask = torch.rand(12, 5, generator=torch.Generator().manual_seed(2)) < 0.3
    options |= {"given": given, "given_mask": given_mask}
    together, batches = sample(Table(5), process, (12, 5), **options), []
    found = sample(Table(5), process, (12, 5), batch_size=batch_size, on_batch=batches.append, **options)
    assert torch.equal(found.ids, together.ids) and torch.equal(found.ids, torch.cat([b.ids for b in batches]))
    assert torch.equal(found.row_nfe, together.row_nfe) or process.mask_id is None
    assert [len(b.ids) for b in batches] == [min(batch_size, 12 - first) for first in range(0, 12, batch_size)]
    assert (found.steps, found.nfe) == (max(b.steps for b in batches), max(b.nfe for b in batches))
    assert found.nfe >= found.row_nfe.max()


def test_a_module_is_sampled_in_evaluation_mode_and_gets_its_modes_back(backbone):
    model = copy.deepcopy(backbone(vocab_size=V))
    expected = sample(model, PROCESSES["uniform"], (4, 6), steps=2, seed=0).ids
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(sample(model, PROCESSES["uniform"], (4, 6), steps=2, seed=0).ids, expected)
    assert [module.training for module in model.modules()] == modes


def test_without_a_seed_pytorchs_own_decides():
    def drawn(seed):
        torch.manual_seed(seed)
        return sample(Table(5), PROCESSES["uniform"], (8, 5), steps=2).ids

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy"])
@pytest.mark.parametrize("sampler", MASKED)
def test_no_mask_is_left_whatever_the_network_thinks_of_it(sampler, noise_removal):
    def fond_of_masks(x_t, sigma):
        return torch.zeros(*x_t.shape, V).index_fill(-1, torch.tensor(MASK), 1e4)

    found = sample(
        fond_of_masks,
        PROCESSES["masked"],
        (50, 20),
        steps=steps_of(sampler, 3),
        sampler=sampler,
        noise_removal=noise_removal,
        seed=0,
    )
    assert (found.ids != MASK).all()


@EVERY_SAMPLER
def test_the_cold_limit_takes_the_most_likely_token(process, sampler):
    logits = torch.tensor([0.0, 1.5, -1.0, 1.0, 3.0])
    best = 1 if process.mask_id is not None else 4
    for options in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-3}, {"top_p": 1e-3, "nucleus": "drop"}):
        # At the end of the grid no noise is left: every token was drawn from the denoiser, or kept as likely.
        found = sample(
            lambda x, sigma: logits.expand(*x.shape, V),
            process,
            (50, 10),
            steps=steps_of(sampler, 4),
            sampler=sampler,
            seed=0,
            **options,
        )
        assert (found.ids == best).all()


@EVERY_PROCESS
def test_dividing_the_logits_beforehand_is_the_same_temperature(process):
    denoiser = Table(5)
    inside = sample(denoiser, process, (8, 5), steps=4, temperature=0.5, seed=0)
    outside = sample(lambda x, sigma: denoiser(x, sigma) / 0.5, process, (8, 5), steps=4, seed=0)
    assert torch.equal(inside.ids, outside.ids)
    assert not torch.equal(inside.ids, sample(denoiser, process, (8, 5), steps=4, seed=0).ids)


def test_greedy_noise_removal_takes_the_most_likely_token_everywhere_in_uniform_diffusion():
    denoiser = Table(5)
    found = sample(denoiser, PROCESSES["uniform"], (8, 5), steps=2, noise_removal="greedy", seed=0)
    last, _ = denoiser.asked[-1]
    assert torch.equal(found.ids, denoiser(last, None).argmax(-1))


def test_a_step_of_ones_own_plugs_in():
    def in_two_speeds(chain, steps):
        *times, end = chain.times(steps)
        for t, s in itertools.pairwise([*(t**2 for t in times), end]):
            yield chain.posterior(t, s)

    denoiser = Table(5)
    found = sample(denoiser, PROCESSES["uniform"], (2, 5), steps=4, sampler=in_two_speeds, seed=0)
    assert found.steps == found.nfe == 4
    level = PROCESSES["uniform"].sigma(torch.tensor([1, 0.75**2, 0.5**2, 0.25**2], dtype=torch.float64))
    seen = torch.stack([sigma for _, sigma in denoiser.asked])[:, 0].double()
    torch.testing.assert_close(seen, level, rtol=0, atol=2e-5)  # the grid ends at 1e-5, not at 0


# ------------------------------------------------------------------------------------------------ counts


@EVERY_PROCESS
@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize(("noise_removal", "extra"), [("ancestral", 0), ("greedy", 1), ("none", 0)])
def test_nfe_counts_forward_calls_and_progress_counts_steps(process, steps, noise_removal, extra):
    denoiser, ticks = Table(5), []
    found = sample(denoiser, process, (3, 5), steps=steps, noise_removal=noise_removal, seed=0, progress=ticks.append)
    assert found.nfe == len(denoiser.asked) <= steps + extra == sum(ticks)
    assert found.row_nfe.sum() == sum(len(x) for x, _ in denoiser.asked)
    assert found.steps == steps and found.trajectory is None
    assert found.ids.shape == (3, 5) and found.ids.dtype == torch.int64
    if process.mask_id is None:
        assert found.nfe == steps + extra and (found.row_nfe == found.nfe).all()


@pytest.mark.parametrize(("steps", "length"), [(4, 2), (16, 8), (64, 20)])
def test_rows_that_unmask_nothing_skip_the_forward(steps, length):
    """Each of L masks falls in one of N equal steps, and a row is asked in steps where at least one does."""
    rows, denoiser = 600, Table(length)
    found = sample(denoiser, PROCESSES["masked"], (rows, length), steps=steps, seed=0)
    expected = steps * (1 - (1 - 1 / steps) ** length)
    # The number of occupied steps varies by less than a binomial of the same mean; five standard errors.
    assert found.row_nfe.double().mean() == pytest.approx(expected, abs=5 * (expected / rows) ** 0.5)
    assert found.row_nfe.max() <= min(steps, length)
    assert found.nfe <= steps
    for before, after in itertools.pairwise(x for x, _ in denoiser.asked):
        assert (before == MASK).any(dim=1).all() and (after == MASK).any(dim=1).all()


def test_skipping_rows_changes_nothing():
    """A law that reads the network first asks for every row at every step; the ids are the same."""

    def eager(chain, steps):
        for t, s in itertools.pairwise(chain.times(steps)):
            chain.at(t)
            assert chain.log_p.shape == chain.ids.shape
            yield chain.posterior(t, s)

    lazy, full = (sample(Table(5), PROCESSES["masked"], (30, 5), steps=9, sampler=s, seed=0) for s in (None, eager))
    assert torch.equal(lazy.ids, full.ids)
    # While a row keeps its ids and time moves on, the eager form asks again.
    assert (full.row_nfe == 9).all() and (lazy.row_nfe < 9).all()


class Headed(Table):
    """A denoiser whose head can be asked for some positions alone."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.positions = 0

    def logits_at(self, x_t, sigma, wanted):
        self.positions += int(wanted.sum())
        return self(x_t, sigma)[wanted]


def test_a_head_is_asked_for_each_position_once():
    whole, headed = Table(6), Headed(6)
    one, other = (sample(d, PROCESSES["masked"], (20, 6), steps=5, seed=0) for d in (whole, headed))
    assert torch.equal(one.ids, other.ids) and torch.equal(one.row_nfe, other.row_nfe)
    assert headed.positions == 20 * 6


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_the_head_of_the_backbone_gives_the_logits_of_its_forward(backbone, time_conditioning):
    model = backbone(vocab_size=13, time_conditioning=time_conditioning).double()
    generator = torch.Generator().manual_seed(0)
    ids, wanted = torch.randint(13, (4, 8), generator=generator), torch.rand(4, 8, generator=generator) < 0.4
    sigma = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(model.logits_at(ids, sigma, wanted), model(ids, sigma)[wanted], rtol=0, atol=1e-12)


def test_a_hook_of_the_backbone_takes_part_in_sampling(backbone):
    model = copy.deepcopy(backbone(vocab_size=V))
    model.register_forward_hook(lambda module, arguments, logits: 1e3 * torch.eye(V)[2] + logits)
    for process in PROCESSES.values():
        assert (sample(model, process, (2, 6), steps=2, noise_removal="greedy", seed=0).ids == 2).all()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_denoiser_sees_the_published_grid_of_times(golden, index):
    grid, process, denoiser = golden("transitions")[f"grid.{index}.timesteps"], PROCESSES["uniform"], Table(5)
    sample(denoiser, process, (2, 5), steps=len(grid) - 1, noise_removal="greedy", seed=0)
    seen = torch.stack([sigma for _, sigma in denoiser.asked])
    assert seen.dtype == torch.float32
    expected = process.sigma(grid)[:, None].expand(-1, 2)  # greedy's extra call stands at the last time, 1e-5
    torch.testing.assert_close(seen.double(), expected, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ errors


@EVERY_PROCESS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_bad_number_stops_the_sampler(process, value):
    """Compared with NaN, every chance is false: without a check the prior would come back as a sample."""
    denoiser = Table(5)
    denoiser.own[:, 3, 0] = value
    with pytest.raises(TokenDriftError, match="logits of the denoiser are not finite"):
        sample(denoiser, process, (2, 5), steps=2, seed=0)


def test_the_greedy_tail_takes_no_token_from_bad_numbers():
    def late(x, sigma):
        return torch.full((*x.shape, V), torch.nan if sigma[0] < 1e-3 else 0.0)

    with pytest.raises(TokenDriftError, match="logits of the denoiser are not finite"):
        sample(late, PROCESSES["uniform"], (2, 5), steps=2, noise_removal="greedy", seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"steps": None}, "steps must be an integer of at least 1"),
        ({"steps": 2.0}, "steps must be an integer of at least 1"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"top_p": 2.0}, r"top_p must lie in \(0, 1\]"),
        ({"noise_removal": "argmax"}, "noise_removal must be one of 'ancestral', 'greedy', 'none'"),
        ({"shape": (2,)}, r"shape must be \(B, L\), both at least 1"),
        ({"shape": 5}, r"shape must be \(B, L\), both at least 1"),
        ({"sampler": "ancestral"}, r"sampler must be a sampler such as Ancestral\(\)"),
        ({"sampler": Ancestral}, r"sampler must be a sampler such as Ancestral\(\)"),
        ({"shape": (0, 5)}, r"shape must be \(B, L\), both at least 1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"first_row": -1}, "first_row must be an integer of at least 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"batch_size": 1, "trajectory": True}, "trajectory needs a single window and batch"),
        ({"stride": 2}, "stride requires window"),
        ({"given": torch.zeros(2, 5, dtype=torch.int64)}, "given and given_mask must be passed together"),
        ({"given_mask": torch.zeros(2, 5, dtype=torch.bool)}, "given and given_mask must be passed together"),
        (
            {"given": torch.zeros(2, 4, dtype=torch.int64), "given_mask": torch.zeros(2, 4, dtype=torch.bool)},
            r"given must have shape \(B, L\) = \(2, 5\)",
        ),
        (
            {"given": torch.full((2, 5), V), "given_mask": torch.ones(2, 5, dtype=torch.bool)},
            "given has ids from 5 to 5",
        ),
        (
            {"given": torch.full((2, 5), MASK), "given_mask": torch.ones(2, 5, dtype=torch.bool)},
            "given holds the mask",
        ),
        ({"denoiser": Table(5, vocab=V + 1)}, r"\(B, L, V\) = \(2, 5, 5\)"),
        ({"denoiser": lambda x, sigma: torch.zeros(2, V)}, r"denoiser\(x_t, sigma\) must have shape \(B, L, V\)"),
        ({"denoiser": lambda x, sigma: None}, r"denoiser\(x_t, sigma\) must be a tensor of shape \(B, L, V\)"),
        (
            {"sampler": lambda chain, steps: iter([Mixture(torch.ones(5), torch.zeros(5))])},
            r"probabilities of shape \(B, L\) = \(2, 5\)",
        ),
        *(
            (
                {"sampler": lambda chain, steps, law=law: iter([Mixture(*torch.full((2, 2, 5), law))])},
                "probabilities: stay and denoise, which together are at most 1",
            )
            for law in (torch.nan, 0.7)
        ),
        (
            {"sampler": lambda chain, steps: iter([chain.process.mixture(None, chain.ids, 1, 0)])},
            "the time at which the denoiser is called is not set",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    good = {"denoiser": Table(5), "process": PROCESSES["masked"], "shape": (2, 5), "steps": 2, "seed": 0}
    options = good | arguments
    with pytest.raises(TokenDriftError, match=message):
        sample(options.pop("denoiser"), options.pop("process"), options.pop("shape"), **options)
