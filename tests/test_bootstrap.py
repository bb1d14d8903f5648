"""Bootstrap intervals: closed forms, coverage, pairing, seeds."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tokendrift import TokenDriftError
from tokendrift.evaluation import bootstrap_interval, perplexity_interval, perplexity_ratio_interval
from tokendrift.evaluation.bootstrap import halves, interval_from


class Corpus(NamedTuple):
    """Per-sample NLL and counts, as `PerplexityResult` holds them."""

    sample_nll: Tensor
    sample_tokens: Tensor
    protocol: str = "all"


def corpus(n=400, *, level=3.0, seed=0, protocol="all"):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, 33, (n,), generator=generator)
    return Corpus(tokens * (level + 0.3 * torch.randn(n, generator=generator).double()), tokens, protocol)


def mean(values):
    return values.mean(dim=-1)


def test_the_interval_of_a_mean_is_the_normal_one():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = bootstrap_interval(mean, values, resamples=4000)
    width = 2 * 1.959964 * values.std().item() / math.sqrt(2000)
    assert interval.estimate == pytest.approx(values.mean().item(), abs=1e-15)
    # A 2.5% quantile of 4000 values is known to about 2.7% of the standard error.
    assert interval.high - interval.low == pytest.approx(width, rel=0.05)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_cover_the_truth_as_often_as_they_say(level):
    trials, n = 400, 60
    data = torch.randn(trials, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covered = 0
    for seed, values in enumerate(data):
        interval = bootstrap_interval(mean, values, resamples=300, level=level, seed=seed)
        covered += interval.low <= 0 <= interval.high
    # Four standard errors of a rate, and 2% for the known shortness of percentile intervals at n = 60.
    assert abs(covered / trials - level) < 4 * math.sqrt(level * (1 - level) / trials) + 0.02


def test_the_spread_over_halves_is_that_of_a_draw_of_all():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = halves(400, 4000, torch.Generator().manual_seed(1))
    assert (half.sum(dim=1) == 200).all()
    means = (half.double() @ values) / 200
    # A standard deviation from 4000 values is known to 1.1 %; two of them.
    assert means.std().item() == pytest.approx(values.std().item() / 20, rel=0.025)


def test_centring_moves_the_interval_to_the_estimate_and_keeps_its_width():
    replicates = torch.randn(999, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bare, centred = interval_from(5.0, replicates), interval_from(5.0, replicates, centred=True)
    assert bare.excludes(5.0)
    assert not centred.excludes(5.0)
    assert centred.high - centred.low == pytest.approx(bare.high - bare.low, rel=1e-12)


def test_redraws_without_a_value_are_left_out_and_an_unknown_interval_excludes_nothing():
    replicates = torch.tensor([0.0, math.nan, 1.0, 2.0])
    assert interval_from(1.0, replicates, 0.5) == interval_from(1.0, replicates[[0, 2, 3]], 0.5) == (1.0, 0.5, 1.5)
    for unknown in (interval_from(math.nan, replicates), interval_from(1.0, torch.full((3,), math.nan))):
        assert math.isnan(unknown.low) and math.isnan(unknown.high)
        assert not unknown.excludes(0.0)


def test_same_seed_same_interval_and_the_global_state_stays():
    values = torch.arange(50.0)
    before = torch.get_rng_state()
    first = bootstrap_interval(mean, values, seed=3)
    assert first == bootstrap_interval(mean, values, seed=3)
    assert first != bootstrap_interval(mean, values, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_values_of_one_sample_are_redrawn_together():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = bootstrap_interval(lambda a, b: (a - b).mean(dim=-1), values, values)
    assert interval == (0, 0, 0)


def test_gen_ppl_moves_with_its_samples():
    corpora = {protocol: corpus(protocol=protocol) for protocol in ("all", "sdtt", "sedd")}
    for protocol, scored in corpora.items():
        interval = perplexity_interval(scored)
        assert interval.low < interval.estimate < interval.high
        assert interval.estimate == pytest.approx(math.exp(3), rel=0.1), protocol
    pooled = corpora["all"]
    by_hand = math.exp(pooled.sample_nll.sum() / pooled.sample_tokens.sum())
    assert perplexity_interval(pooled).estimate == pytest.approx(by_hand, rel=1e-12)


def test_the_interval_narrows_as_the_root_of_the_samples():
    def width(n):
        interval = perplexity_interval(corpus(n), resamples=2000)
        return math.log(interval.high / interval.low)

    assert width(400) / width(6400) == pytest.approx(4, rel=0.15)


def test_a_ratio_inverts_and_a_corpus_equals_itself_when_paired():
    a, b = corpus(level=3.0), corpus(level=3.1, seed=1)
    paired, reverse = perplexity_ratio_interval(a, b, paired=True), perplexity_ratio_interval(b, a, paired=True)
    assert reverse.estimate == pytest.approx(1 / paired.estimate, rel=1e-12)
    assert reverse.low == pytest.approx(1 / paired.high, rel=1e-9)
    assert perplexity_ratio_interval(a, a, paired=True) == (1, 1, 1)


def test_pairing_narrows_where_samples_go_together():
    a = corpus()
    b = a._replace(sample_nll=a.sample_nll * 0.99)
    paired, unpaired = perplexity_ratio_interval(b, a, paired=True), perplexity_ratio_interval(b, a)
    assert paired.high < 1 < unpaired.high
    assert paired.estimate == unpaired.estimate


def test_unpaired_corpora_may_differ_in_size():
    ratio = perplexity_ratio_interval(corpus(300, level=2.5), corpus(500, level=3.0, seed=1))
    assert ratio.low < math.exp(-0.5) < ratio.high


def test_a_perplexity_too_large_for_floats_still_has_a_ratio():
    a = Corpus(torch.full((4,), 8000.0), torch.full((4,), 8))
    b = Corpus(torch.full((4,), 8008.0), torch.full((4,), 8))
    assert perplexity_ratio_interval(b, a).estimate == pytest.approx(math.e, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bootstrap_interval(mean), "needs at least one array"),
        (lambda: bootstrap_interval(mean, torch.ones(1)), "needs at least 2 of them"),
        (lambda: bootstrap_interval(mean, torch.ones(3, 2)), r"same shape \(n,\)"),
        (lambda: bootstrap_interval(lambda a, b: mean(a), torch.ones(3), torch.ones(4)), r"same shape \(n,\)"),
        (lambda: bootstrap_interval(torch.mean, torch.ones(3)), r"values \(R,\) = \(1,\)"),
        (lambda: bootstrap_interval(mean, torch.ones(3), level=1.0), "level must lie between 0 and 1"),
        (lambda: bootstrap_interval(mean, torch.ones(3), resamples=0), "resamples must be an integer of at least 1"),
        (lambda: perplexity_ratio_interval(corpus(), corpus(protocol="mdlm")), "the two cannot be compared"),
        (lambda: perplexity_ratio_interval(corpus(4), corpus(5), paired=True), "equally many samples of a and b"),
    ],
)
def test_what_cannot_be_resampled_is_named(call, says):
    with pytest.raises(TokenDriftError, match=says):
        call()
