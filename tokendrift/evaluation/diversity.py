"""How varied generated ids are, within a sample and over the corpus: the figures that keep Gen.-PPL honest.

All take ids as generated, before decoding: int64 (n, L), or a list of sequences. Entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.evaluation.samples import id_sequences

Ids: TypeAlias = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]
NONE = -1  # fills the rows of ragged sequences; no id is negative


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
    rows, lengths = _rows(ids)
    owners, counts = _runs(rows)
    spread = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owners, counts * counts.log())
    return (lengths.log() - spread / lengths).clamp_min_(0)


def unigram_entropy(ids: Ids) -> float:
    """Return the plug-in entropy of all tokens of the corpus together, nats.

    It falls when a sampler keeps to frequent words, even where every single sample stays varied. It grows with
    the number of tokens: compare corpora of one size.

    Args:
        ids: (n, L), or a list of sequences.

    >>> unigram_entropy([[1, 1], [2, 2]]) == sample_entropy([[1, 1, 2, 2]]).item()
    True
    """
    rows, _ = _rows(ids)
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
    grams = _ngrams(_rows(ids)[0], n)
    grams = grams[grams != NONE]
    if grams.numel() == 0:
        raise fail(f"no sequence has {n} tokens, so there is no {n}-gram.", "Take a smaller n.")
    return len(grams.unique()) / len(grams)


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
    grams = _ngrams(_rows(ids)[0], n)
    total = (grams != NONE).sum(dim=1)
    if grams.shape[1] == 0:
        return total.double()
    owners, _ = _runs(grams)
    distinct = owners.bincount(minlength=len(grams))
    return (total - distinct).double() / total.clamp_min(1)


def repetition(ids: Ids, n: int = 4) -> float:
    """Return the mean over sequences of `sample_repetition`.

    >>> repetition([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]], n=2)
    0.25
    """
    return float(sample_repetition(ids, n).mean())


def most_frequent_share(ids: Ids) -> float:
    """Return the share of all tokens of the corpus that are its most frequent token.

    >>> most_frequent_share([[1, 1, 2], [1]])
    0.75
    """
    rows, lengths = _rows(ids)
    _, counts = _runs(rows[rows != NONE][None])
    return float(counts.max() / lengths.sum())


def duplicate_share(ids: Ids) -> float:
    """Return the share of sequences that are an exact copy of an earlier one.

    >>> duplicate_share([[1, 2], [1, 2], [1, 2], [3]])
    0.5
    """
    rows, _ = _rows(ids)
    return 1 - len(set(map(tuple, rows.tolist()))) / len(rows)


def _rows(ids: Ids) -> tuple[Tensor, Tensor]:
    """Return ids as a rectangle int64 (n, L) filled up with `NONE`, and the lengths, float64 (n,)."""
    if isinstance(ids, Sequence) and any(isinstance(sequence, str) for sequence in ids):
        raise fail("ids must be token ids (n, L) or a list of id sequences, not texts.", "Tokenise the texts first.")
    sequences, _ = id_sequences(ids)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    if int(lengths.min()) == 0:
        raise fail(f"sequence {int(lengths.argmin())} is empty.", "Leave empty sequences out.")
    rows = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=NONE)
    real = torch.arange(rows.shape[1]) < lengths[:, None]
    if bool((rows[real] < 0).any()):
        raise fail("ids must not be negative.", "Labels of -100 mark padding: pass a list of unpadded sequences.")
    return rows, lengths.double()


def _runs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every distinct value of every row the row and how often it occurs there, `NONE` left out."""
    rows = rows.sort(dim=1).values
    new = torch.ones_like(rows, dtype=torch.bool)
    new[:, 1:] = rows[:, 1:] != rows[:, :-1]
    starts = new.flatten().nonzero()[:, 0]
    counts = starts.diff(append=torch.tensor([rows.numel()]))
    real = rows.flatten()[starts] != NONE
    return torch.div(starts, max(rows.shape[1], 1), rounding_mode="floor")[real], counts[real].double()


def _ngrams(rows: Tensor, n: int) -> Tensor:
    """Return one number for every n-gram, (n, L - n + 1), the same for the same n-gram; `NONE` past the end."""
    check_count("n", n, least=1)
    width = rows.shape[1] - n + 1
    if width < 1:
        return rows[:, :0]
    if int(rows.max()) >= 1 << 31:
        rows, _ = _renumbered(rows)
    codes, size = rows, int(rows.max()) + 1
    span = size
    for k in range(1, n):
        if span > (1 << 63) // size:  # the next digit would overflow
            codes, span = _renumbered(codes)
        tails = rows[:, k : k + codes.shape[1] - 1]
        codes = torch.where(tails == NONE, NONE, codes[:, :-1] * size + tails)
        span *= size
    return codes


def _renumbered(codes: Tensor) -> tuple[Tensor, int]:
    """Return codes numbered afresh from 0, equal ones alike and `NONE` kept, and a bound above them."""
    fresh, ranks = codes.unique(return_inverse=True)
    return torch.where(codes == NONE, NONE, ranks), len(fresh)
