"""Distances between sets of features: closed forms, the level and power of the test, agreement with the package."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from tokendrift import PooledFeatures, TokenDriftError
from tokendrift.evaluation import character_features, encoder_features, judge_features, kernel_distance, mauve
from tokendrift.evaluation.judge import Judge
from tokendrift.evaluation.two_sample import _mauve_score


def cloud(n, *, seed, width=6, shift=0.0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def by_hand(x, y, s):
    kernel = lambda a, b: math.exp(-((a - b) ** 2).sum().item() / (2 * s**2))  # noqa: E731
    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_the_distance_is_the_unbiased_one():
    x, y = cloud(7, seed=0), cloud(5, seed=1, shift=0.5)
    found = kernel_distance(x, y, bandwidth=1.5, permutations=9, resamples=50)
    assert found.distance.estimate == pytest.approx(by_hand(x, y, 1.5), abs=1e-12)
    assert (found.generated, found.real, found.permutations) == (7, 5, 9)
    assert kernel_distance(y, x, bandwidth=1.5, permutations=9, resamples=50).distance.estimate == pytest.approx(
        found.distance.estimate, abs=1e-12
    )


def test_two_gaussians_are_as_far_apart_as_their_formula_says():
    found = kernel_distance(
        cloud(1500, seed=0, width=1), cloud(1500, seed=1, width=1, shift=1.0), bandwidth=1.0, permutations=1
    )
    exact = 2 / math.sqrt(3) * (1 - math.exp(-1 / 6))  # k convolved with N(0, 2): width^2 1 + 2
    assert found.distance.low < exact < found.distance.high


def test_the_energy_distance_of_two_gaussians_is_that_of_their_formula():
    x, y = cloud(1500, seed=0, width=1), cloud(1500, seed=1, width=1, shift=1.0)
    found = kernel_distance(x, y, kernel="energy", permutations=20)
    # E|X - Y| for X - Y ~ N(1, 2), against E|X - X'| = 2 / sqrt(pi).
    across = 2 / math.sqrt(math.pi) * math.exp(-1 / 4) + math.erf(1 / 2)
    assert found.distance.low < 2 * across - 4 / math.sqrt(math.pi) < found.distance.high
    assert found.bandwidth is None and found.z_score.low > 20
    with pytest.raises(TokenDriftError, match="the energy distance has no bandwidth"):
        kernel_distance(x, y, kernel="energy", bandwidth=1.0)


def test_the_z_score_of_equal_laws_is_about_one():
    scores = [
        kernel_distance(cloud(40, seed=2 * s), cloud(40, seed=2 * s + 1), kernel="energy", permutations=99).z_score
        for s in range(40)
    ]
    values = torch.tensor([score.estimate for score in scores])
    assert values.mean().abs() < 0.6 and 0.6 < values.std() < 1.6


def test_character_features_are_the_roots_of_shares():
    found = character_features(["abab", "ab", ""], n=2, buckets=4096)
    assert found.square().sum(dim=1).tolist() == pytest.approx([1, 1, 1])
    assert sorted(found[0][found[0] > 0].square().tolist()) == pytest.approx([1 / 3, 2 / 3])  # ab twice, ba once
    assert (found[0] * found[1]).sum().item() == pytest.approx(math.sqrt(2 / 3))


def test_the_interval_covers_the_distance():
    exact, covered, trials = 2 / math.sqrt(3) * (1 - math.exp(-1 / 6)), 0, 60
    for seed in range(trials):
        x, y = cloud(100, seed=2 * seed, width=1), cloud(100, seed=2 * seed + 1, width=1, shift=1.0)
        interval = kernel_distance(x, y, bandwidth=1.0, permutations=1, resamples=300).distance
        covered += interval.low <= exact <= interval.high
    assert covered / trials > 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)


def test_equal_sets_have_no_distance_beyond_chance_and_far_ones_the_least_p():
    points = cloud(60, seed=0)
    assert kernel_distance(points, cloud(60, seed=1, shift=3.0), permutations=199).p_value == 1 / 200
    assert kernel_distance(points[:30], points[30:], permutations=199).p_value > 0.01
    assert kernel_distance(torch.ones(4, 2), torch.ones(5, 2), permutations=9).p_value == 1.0


@pytest.mark.parametrize("kernel", ["gaussian", "energy", "linear"])
def test_the_test_does_not_depend_on_the_unit_of_the_features(kernel):
    x, y = cloud(20, seed=0), cloud(20, seed=1, shift=3.0)
    for unit in (1.0, 1e-8, 1e8):
        assert kernel_distance(unit * x, unit * y, kernel=kernel, permutations=99, resamples=10).p_value == 0.01


@pytest.mark.parametrize("n", [2, 3, 5])
def test_sets_of_a_few_vectors_have_an_interval(n):
    """Redraws that repeat one vector have no pair, and say nothing."""
    found = kernel_distance(cloud(n, seed=0), cloud(n, seed=1, shift=9.0), permutations=9)
    assert math.isfinite(found.distance.low) and found.distance.excludes(0.0)


def test_equal_vectors_do_not_take_the_scale_from_the_others():
    x, y = torch.zeros(20, 2).double(), torch.zeros(20, 2).double()
    y[:3] = 1e-3 * cloud(3, seed=0, width=2)
    small, large = (kernel_distance(unit * x, unit * y, permutations=9, resamples=9) for unit in (1.0, 1e6))
    assert 0 < small.bandwidth < 0.01 and small.distance.estimate > 1e-3
    assert large.distance.estimate == pytest.approx(small.distance.estimate, rel=1e-9)
    assert kernel_distance(x, x, permutations=9, resamples=9).distance == (0, 0, 0)


def test_one_permutation_gives_no_spread_and_no_z_score():
    found = kernel_distance(cloud(9, seed=0), cloud(9, seed=1, shift=3.0), permutations=1, resamples=10)
    assert math.isnan(found.spread) and math.isnan(found.z_score.estimate)


def test_the_same_seed_gives_the_same_result():
    x, y = cloud(20, seed=0), cloud(30, seed=1)
    before = torch.get_rng_state()
    first = kernel_distance(x, y, permutations=49)
    assert first == kernel_distance(x, y, permutations=49)
    assert torch.equal(before, torch.get_rng_state())
    assert json.loads(json.dumps(first.to_dict()))["p_value"] == first.p_value


@pytest.mark.statistical
def test_the_test_keeps_its_level_and_has_power():
    trials, n = 400, 40
    few = {"permutations": 99, "resamples": 1}
    null = [kernel_distance(cloud(n, seed=2 * s), cloud(n, seed=2 * s + 1), **few) for s in range(trials)]
    for level in (0.05, 0.1, 0.5):
        share = sum(found.p_value <= level for found in null) / trials
        # A permutation test is exact: four standard errors of a rate.
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / trials)
    pairs = ((cloud(n, seed=2 * s), cloud(n, seed=2 * s + 1, shift=0.5)) for s in range(100))
    shifted = [kernel_distance(x, y, **few) for x, y in pairs]
    assert sum(found.p_value <= 0.05 for found in shifted) > 90


def test_features_of_an_encoder_and_of_a_judge_do_not_depend_on_batches(backbone):
    encoder = backbone(vocab_size=13, length=8)
    table = encoder.vocab_embed.embedding if hasattr(encoder, "vocab_embed") else encoder.embedding
    ids = torch.randint(13, (7, 8), generator=torch.Generator().manual_seed(0))
    features = PooledFeatures(encoder)
    whole = encoder_features(table.detach(), features, ids, batch_size=7)
    torch.testing.assert_close(
        whole, encoder_features(table.detach(), features, ids, batch_size=2), rtol=1e-5, atol=1e-6
    )
    assert whole.shape == (7, 32)
    windows = encoder_features(table.detach(), PooledFeatures(encoder, window=4), ids)
    assert windows.shape == whole.shape


@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_layer=2, n_embd=16, n_head=2, n_positions=16, eos_token_id=0)
    return Judge(transformers.GPT2LMHeadModel(config).eval())


def test_judge_features_are_the_last_hidden_state_of_the_last_token(gpt2):
    sequences = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    found = judge_features(sequences, gpt2, batch_size=2)
    for ids, row in zip(sequences, found, strict=True):
        with torch.no_grad():
            hidden = gpt2.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(row, hidden[0, -1], rtol=1e-5, atol=1e-6)
    assert judge_features([[1] * 40], gpt2).equal(judge_features([[1] * 16], gpt2))  # what the judge can read


def test_mauve_is_that_of_the_package_and_needs_no_network(gpt2):
    pytest.importorskip("mauve")
    from mauve import compute_mauve

    x, y = cloud(200, seed=0), cloud(200, seed=1, shift=0.4)
    found = mauve(x, y, seeds=1, resamples=200)
    theirs = compute_mauve(p_features=y.numpy(), q_features=x.numpy(), seed=25, verbose=False)
    assert found.score.estimate == pytest.approx(theirs.mauve, abs=1e-12)
    histograms = (torch.tensor(h, dtype=torch.float64)[None] for h in (theirs.p_hist, theirs.q_hist))
    assert _mauve_score(*histograms, 5.0).item() == pytest.approx(theirs.mauve, abs=1e-12)
    assert 0 <= found.score.low < found.score.estimate < found.score.high <= 1
    assert (found.buckets, found.scaling_factor, found.seed_spread) == (20, 5.0, 0.0)
    assert mauve(x, x, seeds=2, resamples=50).score.estimate == pytest.approx(1.0)
    ids = torch.randint(20, (20, 8), generator=torch.Generator().manual_seed(0))
    features = judge_features(ids, gpt2)
    assert 0 <= mauve(features[:10], features[10:], seeds=1, resamples=50).score.estimate <= 1


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(TokenDriftError, match=r"pip install 'tokendrift\[mauve\]'"):
        mauve(cloud(4, seed=0), cloud(4, seed=1))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda gpt2: kernel_distance(cloud(4, seed=0), cloud(4, seed=1, width=5)), "must have one width M"),
        (
            lambda gpt2: kernel_distance(cloud(1, seed=0), cloud(4, seed=1)),
            "generated needs at least 2 feature vectors",
        ),
        (lambda gpt2: kernel_distance(cloud(3, seed=0).long(), cloud(4, seed=1)), "generated must be floating point"),
        (lambda gpt2: kernel_distance(cloud(3, seed=0), cloud(4, seed=1), permutations=0), "permutations must be an"),
        (lambda gpt2: kernel_distance(cloud(4, seed=0), cloud(4, seed=1).log()), "real has features that are NaN"),
        (lambda gpt2: judge_features([[1, 2]], Judge(lambda ids, mask: ids)), "the judge returns no hidden states"),
        (lambda gpt2: judge_features([[1], []], gpt2), "sample 1 is empty and has no features"),
        (lambda gpt2: judge_features([[20]], gpt2), "the judge's vocabulary V has 20 entries"),
    ],
)
def test_what_has_no_distance_is_named(gpt2, call, says):
    with pytest.raises(TokenDriftError, match=says):
        call(gpt2)
