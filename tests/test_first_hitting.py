"""Laws of first-hitting: one token a step, in random order, at the times of ancestral sampling with many steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from sampling_laws import MASK, PROCESSES, Table, V, assert_follows, final_law, law_of_x0, number, states

from tokendrift import TokenDriftError
from tokendrift.diffusion import Cosine, LogLinear, MaskedDiffusion
from tokendrift.sampling import Ancestral, FirstHitting, sample

MASKED = PROCESSES["masked"]


def any_order_law(denoiser, length):
    """The law of filling masks one by one in an order drawn uniformly, (V^L,)."""
    every, law = states(length), torch.zeros(V**length, dtype=torch.float64)
    for order in itertools.permutations(range(length)):
        chance, present = torch.ones(len(every), dtype=torch.float64), torch.full_like(every, MASK)
        for place in order:
            p = law_of_x0(MASKED, denoiser(present, None))[:, place]
            chance = chance * p.gather(1, every[:, place : place + 1])[:, 0]
            present[:, place] = every[:, place]
        law += chance
    return law / law.sum()


@pytest.mark.parametrize("length", [2, 3])
def test_samples_follow_the_law_of_random_order(length):
    found = sample(Table(length), MASKED, (6000, length), sampler=FirstHitting(), seed=0)
    assert_follows(number(found.ids), any_order_law(Table(length), length))


def test_ancestral_sampling_tends_to_it_with_many_steps():
    """Two masks fall together with chance about 1/N, so the distance falls like 1/N."""
    limit = any_order_law(Table(2), 2)
    far, near = ((final_law(MASKED, Ancestral(), Table(2), 2, n) - limit).abs().sum() for n in (50, 200))
    assert near < far / 3.5 and near < 0.01


def test_every_row_costs_its_own_masks():
    given = torch.zeros(3, 5, dtype=torch.int64)
    given_mask = torch.tensor([[True] * 5, [True, False, False, True, True], [False] * 5])
    denoiser = Table(5)
    found = sample(
        denoiser, MASKED, (3, 5), sampler=FirstHitting(), given=given, given_mask=given_mask, trajectory=True
    )
    assert found.row_nfe.tolist() == [0, 2, 5]
    assert found.steps == found.nfe == 5
    for before, after in itertools.pairwise(found.trajectory):
        assert ((before != after).sum(dim=1) <= 1).all()


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()])
def test_rows_have_clocks_of_their_own_that_run_as_the_schedule_says(schedule):
    """The noise level at the k-th of L events is the (L-k+1)-th largest of L uniforms times the first level."""
    process, denoiser, rows, length = MaskedDiffusion(V, schedule=schedule), Table(3), 4000, 3
    sample(denoiser, process, (rows, length), sampler=FirstHitting(), seed=0)
    level = torch.stack([1 - torch.exp(-sigma.double()) for _, sigma in denoiser.asked])
    assert (level.diff(dim=0) < 0).all()
    assert level[0].unique().numel() > rows / 2
    first = 1 - schedule.alpha(torch.tensor(1.0, dtype=torch.float64))
    expected = first * torch.tensor([3, 2, 1], dtype=torch.float64) / 4
    # Standard deviation of an order statistic of three is at most 0.23; five standard errors.
    torch.testing.assert_close(level.mean(1), expected, rtol=0, atol=5 * 0.23 / rows**0.5)


def test_what_does_not_belong_is_refused():
    with pytest.raises(TokenDriftError, match="first-hitting requires a masked process"):
        sample(Table(2), PROCESSES["uniform"], (2, 2), sampler=FirstHitting())
    with pytest.raises(TokenDriftError, match="steps must be left out"):
        sample(Table(2), MASKED, (2, 2), steps=4, sampler=FirstHitting())
