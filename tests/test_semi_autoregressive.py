"""Laws of sampling past the model's length."""

from __future__ import annotations

import pytest
import torch
from sampling_laws import MASK, PROCESSES, Table, V, assert_follows, final_law, number, states

from tokendrift import TokenDriftError
from tokendrift.sampling import Ancestral, FirstHitting, sample

EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


class Watched(Table):
    """Remembers widths and refuses windows that are too wide."""

    def __call__(self, x_t, sigma):
        assert x_t.shape[1] == 4
        return super().__call__(x_t, sigma)


@EVERY_PROCESS
@pytest.mark.parametrize(("length", "stride", "windows"), [(4, 2, 1), (6, 2, 2), (9, 2, 4), (9, 3, 3), (16, None, 7)])
def test_windows_cover_the_sequence(process, length, stride, windows):
    found = sample(Watched(4), process, (3, length), window=4, stride=stride, steps=2, seed=0)
    assert found.ids.shape == (3, length)
    assert process.mask_id is None or (found.ids != MASK).all()
    assert found.steps == 2 * windows
    assert found.nfe <= 2 * windows and (found.row_nfe <= found.nfe).all()


@EVERY_PROCESS
def test_each_window_keeps_what_stands_and_sees_it(process):
    denoiser, length, stride = Watched(4), 8, 2
    found = sample(denoiser, process, (5, length), window=4, stride=stride, steps=3, seed=0)
    first = sample(Table(4), process, (5, 4), steps=3, seed=0)
    assert torch.equal(found.ids[:, :4], first.ids)  # what comes later does not change what stands
    shortest = sample(Table(4), process, (5, 4), window=4, steps=3, seed=0)
    assert torch.equal(shortest.ids, first.ids)
    if process.mask_id is None:
        seen = [x for x, _ in denoiser.asked]
        for index, start in enumerate([0, 2, 4]):
            for x in seen[3 * index : 3 * index + 3]:
                assert index == 0 or torch.equal(x[:, :2], found.ids[:, start : start + 2])


def test_the_second_window_follows_the_law_given_the_first():
    process, denoiser = PROCESSES["masked"], Table(2)
    found = sample(denoiser, process, (20_000, 3), window=2, stride=1, steps=2, seed=0)
    first = final_law(process, Ancestral(), denoiser, 2, 2)
    assert_follows(number(found.ids[:, :2]), first)
    token = int(found.ids[:, 1].mode().values)
    rows = found.ids[found.ids[:, 1] == token]
    logits = denoiser(torch.tensor([[token, MASK]]), None)[0, 1]
    logits[MASK] = -torch.inf
    assert_follows(rows[:, 2], logits.softmax(0))
    assert len(states(2)) == V**2


@EVERY_PROCESS
def test_given_tokens_stay_in_all_windows(process):
    given = torch.randint(0, V - 1, (6, 11), generator=torch.Generator().manual_seed(0))
    given_mask = torch.rand(6, 11, generator=torch.Generator().manual_seed(1)) < 0.4
    found = sample(Watched(4), process, (6, 11), window=4, steps=2, given=given, given_mask=given_mask, seed=0)
    assert (found.ids[given_mask] == given[given_mask]).all()


@EVERY_PROCESS
def test_the_same_seed_gives_the_same_ids_in_any_split(process):
    options = {"window": 4, "steps": 2, "seed": 5}
    together = sample(Table(4), process, (6, 10), **options)
    parts = [sample(Table(4), process, (3, 10), first_row=row, **options) for row in (0, 3)]
    assert torch.equal(together.ids, torch.cat([part.ids for part in parts]))


def test_any_sampler_serves():
    found = sample(Table(4), PROCESSES["masked"], (3, 10), window=4, sampler=FirstHitting(), seed=0)
    assert found.row_nfe.tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be an integer of at least 2"),
        ({"stride": 4}, "stride must be below window"),
        ({"stride": 0}, "stride must be an integer of at least 1"),
        ({"trajectory": True}, "trajectory needs a single window"),
        ({"given": torch.zeros(2, 9, dtype=torch.int64)}, "given and given_mask must be passed together"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(TokenDriftError, match=message):
        sample(Table(4), PROCESSES["masked"], (2, 9), **{"window": 4, "steps": 2} | options)
