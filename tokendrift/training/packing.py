"""Sequences of equal length from a stream of documents, in a fixed order that can be resumed at any position."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.models.tokenizer import TextTokenizer
from tokendrift.training.text import Documents, Piece, Place

LOT = 64  # pieces that are tokenised together, on as many threads as there are


class PackedText:
    """An endless stream of sequences (L,): documents are tokenised, joined by EOS and cut.

    With ``wrap`` a sequence is BOS, L - 2 tokens of the stream, EOS, as in the training of the released checkpoints of
    MDLM and DUO; without, it is L tokens of the stream. Sequences are shuffled within blocks, block k in an order that
    depends on the seed and k alone. At the end of the source the stream begins again; if its tokens do not fill a whole
    number of sequences, the sequences then begin at other tokens.

    Args:
        documents: The source of text.
        tokenizer: The tokenizer.
        length: Tokens of a sequence, L.
        wrap: Whether to put BOS and EOS around every sequence. Default: True.
        shuffle: Number of sequences in a block. Default: 1024.
        seed: Random seed of the order. Default: 0.
        vocab_size: Vocabulary size V of the model; ids beyond it are an error. Default: not checked.
        mask_id: Entry of the vocabulary that no text may contain. Default: none.

    Attributes:
        source_tokens: Number of tokens of the source, None until it has been read from beginning to end.

    Raises:
        TokenDriftError: While reading: if the source holds no text, or the tokenizer does not fit the model.

    Source of the wrapping: MDLM and DUO, ``dataloader.py``.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: TextTokenizer,
        length: int,
        *,
        wrap: bool = True,
        shuffle: int = 1024,
        seed: int = 0,
        vocab_size: int | None = None,
        mask_id: int | None = None,
    ) -> None:
        self.documents, self.tokenizer, self.length, self.wrap = documents, tokenizer, length, wrap
        self.shuffle = check_count("shuffle", shuffle, least=1)
        self.seed, self.vocab_size, self.mask_id = seed, vocab_size, mask_id
        self._begin({"epoch": 0, "start": None, "used": 0, "block": 0, "taken": 0})

    def take(self, count: int) -> Tensor:
        """Return the next sequences, int64 (count, L)."""
        rows: list[Tensor] = []
        while len(rows) < count:
            block = self._block
            if block is None or self._taken == len(block):
                block = self._next_block()
            fresh = block[self._taken : self._taken + count - len(rows)]
            rows += fresh.unbind()
            self._taken += len(fresh)
        return torch.stack(rows)

    def position(self) -> dict[str, Any]:
        """Return the position where the next `take` begins: a few numbers, fit for JSON."""
        return {**self._at, "taken": self._taken}

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from a position of the same source with the same options."""
        self._begin(position)
        if position["taken"]:
            self._read_block()

    def _begin(self, position: dict[str, Any]) -> None:
        """Set the position where the present block starts, and drop everything that was read."""
        self._at = {name: value for name, value in position.items() if name != "taken"}
        self._taken: int = position["taken"]
        self._block: Tensor | None = None
        self._epoch: int = position["epoch"]
        self._held: deque[_Ids] = deque()
        self._used: int = position["used"]  # tokens of the first held piece that are spent
        self._pieces: Iterator[Piece] = self.documents.read(position["start"])
        self._read = 0 if position["start"] is None else None  # tokens since the beginning of the source
        self.source_tokens: int | None = None

    def _next_block(self) -> Tensor:
        if self._block is not None:
            if not self._held:  # the block came out even: the next piece says where it starts
                self._read_lot()
            first, block = self._held[0], self._at["block"] + 1
            self._at = {"epoch": first.epoch, "start": first.start, "used": self._used, "block": block}
        self._taken = 0
        return self._read_block()

    def _read_block(self) -> Tensor:
        """Read and return the sequences of the present block, in their shuffled order."""
        inner = self.length - 2 if self.wrap else self.length
        stream = self._tokens(inner * self.shuffle).view(self.shuffle, inner)
        if self.wrap:
            ends = [stream.new_full((self.shuffle, 1), end) for end in (self.tokenizer.bos_id, self.tokenizer.eos_id)]
            stream = torch.cat([ends[0], stream, ends[1]], dim=1)
        generator = torch.Generator().manual_seed(mix(self.seed, self._at["block"]))
        self._block = stream[torch.randperm(self.shuffle, generator=generator)]
        return self._block

    def _tokens(self, count: int) -> Tensor:
        """Return the next tokens of the stream, int64 (count,)."""
        parts: list[Tensor] = []
        while count:
            if not self._held:
                self._read_lot()
            fresh = self._held[0].ids[self._used : self._used + count]
            parts.append(fresh)
            count -= len(fresh)
            self._used += len(fresh)
            if self._used >= len(self._held[0].ids):
                self._held.popleft()
                self._used = 0
        return torch.cat(parts)

    def _read_lot(self) -> None:
        """Tokenise the next pieces; begin again if the source has ended."""
        lot = list(islice(self._pieces, LOT))
        if not lot:
            self._epoch += 1
            self.source_tokens, self._read = self.source_tokens or self._read, None
            self._pieces = self.documents.read()
            lot = list(islice(self._pieces, LOT))
            if not lot:
                raise fail("the source contains no text.", "Pass files or a dataset with text in them.")
        for piece, ids in zip(lot, self.tokenizer.encode([piece.text for piece in lot]), strict=True):
            tail = [self.tokenizer.eos_id] if piece.ends else []
            self._held.append(_Ids(self._checked([*ids, *tail]), self._epoch, piece.start))
            if self._read is not None:
                self._read += len(ids) + len(tail)

    def _checked(self, ids: list[int]) -> Tensor:
        found = torch.tensor(ids, dtype=torch.int64)
        high = int(found.max()) if len(found) else 0
        if self.vocab_size is not None and high >= self.vocab_size:
            raise fail(
                f"the tokenizer gives id {high}, but the checkpoint's vocabulary V has {self.vocab_size} entries.",
                "Pass the tokenizer that the checkpoint was trained with.",
            )
        if self.mask_id is not None and (found == self.mask_id).any():
            raise fail(
                f"the tokenizer gives id {self.mask_id}, which is the mask token of the checkpoint.",
                "Pass the tokenizer that the checkpoint was trained with. If its vocabulary has the mask as an "
                "ordinary word, take that word out of the text.",
            )
        return found


class _Ids(NamedTuple):
    ids: Tensor
    epoch: int
    start: Place


def mix(*parts: int) -> int:
    """Return a seed below 2^63 that depends on all parts and their order (a SplitMix64 round for each).

    >>> mix(0, 1) != mix(1, 0)
    True
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
