"""The gradient moment: brute force, the estimate in expectation, published code, and what it is measured on."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import nn

from tokendrift import TokenDriftError
from tokendrift.demo import PRETRAINED
from tokendrift.evaluation import (
    GenerativePerplexity,
    SampleSet,
    evaluate,
    gradient_features,
    gradient_moment,
    kernel_distance,
)
from tokendrift.evaluation.gradient_moment import folded

ONE_DRAW = {"permutations": 1, "resamples": 1}


class Bigrams(nn.Module):
    """A judge whose parameters are the logits of the next token, and one that nothing depends on."""

    def __init__(self, vocab_size=5, positions=64):
        super().__init__()
        table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.table, self.unused = nn.Parameter(table), nn.Parameter(torch.ones(3))
        self.config = type("Config", (), {"max_position_embeddings": positions, "vocab_size": vocab_size})()

    def forward(self, ids, attention_mask):
        return self.table[ids]


@pytest.fixture
def bigrams():
    return GenerativePerplexity(Bigrams(), protocol="all")


def gradients(judge, samples):
    """The gradient of the mean NLL of each sample, one by one: (n, P)."""
    model = judge.judge.model
    rows = []
    for sample in samples:
        ids = torch.as_tensor(sample)[None]
        logits = model(ids, torch.ones_like(ids))
        loss = nn.functional.cross_entropy(getattr(logits, "logits", logits)[0, :-1], ids[0, 1:])
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        weights = zip(found, model.parameters(), strict=True)
        rows.append(torch.cat([(torch.zeros_like(w) if g is None else g).flatten().double() for g, w in weights]))
    return torch.stack(rows)


def distance_of_means(x, y):
    return float((x.mean(dim=0) - y.mean(dim=0)).square().sum())


def test_it_is_the_distance_of_explicit_gradients_whatever_the_lengths(bigrams):
    sets = [[1, 2, 3, 0], [4, 4], [0, 1, 0, 1, 2]], [[3, 1, 4], [2, 2, 2, 2]]
    x, y = (gradients(bigrams, samples) for samples in sets)
    pairs_x, pairs_y = x @ x.T, y @ y.T
    expected = (pairs_x.sum() - pairs_x.trace()) / 6 + (pairs_y.sum() - pairs_y.trace()) / 2 - 2 * (x @ y.T).mean()
    found = gradient_moment(*sets, bigrams, **ONE_DRAW)
    assert found.distance.estimate == pytest.approx(float(expected), abs=1e-14)
    assert (found.generated, found.real, found.bandwidth) == (3, 2, None)
    features = gradient_features(sets[0], bigrams)
    torch.testing.assert_close(features @ features.T, pairs_x, rtol=0, atol=1e-14)
    assert features.dtype == torch.float64 and bigrams.judge.model.table.grad is None


def test_over_all_draws_it_is_the_distance_of_the_laws(bigrams):
    """Two samples each of three that are equally likely: 81 pairs of sets, among them those that repeat a sample."""
    generated, real = [[1, 2, 3], [0, 0, 1], [4, 2, 1]], [[1, 1, 1], [3, 2, 0], [2, 4, 4]]
    features = [gradient_features(samples, bigrams) for samples in (generated, real)]
    for x, y in (features, (features[0], features[0])):
        estimates = [
            kernel_distance(x[[*i]], y[[*j]], kernel="linear", **ONE_DRAW).distance.estimate
            for i, j in product(product(range(3), repeat=2), repeat=2)
        ]
        assert sum(estimates) / 81 == pytest.approx(distance_of_means(x, y), abs=1e-14)
    assert min(estimates) < 0 < max(estimates)  # of equal laws, whose distance is 0


def halved(rows):
    """All ways to cut four rows into two ordered halves, each as its mean."""
    for half in combinations(range(4), 2):
        yield rows[[*half]].mean(dim=0), rows[[i for i in range(4) if i not in half]].mean(dim=0)


def test_it_is_the_mean_over_all_halves_of_the_published_estimate(bigrams):
    ids = torch.randint(5, (8, 6), generator=torch.Generator().manual_seed(0))
    x, y = gradients(bigrams, ids[:4]), gradients(bigrams, ids[4:])
    products = [float((a - c) @ (b - d)) for a, b in halved(x) for c, d in halved(y)]
    found = gradient_moment(ids[:4], ids[4:], bigrams, **ONE_DRAW)
    assert found.distance.estimate == pytest.approx(sum(products) / 36, abs=1e-14)


def test_the_published_package_gives_this_number():
    """The mean of gradient_moment_estimate over the same 36 halves, for the judge that ships with the package.

    Source: ehoogeboom/gradient-moment on GitHub, commit 9155ddb, with the loss of causal_lm_forward, in float64.
    """
    pytest.importorskip("transformers")
    judge = GenerativePerplexity(str(PRETRAINED / "judge"), protocol="all")
    judge.judge.model.double()
    sets = [torch.arange(128).view(4, 32) * 7 % 1024, torch.arange(128).view(4, 32) ** 2 % 1024]
    whole = [gradient_features(ids, judge, width=10**6) for ids in sets]
    assert whole[0].shape == (4, 932608)  # every parameter, the tied embedding once
    found = kernel_distance(*whole, kernel="linear", **ONE_DRAW)
    assert found.distance.estimate == pytest.approx(-25.95399923310812, rel=1e-9)
    # Five standard deviations of a product of two projections.
    x, projected = whole[0], gradient_features(sets[0], judge, width=8191)
    error = (projected @ projected.T - x @ x.T) / (x.norm(dim=1)[:, None] * x.norm(dim=1))
    assert 0 < error.abs().max() < 5 * (2 / 8191) ** 0.5


def test_products_of_projections_are_right_in_the_mean_over_signs():
    first, second = ([torch.tensor([[1.0, 2.0], [-1.0, 0.5]]), part] for part in (torch.tensor([3.0]), None))
    total = torch.zeros(())
    for bits in product((-1, 1), repeat=5):
        signs = [torch.tensor(bits[:4], dtype=torch.int8).view(2, 2), torch.tensor(bits[4:], dtype=torch.int8)]
        a, b = (folded(gradient, signs, 2) for gradient in (first, second))
        assert a.shape == (2,)
        total += a @ b
    assert float(total) / 2**5 == 1 + 4 + 1 + 0.25


def test_a_long_sample_is_read_in_windows_and_weighs_every_token_alike():
    judge = GenerativePerplexity(Bigrams(positions=4), protocol="all")
    long = [0, 1, 2, 3, 4, 0, 2, 1, 3, 3, 1]
    calls = []
    found = gradient_features([[1, 2], long], judge, progress=calls.append)
    expected = gradients(judge, [[1, 2], long])  # neighbours are all that this judge reads, so windows change nothing
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-14)
    assert calls == [1] * 6  # five windows of four tokens, each two further


def test_the_mean_gradient_over_the_law_of_the_judge_is_zero(bigrams):
    """Why the figure is blind to what the judge itself has generated."""
    pairs = list(product(range(5), repeat=2))
    rows = gradients(bigrams, pairs)
    weights = bigrams.judge.model.table.detach().softmax(dim=1).flatten()
    assert (weights[:, None] * rows).sum(dim=0).abs().max() < 1e-14


@pytest.mark.parametrize("judge", [lambda ids, mask: torch.zeros(*ids.shape, 5), Bigrams().requires_grad_(False)])
def test_a_judge_without_gradient_is_named(judge):
    metric = GenerativePerplexity(judge, protocol="all")
    with pytest.raises(TokenDriftError, match="needs a judge with parameters that have a gradient"):
        gradient_features([[1, 2]], metric)
    with pytest.raises(TokenDriftError, match="needs a judge with parameters that have a gradient"):
        evaluate({"a": [[1, 2], [2, 3]]}, metric, real=[[1, 2], [2, 3]], gradient_moment=True)


def test_parameters_that_the_logits_do_not_depend_on_are_no_gradient():
    model = Bigrams()
    model.forward = lambda ids, attention_mask: model.table.detach()[ids]
    with pytest.raises(TokenDriftError, match="needs a judge with parameters that have a gradient"):
        gradient_features([[1, 2]], GenerativePerplexity(model, protocol="all"))


def test_evaluate_shows_it_on_demand(bigrams):
    ids = torch.randint(5, (60, 8), generator=torch.Generator().manual_seed(0))
    sets, options = {"dull": ids[:30].clamp(max=1), "real": ids[:30]}, {"real": ids[30:], "resamples": 20}
    found = evaluate(sets, bigrams, gradient_moment=True, **options)
    own = gradient_moment(sets["dull"], ids[30:], bigrams, resamples=20)
    measures = found["dull"].measures
    assert measures.gradient_moment.estimate == pytest.approx(own.distance.estimate, abs=1e-12)
    assert measures.gradient_moment_z.estimate > 5 > abs(found["real"].measures.gradient_moment_z.estimate)
    assert "gradient moment" in str(found) and found["dull"].real.gradient_moment is None
    assert evaluate(sets, bigrams, **options)["dull"].measures.gradient_moment is None


def test_samples_too_short_to_be_scored_are_left_out_with_skip_bad(bigrams):
    samples = SampleSet(ids=[[1], [1, 2, 3], [2, 2, 0]])
    found = evaluate(
        {"a": samples}, bigrams, real=[[0, 1, 2], [3, 3, 4]], resamples=5, skip_bad=True, gradient_moment=True
    )
    expected = gradient_moment([[1, 2, 3], [2, 2, 0]], [[0, 1, 2], [3, 3, 4]], bigrams, **ONE_DRAW)
    assert found["a"].measures.gradient_moment.estimate == pytest.approx(expected.distance.estimate, abs=1e-12)
