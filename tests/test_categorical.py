"""Laws of categorical draws: the right rates, far into the tails."""

from __future__ import annotations

import math

import pytest
import torch

from tokendrift.sampling import categorical, draw


def chi_square(ids, p):
    """Pearson's statistic of draws (K,) against a law (V,); entries without chance must never occur."""
    counts = torch.bincount(ids, minlength=len(p)).double()
    assert (counts[p == 0] == 0).all()
    expected = (len(ids) * p)[p > 0]
    return ((counts[p > 0] - expected).square() / expected).sum().item()


@pytest.mark.statistical
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_draws_follow_the_law_of_their_row(generator, dtype):
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, -torch.inf, 0.5, -5.0], dtype=dtype)
    ids = draw(logits.expand(400_000, -1), generator=generator)
    # 5 degrees of freedom: a right sampler exceeds 28 once in 25,000 seeds.
    assert chi_square(ids, logits.double().softmax(0)) < 28


def test_events_of_chance_e_to_minus_20_come_at_their_rate(monkeypatch, generator):
    """One strong token 20 nats ahead of a weak one, in rows where the weak token's uniform is below 1e-7.

    The weak token can win in no other rows (it needs E_weak < e^-20 E_strong), and such rows are one in ten
    million: given one, it must win with chance e^-20 / 1e-7 = 2.06%. Uniforms keep the grid of the dtype that is
    asked for, 2^-53 or 2^-24; on the coarse one 1e-7 leaves the values 0 and 2^-24, and the rate is far off.
    """
    rows, bound = 200_000, 1e-7

    def rare_rows(shape, *, generator, device, dtype):
        uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
        uniform[:, 1] *= bound
        grid = 2.0**53 if dtype == torch.float64 else 2.0**24
        return ((uniform * grid).floor() / grid).to(dtype)

    class Torch:
        rand = staticmethod(rare_rows)

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(categorical, "torch", Torch())
    hits = draw(torch.tensor([[0.0, -20.0]]).expand(rows, -1), generator=generator).sum().item()
    expected = rows * math.exp(-20) / bound
    assert abs(hits - expected) < 5 * expected**0.5


def test_rows_need_not_be_normalised():
    log_p = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, shifted = (draw(x, generator=torch.Generator().manual_seed(1)) for x in (log_p, log_p + 123.0))
    assert torch.equal(one, shifted)


def test_certain_rows_give_their_token_and_empty_batches_nothing():
    certain = torch.full((100, 5), -torch.inf)
    certain[:, 3] = 0.0
    assert (draw(certain) == 3).all()
    nothing = draw(torch.zeros(0, 5))
    assert nothing.shape == (0,)
    assert nothing.dtype == torch.int64


def test_the_same_seed_gives_the_same_draws_and_leaves_the_input_alone():
    log_p = torch.randn(50, 9, dtype=torch.float64)
    before = log_p.clone()
    one, same, other = (draw(log_p, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(log_p, before)
