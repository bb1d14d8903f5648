"""How much a sample repeats itself: repeated n-grams, and how long the longest of them is.

All take ids as generated: int64 (n, L), or a list of sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokendrift.evaluation._ngrams import NONE, ngrams, renumbered, rows_of, runs
from tokendrift.evaluation.samples import Ids


def sample_repetition(ids: Ids, n: int = 4) -> Tensor:
    r"""Return the share of n-grams of each sequence that repeat an earlier one of it (seq-rep-n), float64 (n,).

    .. math:: 1 - \frac{|\text{distinct n-grams}|}{|\text{n-grams}|}

    A sequence shorter than n repeats nothing: 0.

    Args:
        ids: (n, L), or a list of sequences.
        n: Tokens of an n-gram.

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training (arXiv 1908.04319), equation 10.

    >>> sample_repetition([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]], n=2)
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    grams = ngrams(rows_of(ids)[0], n)
    total = (grams != NONE).sum(dim=1)
    if grams.shape[1] == 0:
        return total.double()
    owners, _ = runs(grams)
    distinct = owners.bincount(minlength=len(grams))
    return (total - distinct).double() / total.clamp_min(1)


def longest_repeat(ids: Ids) -> Tensor:
    """Return for each sequence the length of the longest n-gram that occurs in it twice, int64 (n,).

    The two may overlap, so a sequence of one token over and over repeats L - 1 of them. 0 if all tokens differ.

    Args:
        ids: (n, L), or a list of sequences.

    >>> longest_repeat([[1, 2, 3, 9, 1, 2, 3], [5, 5, 5, 5], [1, 2, 3]])
    tensor([3, 3, 0])
    """
    rows, _ = rows_of(ids)
    # If an n-gram repeats, so do its parts: the length is found bit by bit. doubled[k] numbers the 2^k-grams.
    doubled = [renumbered(rows)[0]]
    while (step := 1 << len(doubled)) < rows.shape[1]:
        half = step // 2
        doubled.append(_joined(doubled[-1][:, :-half], doubled[-1][:, half:]))
    found = torch.zeros(len(rows), dtype=torch.int64)
    present = torch.zeros_like(rows)  # numbers the n-grams of the length found so far, the empty one at first
    width = rows.shape[1]
    places = torch.arange(width)
    for k in reversed(range(len(doubled))):
        after = places + found[:, None]
        tails = doubled[k].gather(1, after.clamp(max=doubled[k].shape[1] - 1))
        tails = torch.where(after < doubled[k].shape[1], tails, NONE)
        longer = _joined(present, tails)
        owners, counts = runs(longer)
        repeats = torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, owners[counts > 1], True)
        present = torch.where(repeats[:, None], longer, present)
        found += repeats * (1 << k)
    return found


def _joined(heads: Tensor, tails: Tensor) -> Tensor:
    """Return one number for every pair of neighbours, `NONE` where either is."""
    pairs = torch.where((heads == NONE) | (tails == NONE), NONE, heads * (int(tails.max()) + 1) + tails)
    return renumbered(pairs)[0]
