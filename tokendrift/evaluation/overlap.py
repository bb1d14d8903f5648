"""How much samples share with one another, and with a text that they may have copied.

All take ids as generated: int64 (n, L), or a list of sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.evaluation._ngrams import NONE, ngrams, rows_of, stream
from tokendrift.evaluation.samples import Ids

ORDERS = 4  # of BLEU


def self_bleu(ids: Ids) -> Tensor:
    r"""Return BLEU-4 of each sequence with all others as its references (Self-BLEU), float64 (n,).

    Near 1 where samples say the same things. Exact, without smoothing, and in time linear in the tokens but for a
    sort: the clipped count of an n-gram needs only its largest and second largest count over the samples. Grows with
    the number of samples: compare sets of one size.

    Args:
        ids: (n, L), or a list of sequences; n at least 2. A sequence below 4 tokens scores 0.

    Raises:
        TokenDriftError: If there are fewer than 2 sequences.

    Source: Zhu et al., Texygen (arXiv 1802.01886), with BLEU of Papineni et al. (ACL 2002).

    >>> self_bleu([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [9, 8, 7, 6, 5]]).tolist()
    [1.0, 1.0, 0.0]
    """
    rows, lengths = rows_of(ids)
    if len(rows) < 2:
        raise fail("self_bleu compares samples with each other, so it needs at least 2.", samples=len(rows))
    logs = torch.zeros(len(rows), dtype=torch.float64)
    for n in range(1, ORDERS + 1):
        total = (lengths - n + 1).clamp_min(0)
        logs += (_clipped(rows, n) / total).nan_to_num(nan=0.0).log() / ORDERS
    nearest = _nearest_length(lengths)
    brevity = torch.where(lengths < nearest, 1 - nearest / lengths, 0.0)
    return (logs + brevity).exp()


def copied_share(ids: Ids, corpus: Ids, n: int = 8) -> Tensor:
    """Return the share of n-grams of each sequence that stand somewhere in the corpus, float64 (n,).

    Real text shares some with any large corpus: read it beside the same share of held-out text.

    Args:
        ids: (n, L), or a list of sequences. A sequence shorter than n shares nothing: 0.
        corpus: Training text in the same ids: one sequence for each document, or one long one.
        n: Tokens of an n-gram.

    Source: 8-grams as in Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 4, who
    measured the overlap of test sets with training text so.

    >>> copied_share([[1, 2, 3, 4], [9, 1, 2, 9]], [[0, 1, 2, 3, 4]], n=2)
    tensor([1.0000, 0.3333], dtype=torch.float64)
    """
    check_count("n", n, least=1)
    _, lengths = rows_of(ids)
    own, owners = stream(ids)
    known, _ = stream(corpus)
    codes = ngrams(torch.cat([own, known])[None], n)[0]
    mine, theirs = codes[: len(own)], codes[len(own) :]
    copied = torch.isin(mine, theirs[theirs != NONE].unique()) & (mine != NONE)
    shared = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, owners[: len(mine)], copied.double())
    return shared / (lengths - n + 1).clamp_min(1)


def _clipped(rows: Tensor, n: int) -> Tensor:
    """Return for each row how many of its n-grams occur in another, each up to its largest count there, (n,)."""
    codes = ngrams(rows, n)
    kept = codes != NONE
    owners = torch.arange(len(rows))[:, None].expand_as(codes)[kept]
    grams, ranks = codes[kept].unique(return_inverse=True)
    pairs, counts = (ranks * len(rows) + owners).unique(return_counts=True)
    gram, owner = torch.div(pairs, len(rows), rounding_mode="floor"), pairs % len(rows)
    # The largest count of each n-gram and the largest below it: what a row alone at the top is compared with.
    none = torch.zeros(len(grams), dtype=torch.int64)
    largest = none.scatter_reduce(0, gram, counts, "amax")[gram]
    top = counts == largest
    alone = top & (none.index_add(0, gram, top.long())[gram] == 1)
    below = none.scatter_reduce(0, gram, torch.where(top, 0, counts), "amax")[gram]
    elsewhere = torch.where(alone, below, largest)
    clipped = torch.minimum(counts, elsewhere).double()
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owner, clipped)


def _nearest_length(lengths: Tensor) -> Tensor:
    """Return for each sequence the length, among the others, nearest to its own; the shorter of two equally near."""
    ordered, order = lengths.sort()
    infinite = torch.tensor([torch.inf], dtype=lengths.dtype)
    below = torch.cat([-infinite, ordered[:-1]])
    above = torch.cat([ordered[1:], infinite])
    nearest = torch.where(ordered - below <= above - ordered, below, above)
    return torch.empty_like(lengths).index_copy_(0, order, nearest)
