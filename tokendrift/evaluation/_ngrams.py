"""Ids as a rectangle, and every n-gram in it as one number: what the figures of diversity are counted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.evaluation.samples import Ids, id_sequences

NONE = -1  # fills the rows of ragged sequences; no id is negative


def rows_of(ids: Ids) -> tuple[Tensor, Tensor]:
    """Return ids as a rectangle int64 (n, L) filled up with `NONE`, and the lengths, float64 (n,)."""
    sequences = _checked(ids)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    if int(lengths.min()) == 0:
        raise fail(f"sequence {int(lengths.argmin())} is empty.", "Leave empty sequences out.")
    rows = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=NONE)
    return rows, lengths.double()


def _checked(ids: Ids) -> list[Tensor]:
    """Return the sequences, which must hold ids of tokens: negative numbers would be taken for other n-grams."""
    if isinstance(ids, Sequence) and any(isinstance(sequence, str) for sequence in ids):
        raise fail("ids must be token ids (n, L) or a list of id sequences, not texts.", "Tokenise the texts first.")
    sequences, _ = id_sequences(ids)
    together = torch.cat(sequences)
    if len(together) and int(together.min()) < 0:
        raise fail("ids must not be negative.", "Labels of -100 mark padding: pass a list of unpadded sequences.")
    return sequences


def runs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every distinct value of every row the row and how often it occurs there, `NONE` left out."""
    rows = rows.sort(dim=1).values
    new = torch.ones_like(rows, dtype=torch.bool)
    new[:, 1:] = rows[:, 1:] != rows[:, :-1]
    starts = new.flatten().nonzero()[:, 0]
    counts = starts.diff(append=torch.tensor([rows.numel()]))
    real = rows.flatten()[starts] != NONE
    return torch.div(starts, max(rows.shape[1], 1), rounding_mode="floor")[real], counts[real].double()


def ngrams(rows: Tensor, n: int) -> Tensor:
    """Return one number for every n-gram, (n, L - n + 1), the same for the same n-gram; `NONE` where one reaches it."""
    check_count("n", n, least=1)
    width = rows.shape[1] - n + 1
    if width < 1:
        return rows[:, :0]
    if int(rows.max()) >= 1 << 31:
        rows, _ = renumbered(rows)
    codes, size = rows, int(rows.max()) + 1
    span = size
    for k in range(1, n):
        if span > (1 << 63) // size:  # the next digit would overflow
            codes, span = renumbered(codes)
        tails = rows[:, k : k + codes.shape[1] - 1]
        codes = torch.where((tails == NONE) | (codes[:, :-1] == NONE), NONE, codes[:, :-1] * size + tails)
        span *= size
    return codes


def renumbered(codes: Tensor) -> tuple[Tensor, int]:
    """Return codes numbered afresh from 0, equal ones alike and `NONE` kept, and a bound above them."""
    fresh, ranks = codes.unique(return_inverse=True)
    return torch.where(codes == NONE, NONE, ranks), len(fresh)


def stream(ids: Ids) -> tuple[Tensor, Tensor]:
    """Return sequences end to end, `NONE` after each, and the sequence that each place belongs to, both (T,).

    Unlike the rectangle it does not grow with the longest document.
    """
    sequences = _checked(ids)
    border = torch.tensor([NONE])
    places = torch.cat([part for sequence in sequences for part in (sequence, border)])
    lengths = torch.tensor([len(sequence) + 1 for sequence in sequences])
    return places, torch.arange(len(sequences)).repeat_interleave(lengths)
