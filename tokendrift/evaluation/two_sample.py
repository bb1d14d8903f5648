"""Distances between generated and real text as sets of feature vectors: kernel and energy distance, and MAUVE."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokendrift._checks import check_choice, check_count, check_floating, check_ids, check_positive, check_tensor, fail
from tokendrift.errors import TokenDriftError
from tokendrift.evaluation.bootstrap import Interval, check_resampling, draw_counts, interval_from, redraws
from tokendrift.evaluation.judge import Judge, check_range
from tokendrift.evaluation.samples import SampleInput, id_sequences
from tokendrift.modes import evaluation_mode

PERMUTATIONS_AT_ONCE = 64
EXACT = "donot_use_mm_for_euclid_dist"
KERNELS = ("gaussian", "energy", "linear")


class KernelDistance(NamedTuple):
    """Kernel two-sample distance between generated and real features.

    Attributes:
        distance: Unbiased squared maximum mean discrepancy, with its bootstrap interval. If the two sets have the same
            law, it is close to 0 and may be negative.
        p_value: Share of permutations that give at least this distance; small if the laws differ.
        spread: Standard deviation of the distance over the permutations, which is that between two sets of one law. NaN
            for a single permutation.
        bandwidth: Bandwidth of the Gaussian kernel, in feature units; None for the other kernels.
        generated: Number of generated vectors.
        real: Number of real ones.
        permutations: Number of permutations.
    """

    distance: Interval
    p_value: float
    spread: float
    bandwidth: float | None
    generated: int
    real: int
    permutations: int

    @property
    def z_score(self) -> Interval:
        """The distance in units of `spread`, with its interval: about 0 ± 1 for two sets of real text."""
        return Interval(*(end / self.spread for end in self.distance)) if self.spread else Interval(0.0, 0.0, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        return {**self._asdict(), "distance": self.distance._asdict(), "z_score": self.z_score._asdict()}


def kernel_distance(
    generated: Tensor,
    real: Tensor,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    permutations: int = 999,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> KernelDistance:
    r"""Return the kernel two-sample distance (MMD) between two sets of features, with a permutation test.

    .. math:: \widehat{\mathrm{MMD}}^2 = \frac1{n(n-1)}\sum_{i\ne j}k(x_i,x_j) + \frac1{m(m-1)}\sum_{i\ne j}k(y_i,y_j)
        - \frac2{nm}\sum_{ij}k(x_i,y_j), \qquad k(x,y) = e^{-\lVert x-y\rVert^2/2s^2}

    With ``kernel="energy"``, :math:`k(x, y) = -\lVert x - y \rVert`, it is the energy distance, and with
    ``kernel="linear"``, :math:`k(x, y) = x \cdot y`, the squared distance of the means. Both have no bandwidth.

    The p-value permutes which vector came from where, and is exact for samples that are independent.

    Args:
        generated: (n, M), one vector a sample; n at least 2.
        real: (m, M), of real text of the same length.
        kernel: ``"gaussian"``, ``"energy"`` or ``"linear"``. Default: ``"gaussian"``.
        bandwidth: Bandwidth s of the Gaussian kernel. Default: the median distance between all vectors, or between
            those that differ if most are equal.
        permutations: Permutations of the test; the smallest p-value is 1 / (permutations + 1). Default: 999.
        resamples: Redraws for the interval. Pairs of a vector with itself are left out, and so are redraws in which a
            set has no other pair, as may happen to sets of a few vectors. Default: 1000.
        level: Confidence of the interval. Default: 0.95.
        seed: Random seed of permutations and redraws. Default: 0.

    Raises:
        TokenDriftError: If widths differ, or a set has fewer than 2 vectors or numbers that are not finite.

    Source: Gretton et al., A Kernel Two-Sample Test (JMLR 2012), lemma 6 and section 8; Székely and Rizzo, Energy
    statistics (2013), for the energy distance.

    >>> points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> kernel_distance(points[:100], points[100:] + 2, permutations=99).p_value
    0.01
    """
    check_resampling(level, resamples)
    check_count("permutations", permutations, least=1)
    check_choice("kernel", kernel, KERNELS)
    x, y = _clouds(generated, real)
    n, m = len(x), len(y)
    # 1. The kernel between all vectors, without the pairs of a vector with itself.
    if kernel != "gaussian" and bandwidth is not None:
        raise fail(f"the {kernel} distance has no bandwidth.", "Leave bandwidth out.", bandwidth=bandwidth)
    both = torch.cat([x, y])
    if kernel == "linear":
        similarity = (both @ both.T).fill_diagonal_(0)
    elif kernel == "energy":
        similarity = torch.cdist(both, both, compute_mode=EXACT).neg_()
    else:
        squared = torch.cdist(both, both, compute_mode=EXACT).square_()
        if bandwidth is None:
            pairs = squared[torch.ones_like(squared, dtype=torch.bool).triu_(1)]
            if not pairs.median():  # most vectors are equal, which says nothing about the scale
                pairs = pairs[pairs > 0]
            bandwidth = math.sqrt(float(pairs.median())) if len(pairs) else 1.0  # with no distance, any width will do
        check_positive("bandwidth", bandwidth)
        similarity = squared.div_(-2 * bandwidth**2).exp_().fill_diagonal_(0)
    generator = torch.Generator().manual_seed(seed)
    place = torch.cat([torch.ones(n), torch.zeros(m)]).double()
    # 2. The distance, and its law under permutations of which vector came from where.
    observed = float(_mmd(similarity, place[None])[0])
    permuted = []
    for start in range(0, permutations, PERMUTATIONS_AT_ONCE):
        count = min(PERMUTATIONS_AT_ONCE, permutations - start)
        order = torch.rand(count, n + m, generator=generator).argsort(dim=1)
        permuted.append(_mmd(similarity, place[order]))
    # Rounding, which grows with the kernel, must not tell equal arrangements apart.
    law = torch.cat(permuted)
    at_least = int((law >= observed - 1e-12 * float(similarity.abs().max())).sum())
    # 3. The interval, from vectors redrawn within each set.
    counts = [draw_counts(torch.cat(list(redraws(size, resamples, generator))), size) for size in (n, m)]
    interval = interval_from(observed, _resampled_mmd(similarity, *counts), level)
    spread = float(law.std()) if permutations > 1 else math.nan
    return KernelDistance(interval, (1 + at_least) / (1 + permutations), spread, bandwidth, n, m, permutations)


class Mauve(NamedTuple):
    """MAUVE between generated and real features.

    Attributes:
        score: Close to 1 if the two sets have similar shares in every cluster, close to 0 if they do not. Its interval
            resamples the vectors and keeps the clusters.
        buckets: Number of clusters.
        scaling_factor: c of the paper.
        seed_spread: Standard deviation over seeds of the clustering.
        generated: Number of generated vectors.
        real: Number of real ones.
    """

    score: Interval
    buckets: int
    scaling_factor: float
    seed_spread: float
    generated: int
    real: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        return {**self._asdict(), "score": self.score._asdict()}


def mauve(
    generated: Tensor,
    real: Tensor,
    *,
    buckets: int | None = None,
    scaling_factor: float = 5.0,
    seeds: int = 5,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 25,
) -> Mauve:
    """Return MAUVE of generated against real features, computed by the package ``mauve-text`` (extra ``mauve``).

    The score is the mean over several clusterings. It needs thousands of samples to distinguish values close to 1. It
    depends on the features and on the numbers of samples and buckets, and compares only if all of these agree.

    Args:
        generated: (n, M), for example of `judge_features`.
        real: (m, M).
        buckets: Number of clusters. Default: a tenth of the smaller set.
        scaling_factor: Scaling factor c of the paper. Default: 5.0.
        seeds: Number of clusterings. Default: 5.
        resamples: Redraws for the interval. Default: 1000.
        level: Confidence of the interval. Default: 0.95.
        seed: Random seed of the first clustering; the others use the numbers after it. Default: 25.

    Raises:
        TokenDriftError: If ``mauve-text`` is missing, widths differ, or a set has fewer than 2 vectors or numbers that
            are not finite.

    Source: Pillutla et al., MAUVE (arXiv 2102.01454) and MAUVE Scores for Generative Models (arXiv 2212.14578).
    """
    check_resampling(level, resamples)
    check_count("seeds", seeds, least=1)
    x, y = (cloud.numpy() for cloud in _clouds(generated, real))
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise TokenDriftError("MAUVE needs the package mauve-text.\n  pip install 'tokendrift[mauve]'") from error
    # 1. The score for several clusterings.
    found = [
        compute_mauve(
            p_features=y,
            q_features=x,
            num_buckets="auto" if buckets is None else check_count("buckets", buckets, least=2),
            mauve_scaling_factor=scaling_factor,
            seed=seed + offset,
            verbose=False,
        )
        for offset in range(seeds)
    ]
    # 2. The score on redrawn histograms of each clustering.
    scores = torch.tensor([float(one.mauve) for one in found], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    share = math.ceil(resamples / seeds)
    replicates = [
        _mauve_score(
            _redrawn(one.p_hist, len(y), share, generator),
            _redrawn(one.q_hist, len(x), share, generator),
            scaling_factor,
        )
        for one in found
    ]
    estimate = min(float(scores.mean()), 1.0)  # the area is summed with rounding
    # Redrawn histograms lie further apart than those they come from, so the replicates are set back to the estimate.
    interval = interval_from(estimate, torch.cat(replicates), level, centred=True)
    bounded = Interval(estimate, max(interval.low, 0.0), min(interval.high, 1.0))
    spread = float(scores.std()) if seeds > 1 else 0.0
    return Mauve(bounded, int(found[0].num_buckets), scaling_factor, spread, len(x), len(y))


def character_features(texts: Sequence[str], *, n: int = 3, buckets: int = 1024) -> Tensor:
    """Return features of texts that need no language model: hashed counts of character n-grams, float64 (N, buckets).

    Each row holds the square roots of the shares of a text's n-grams in each bucket, and has length 1. Texts shorter
    than n characters count as one n-gram.

    Args:
        texts: N texts.
        n: Characters of an n-gram. Default: 3.
        buckets: Buckets that n-grams are hashed into. Default: 1024.
    """
    check_count("n", n, least=1)
    check_count("buckets", buckets, least=1)
    counts = torch.zeros(len(texts), buckets, dtype=torch.float64)
    for row, text in zip(counts, texts, strict=True):
        grams = Counter(text[i : i + n] for i in range(max(1, len(text) - n + 1)))
        for gram, count in grams.items():
            row[zlib.crc32(gram.encode("utf-8", "surrogatepass")) % buckets] += count / grams.total()
    return counts.sqrt_()


@torch.no_grad()
def encoder_features(
    embedding: Tensor, feature_map: Callable[[Tensor], Tensor], ids: Tensor, *, batch_size: int = 64
) -> Tensor:
    """Return features of ids (n, L) in a frozen encoder, (n, M) on the CPU; windows are averaged.

    Args:
        embedding: Token embeddings (V, D).
        feature_map: Frozen map (B, L, D) to (B, M) or (B, W, M), such as `PooledFeatures`.
        ids: Generated or real ids (n, L).
        batch_size: Sequences a call.
    """
    ids = check_ids("ids", ids, len(check_tensor("embedding", embedding, ("V", "D"))))
    parts = []
    for batch in ids.to(embedding.device).split(check_count("batch_size", batch_size, least=1)):
        found = feature_map(nn.functional.embedding(batch, embedding))
        parts.append((found.mean(dim=1) if found.ndim == 3 else found).cpu())
    return torch.cat(parts)


def judge_features(samples: SampleInput, judge: Judge, *, batch_size: int = 64, truncate: int | None = None) -> Tensor:
    """Return the judge's last hidden state at the last token of each sample, float32 (n, M): what MAUVE is made for.

    Args:
        samples: Texts, or ids of the judge's vocabulary.
        judge: A transformers causal LM, `GenerativePerplexity.judge` for one.
        batch_size: Samples a call, of like length.
        truncate: Read the first so many tokens only; by default what the judge can.

    Raises:
        TokenDriftError: If the judge shows no hidden states, a sample is empty, or ids are outside its vocabulary.
    """
    sequences, _ = id_sequences(samples, None, judge.tokenizer)
    check_count("batch_size", batch_size, least=1)
    if truncate is not None:
        sequences = [ids[: check_count("truncate", truncate, least=1)] for ids in sequences]
    for i, ids in enumerate(sequences):
        if len(ids) == 0:
            raise fail(f"sample {i} is empty and has no features.", "Leave empty samples out.")
    sequences = [ids[: judge.window] for ids in judge.with_start(sequences)]
    check_range(torch.cat(sequences), judge.vocab_size)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    rows: dict[int, Tensor] = {}
    with evaluation_mode(judge.model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            parts = [sequences[i] for i in chosen]
            lengths = torch.tensor([len(part) for part in parts])
            ids = nn.utils.rnn.pad_sequence(parts, batch_first=True)
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            hidden = judge.hidden(ids, mask)
            last = hidden[torch.arange(len(parts)), lengths.to(hidden.device) - 1].float().cpu()
            rows |= dict(zip(chosen, last, strict=True))
    return torch.stack([rows[i] for i in range(len(sequences))]).clone()


def _clouds(generated: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    for name, cloud in (("generated", generated), ("real", real)):
        check_floating(name, check_tensor(name, cloud, ("n", "M")))
        if len(cloud) < 2:
            raise fail(f"{name} needs at least 2 feature vectors.", **{name: cloud})
        if not cloud.isfinite().all():
            raise fail(f"{name} has features that are NaN or infinite.", "Leave such vectors out.", **{name: cloud})
    if generated.shape[1] != real.shape[1]:
        raise fail("generated and real must have one width M.", "Use one feature map.", generated=generated, real=real)
    return generated.detach().cpu().double(), real.detach().cpu().double()


def _mmd(kernel: Tensor, place: Tensor) -> Tensor:
    """Return unbiased MMD^2 for assignments (R, N), 1 where a vector counts as generated; the diagonal is 0."""
    n, m = place[0].sum(), (1 - place[0]).sum()
    rows = place @ kernel
    within = (rows * place).sum(dim=1)
    across = (rows * (1 - place)).sum(dim=1)
    rest = kernel.sum() - within - 2 * across
    return within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * across / (n * m)


def _resampled_mmd(kernel: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return MMD^2 for redrawn counts (R, n) and (R, m), without pairs of a vector with itself."""
    n, m = first.shape[1], second.shape[1]
    upper, lower, across = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]

    def within(counts: Tensor, block: Tensor, size: int) -> Tensor:
        return ((counts @ block) * counts).sum(dim=1) / (size**2 - counts.square().sum(dim=1))

    return within(first, upper, n) + within(second, lower, m) - 2 * ((first @ across) * second).sum(dim=1) / (n * m)


def _redrawn(histogram: Any, count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Return histograms of ``count`` draws from one, (R, K)."""
    share = torch.as_tensor(histogram, dtype=torch.float64)
    drawn = torch.multinomial(share, resamples * count, replacement=True, generator=generator)
    return draw_counts(drawn.view(resamples, count), len(share)) / count


def _mauve_score(p: Tensor, q: Tensor, scaling_factor: float, points: int = 25) -> Tensor:
    """Return the area under the divergence curve of histograms (R, K), (R,), with the package's 25 mixtures."""

    def divergence(a: Tensor, mixture: Tensor) -> Tensor:
        return (torch.xlogy(a, a) - torch.xlogy(a, mixture)).sum(dim=-1)

    curve = []
    for weight in torch.linspace(1e-6, 1 - 1e-6, points, dtype=torch.float64):
        mixture = weight * p + (1 - weight) * q
        curve.append(torch.stack([divergence(q, mixture), divergence(p, mixture)]))
    x, y = (-scaling_factor * torch.stack(curve, dim=-1)).exp()  # (R, points) each
    ends = torch.zeros(len(p), 1, dtype=torch.float64), torch.ones(len(p), 1, dtype=torch.float64)
    x, y = torch.cat([ends[1], x, ends[0]], dim=1), torch.cat([ends[0], y, ends[1]], dim=1)
    forward, order = x.sort(dim=1)
    return torch.trapezoid(y.gather(1, order), forward, dim=1)
