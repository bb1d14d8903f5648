"""The rate of a run reaches its peak, and its windows the end of the stream."""

from __future__ import annotations

import pytest
import torch

from tokendrift.training.optimization import SCHEDULES, LoopConfig, Optimization, windows


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 30, 99])
def test_the_rate_reaches_its_peak_and_never_rises_after_it(schedule, warmup):
    config = LoopConfig(100, learning_rate=3e-4, warmup=warmup, schedule=schedule)
    rates = [config.rate(step) for step in range(100)]
    assert max(rates) == config.learning_rate
    peak = rates.index(max(rates))
    assert peak == max(0, warmup - 1) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_a_run_shorter_than_its_warmup_rises_to_the_end():
    config = LoopConfig(4, learning_rate=1.0, warmup=8, schedule="cosine")
    assert [config.rate(step) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]


def test_windows_reach_the_last_token_and_a_stream_of_one_window_is_enough():
    assert next(windows(torch.arange(8), 8, 2, seed=0)).tolist() == [list(range(8))] * 2
    drawn = next(windows(torch.arange(10), 8, 200, seed=0))
    assert set(drawn[:, 0].tolist()) == {0, 1, 2}


def test_what_an_evaluation_gathered_is_given_back_after_the_weights_are():
    """As FSDP2 needs it: a root that stays gathered would go on with the average."""
    seen = []

    class Sharded(torch.nn.Linear):
        def reshard(self):
            seen.append(self.weight.item())

    model = Sharded(1, 1)
    optimization = Optimization(model, LoopConfig(1))
    weight = model.weight.item()
    optimization.average.values[0].fill_(7.0)
    with optimization.evaluating():
        assert model.weight.item() == 7.0 and not model.training
    assert seen == [weight]
