"""Laws of the rows' own random numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import TokenDriftError
from tokendrift.sampling.noise import WORD, RowNoise, mixed, subseed

CPU = torch.device("cpu")


@given(st.integers(0, 2**70), st.integers(0, 2**33))
def test_seeds_of_rows_are_words(seed, row):
    assert 0 <= subseed(seed, row) < WORD


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7])
def test_no_two_rows_of_a_run_share_a_stream(seed):
    assert len({subseed(seed, row) for row in range(50_000)}) == 50_000


def test_scrambling_is_one_to_one_and_seeds_far_and_near_differ():
    assert len({mixed(value) for value in range(0, WORD, WORD // 50_000)}) == len(range(0, WORD, WORD // 50_000))
    assert len({subseed(seed, 0) for seed in [*range(1000), *(2**32 * k for k in range(1, 1000))]}) == 1999


def test_a_row_has_its_numbers_in_every_batch():
    together = RowNoise(3, 0, 6, CPU)
    parts = [RowNoise(3, 0, 2, CPU), RowNoise(3, 2, 1, CPU), RowNoise(3, 3, 3, CPU)]
    for shape in [(5,), (2, 7), ()]:
        assert torch.equal(together.uniform(*shape), torch.cat([part.uniform(*shape) for part in parts]))


def test_numbers_are_uniform_and_independent_between_rows_and_seeds():
    numbers = RowNoise(0, 0, 200, CPU).uniform(500)
    assert numbers.dtype == torch.float64 and numbers.min() >= 0 and numbers.max() < 1
    # 100,000 numbers: mean and correlation of right ones lie within five of these standard deviations.
    assert abs(numbers.mean() - 0.5) < 5 / (12 * numbers.numel()) ** 0.5
    centred = numbers - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1), RowNoise(1, 0, 200, CPU).uniform(500) - 0.5):
        assert abs((centred * other).mean()) * 12 < 5 / numbers.numel() ** 0.5
    first = RowNoise(0, 0, 100_000, CPU).uniform()  # across rows, where seeds are neighbours
    assert abs(first.mean() - 0.5) < 5 / (12 * len(first)) ** 0.5
    assert abs(((first - 0.5) * (first.roll(1) - 0.5)).mean()) * 12 < 5 / len(first) ** 0.5


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(TokenDriftError, match="seed must be an integer of at least 0"):
        RowNoise(seed, 0, 1, CPU)
