"""Measures of generated sequences: validity, total variation from the known distribution, mode imbalance, entropies."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor

from tokendrift._checks import check_count, check_ids, fail
from tokendrift.evaluation.bootstrap import Interval, interval_from, mean_interval, redraws
from tokendrift.evaluation.diversity import sample_entropy, unigram_entropy
from tokendrift.markov.language import MarkovLanguage


@dataclass(frozen=True)
class MarkovMeasures:
    r"""Measures of generated sequences of a `MarkovLanguage`.

    With :math:`\hat q_{ab}` the share of adjacent pairs that are (a, b), all positions together, and
    :math:`p_{ab} = \pi_a P_{ab}`:

    Attributes:
        validity: Share of adjacent pairs that the language has, :math:`\sum_{ab:\,p_{ab}>0} \hat q_{ab}`.
        sequence_validity: Share of sequences in which all pairs are valid.
        total_variation: :math:`\tfrac12 \sum_{ab} |\hat q_{ab} - p_{ab}|`, 0 to 1. Pairs that are too rare cost as much
            as pairs that are too frequent or impossible.
        mode_imbalance: The same among valid pairs,
            :math:`\tfrac12 \sum_{ab:\,p_{ab}>0} |\hat q_{ab} / \text{validity} - p_{ab}|`: what is wrong beside the
            invalid pairs. NaN if there is no valid pair; redrawn sets without one do not count for its interval.
        floor: What real text of the same size measures for the last two: the noise of counting.
        unigram_entropy: Of all words together, nats (true: ``language.unigram_entropy``).
        conditional_entropy: Of a word given the one before, from pair counts, nats.
        sample_entropy: Mean entropy of the words within a sequence, nats.
        samples: n.

    Intervals are 95% bootstrap intervals over sequences. Those of the two distances hold the signs of
    :math:`\hat q - p` fixed (a linearisation); near the floor, where signs are noise, they are too high.
    """

    validity: Interval
    sequence_validity: Interval
    total_variation: Interval
    mode_imbalance: Interval
    floor: float
    unigram_entropy: float
    conditional_entropy: float
    sample_entropy: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        return {
            name: {end: None if isnan(x) else x for end, x in value._asdict().items()}
            if isinstance(value, Interval)
            else value
            for name, value in vars(self).items()
        }


def measure_ids(
    language: MarkovLanguage,
    ids: Tensor,
    *,
    floor: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> MarkovMeasures:
    """Measure sequences of any origin against the language.

    Args:
        language: The language with which they are compared.
        ids: Words, int (n, L) with n and L at least 2; L need not be that of the language.
        floor: The result of `real_floor`, which can be shared by many sets of one size. Default: computed here.
        resamples: Redraws of the bootstrap. Default: 1000.
        seed: Random seed of the bootstrap and of the real text behind the floor. Default: 0.

    Raises:
        TokenDriftError: If ids are not words, such as a mask that remains, or if there are too few.

    >>> language = MarkovLanguage(torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
    >>> figures = measure_ids(language, torch.tensor([[0, 0, 1], [0, 1, 0]]))  # 00 is wrong; 01 twice; 10 once
    >>> figures.validity.estimate, round(figures.total_variation.estimate, 4)
    (0.75, 0.4167)
    """
    ids = check_ids("ids", ids, language.words).long().cpu()
    n, length = ids.shape
    if n < 2 or length < 2:
        raise fail("ids must hold at least 2 sequences of at least 2 words.", ids=ids)
    # Every adjacent pair as one number, and how often each pair occurs.
    code = ids[:, :-1] * language.words + ids[:, 1:]
    allowed, true = language.allowed.flatten(), language.pairs.flatten()
    counts = torch.bincount(code.flatten(), minlength=len(true)).double()
    valid = allowed[code].double()
    shares = counts / counts.sum()
    among = torch.where(allowed, counts, 0) / counts[allowed].sum()

    def distance(differences: Tensor, counted: Tensor) -> Interval:
        """Return half the sum of |differences|, as the mean of their signs over pairs less what the truth has."""
        sign = differences.sign()
        signs, pairs = (sign[code] * counted).sum(dim=1), counted.sum(dim=1)
        if not pairs.any():
            return Interval(nan, nan, nan)
        generator = torch.Generator().manual_seed(seed)
        drawn = [signs[i].sum(dim=1) / pairs[i].sum(dim=1) / 2 for i in redraws(n, resamples, generator)]
        # A redrawn set without a counted pair (0 / 0) says nothing.
        spread = interval_from(float(signs.sum() / pairs.sum() / 2), torch.cat(drawn))
        constant = float((sign * true).sum()) / 2
        return Interval(*(torch.tensor(spread, dtype=torch.float64) - constant).clamp_min(0).tolist())

    return MarkovMeasures(
        validity=mean_interval(valid.mean(dim=1), resamples=resamples, seed=seed),
        sequence_validity=mean_interval(valid.min(dim=1).values, resamples=resamples, seed=seed),
        total_variation=distance(shares - true, torch.ones_like(valid)),
        mode_imbalance=distance(among - true, valid),
        floor=real_floor(language, n, length=length, seed=seed) if floor is None else floor,
        unigram_entropy=unigram_entropy(ids),
        conditional_entropy=unigram_entropy(code) - unigram_entropy(ids[:, :-1]),
        sample_entropy=float(sample_entropy(ids).mean()),
        samples=n,
    )


def real_floor(
    language: MarkovLanguage, n: int, *, length: int | None = None, repeats: int = 20, seed: int = 0
) -> float:
    """Return the mean total variation of ``repeats`` fresh sets of n real sequences.

    All pairs of real sequences are valid, so this is their mode imbalance as well.

    Args:
        language: The language.
        n: Sequences of a set.
        length: Words of a sequence. Default: the length of the language.
        repeats: Number of sets. Default: 20.
        seed: Random seed of the sets. Default: 0.
    """
    check_count("n", n, least=1)
    check_count("repeats", repeats, least=1)
    source = language if length is None else MarkovLanguage(language.transitions, length)
    generator = torch.Generator().manual_seed(check_count("seed", seed))
    total = 0.0
    for _ in range(repeats):
        ids = source.sample(n, generator=generator)
        code = (ids[:, :-1] * language.words + ids[:, 1:]).flatten()
        shares = torch.bincount(code, minlength=language.words**2).double() / len(code)
        total += float((shares - language.pairs.flatten()).abs().sum()) / 2
    return total / repeats
