"""Laws of categorical draws: the right chances, far into the tails, shown by exact strata instead of luck."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import TokenDriftError
from tokendrift.sampling import draw


def strata(count):
    """Return the midpoints of equal parts of [0, 1): draws with them have every chance to within 1/count."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 256, 257, 700])
def test_every_token_has_its_share_of_the_unit_interval(dtype, size):
    logits = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * 3).to(dtype)
    count = 20_000
    found = draw(logits.expand(count, -1), uniform=strata(count))
    share = torch.bincount(found.ids, minlength=size).double() / count
    p = logits.double().softmax(0)
    # Each token owns one interval, whose ends the strata miss by less than one part; float32 exponentials add 1e-6.
    torch.testing.assert_close(share, p, rtol=0, atol=1.01 / count + 1e-6)
    torch.testing.assert_close(found.log_p, p.log()[found.ids], rtol=0, atol=1e-5)


@given(st.integers(0, 599), st.floats(0, 1, exclude_max=True), st.sampled_from([20.0, 30.0]))
def test_a_rare_token_is_drawn_in_its_own_interval_and_nowhere_else(place, within, gap):
    """One token stands ``gap`` nats below each of 599 others: its interval is as wide as its chance says."""
    logits = torch.zeros(600)
    logits[place] = -gap
    p = math.exp(-gap) / (599 + math.exp(-gap))
    start, edge = place / (599 + math.exp(-gap)), 1e-15  # edge: rounding of sums near 1
    points = torch.tensor([start + edge + within * (p - 2 * edge), start - edge, start + p + edge], dtype=torch.float64)
    inside, before, after = (draw(logits.expand(3, -1), uniform=points.clamp(0, 1 - 2**-53)).ids == place).tolist()
    assert inside or p < 4 * edge
    assert not before or place == 0
    assert not after or place == 599


def test_events_of_chance_e_to_minus_20_come_at_their_rate():
    """The rare token owns the last 2.06e-9 of the interval; ten thousand draws around its lower end find half of it."""
    logits, rows = torch.tensor([0.0, -20.0]), 10_000
    edge, rare = 1 / (1 + math.exp(-20)), 1 / (1 + math.exp(20))
    uniform = edge - rare / 2 + rare * strata(rows)
    hits = (draw(logits.expand(rows, -1), uniform=uniform).ids == 1).double().mean().item()
    assert hits == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("size", [5, 300, 1024])
def test_the_ends_of_the_interval_give_possible_tokens(uniform, size):
    for possible in ([0], [size - 1], [1, size - 2]):
        logits = torch.full((1, size), -torch.inf)
        logits[:, possible] = torch.tensor([-3.0, 2.0])[: len(possible)]
        found = draw(logits, uniform=torch.tensor([uniform], dtype=torch.float64))
        assert found.ids.item() in possible


def test_rows_need_not_be_normalised():
    log_p = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, shifted = (draw(x, uniform=strata(50)) for x in (log_p, log_p + 123.0))
    assert torch.equal(one.ids, shifted.ids)
    torch.testing.assert_close(one.log_p, shifted.log_p, rtol=0, atol=1e-12)


def test_empty_batches_give_nothing():
    nothing = draw(torch.zeros(0, 5))
    assert nothing.ids.shape == nothing.log_p.shape == (0,)
    assert nothing.ids.dtype == torch.int64


def test_the_same_seed_gives_the_same_draws_and_leaves_the_input_alone():
    log_p = torch.randn(50, 9)
    before = log_p.clone()
    one, same, other = (draw(log_p, generator=torch.Generator().manual_seed(seed)).ids for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(log_p, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must have shape \(K, V\)"),
        ({"logits": torch.zeros(3, 0)}, r"logits must have shape \(K, V\)"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "logits must be floating point"),
        ({"logits": torch.zeros(3, 4), "uniform": torch.zeros(2)}, r"uniform must have shape \(K,\)"),
        ({"logits": torch.tensor([[0.0, torch.nan]])}, "logits of the denoiser are not finite"),
        ({"logits": torch.tensor([[0.0, torch.inf]])}, "logits of the denoiser are not finite"),
        ({"logits": torch.full((1, 3), -torch.inf)}, "logits of the denoiser are not finite"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(TokenDriftError, match=message):
        draw(**arguments)
