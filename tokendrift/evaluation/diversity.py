"""Diversity of generated ids, within a sample and over the corpus: the figures to read together with Gen.-PPL.

All take ids as generated, before decoding: int64 (n, L), or a list of sequences. Entropies are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokendrift._checks import fail
from tokendrift.evaluation._ngrams import NONE, ngrams, rows_of, runs
from tokendrift.evaluation.samples import Ids


def sample_entropy(ids: Ids) -> Tensor:
    r"""Return the plug-in entropy of the tokens of each sequence, nats, float64 (n,).

    .. math:: H_i = -\sum_v \frac{c_{iv}}{L_i}\log\frac{c_{iv}}{L_i}

    with :math:`c_{iv}` how often token v occurs in sequence i; at most :math:`\log L_i`. All tokens count, special
    ones too. Its mean is the "entropy" of the tables of MDLM's successors.

    Args:
        ids: (n, L), or a list of sequences.

    Raises:
        TokenDriftError: If there is no sequence, or an empty one.

    Source: DUO ``Metrics.record_entropy``, ReMDM.

    >>> sample_entropy(torch.tensor([[1, 1, 2, 2], [1, 2, 3, 4]])).mean()
    tensor(1.0397, dtype=torch.float64)
    """
    rows, lengths = rows_of(ids)
    owners, counts = runs(rows)
    spread = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owners, counts * counts.log())
    return (lengths.log() - spread / lengths).clamp_min_(0)


def unigram_entropy(ids: Ids) -> float:
    """Return the plug-in entropy of all tokens of the corpus together, nats.

    It falls when a sampler draws only frequent words, even if every single sample remains varied. It grows with the
    number of tokens: compare corpora of one size.

    Args:
        ids: (n, L), or a list of sequences.

    >>> unigram_entropy([[1, 1], [2, 2]]) == sample_entropy([[1, 1, 2, 2]]).item()
    True
    """
    rows, _ = rows_of(ids)
    return float(sample_entropy(rows[rows != NONE][None]))


def distinct_n(ids: Ids, n: int) -> float:
    """Return how many n-grams of the corpus differ, over how many there are.

    Falls with the size of the corpus: compare corpora of one size.

    Args:
        ids: (n, L), or a list of sequences; no n-gram crosses from one to the next.
        n: Tokens of an n-gram.

    Raises:
        TokenDriftError: If every sequence is shorter than n.

    Source: Li et al., A Diversity-Promoting Objective Function (arXiv 1510.03055), section 5.

    >>> distinct_n([[1, 2, 1, 2]], 2)  # 12, 21, 12
    0.6666666666666666
    """
    grams = ngrams(rows_of(ids)[0], n)
    grams = grams[grams != NONE]
    if grams.numel() == 0:
        raise fail(f"no sequence has {n} tokens, so there is no {n}-gram.", "Take a smaller n.")
    return len(grams.unique()) / len(grams)


def most_frequent_share(ids: Ids) -> float:
    """Return the share of all tokens of the corpus that are its most frequent token.

    >>> most_frequent_share([[1, 1, 2], [1]])
    0.75
    """
    rows, lengths = rows_of(ids)
    _, counts = runs(rows[rows != NONE][None])
    return float(counts.max() / lengths.sum())


def duplicate_share(ids: Ids) -> float:
    """Return the share of sequences that are an exact copy of an earlier one.

    >>> duplicate_share([[1, 2], [1, 2], [1, 2], [3]])
    0.5
    """
    rows, _ = rows_of(ids)
    return 1 - len(set(map(tuple, rows.tolist()))) / len(rows)
