"""Samples as texts or ids, brought to one sequence of ids for each sample, and ids decoded to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tokendrift._checks import INTEGER_DTYPES, check_mask, check_tensor, fail

# The replacements of transformers' clean_up_tokenization, in its order.
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip

GOLDEN = 0.6180339887498949


class BadLine(NamedTuple):
    """A line that holds no sample.

    Attributes:
        number: Its number in the file, from 1.
        reason: What is wrong with it.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class SampleSet:
    """Samples of one model, or real text: ids or texts of each sample, or both.

    Attributes:
        ids: Ids of each sample as generated, None if they are not known.
        texts: Text of each sample, None if it is not known.
        nfe: Forward calls of the denoiser for a sample, None for real text or if it is not known.
        metadata: Header of the samples file: how the samples were made.
        bad_lines: Lines that were left out, by number and reason.
    """

    ids: list[list[int]] | None = None
    texts: list[str] | None = None
    nfe: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    bad_lines: tuple[BadLine, ...] = ()

    def __post_init__(self) -> None:
        if self.ids is None and self.texts is None:
            raise fail("a SampleSet needs ids or texts, and has neither.")
        if self.ids is not None and self.texts is not None and len(self.ids) != len(self.texts):
            raise fail(f"a SampleSet has {len(self.ids)} sequences of ids but {len(self.texts)} texts.")

    def __len__(self) -> int:
        return len(self.scored())

    def only(self, chosen: Sequence[int]) -> SampleSet:
        """Return the samples of these indices as a set."""
        ids, texts = self.ids, self.texts
        return replace(
            self,
            ids=ids if ids is None else [ids[i] for i in chosen],
            texts=texts if texts is None else [texts[i] for i in chosen],
        )

    def scored(self) -> list[str] | list[list[int]]:
        """Return what a judge reads: the texts, or the ids where there are none."""
        return self.texts if self.texts is not None else self.ids or []


Ids: TypeAlias = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]
"""Ids, (n, L) or one sequence a sample."""
SampleInput: TypeAlias = Sequence[str] | Ids | SampleSet
"""Texts; ids of the judge's vocabulary; or a `SampleSet`, as `read_samples` returns it."""


def id_sequences(
    samples: SampleInput, attention_mask: Tensor | None = None, tokenizer: Any = None
) -> tuple[list[Tensor], int]:
    """Return the ids of each sample, and the width of the widest row that came.

    Args:
        samples: Texts, ids (n, L), or sequences of ids.
        attention_mask: With ids (n, L): 0 on padding, on whichever side; it is taken out.
        tokenizer: For texts.

    Returns:
        n tensors int64 (L,) on the CPU, without padding; and L of the padded rows or of the longest sequence.

    Raises:
        TokenDriftError: If there is no sample, or the samples are neither texts nor ids.

    >>> id_sequences(torch.tensor([[0, 0, 7, 8]]), attention_mask=torch.tensor([[0, 0, 1, 1]]))
    ([tensor([7, 8])], 4)
    """
    if isinstance(samples, SampleSet):
        samples = samples.scored()
    if isinstance(samples, str) or not isinstance(samples, (Tensor, Sequence)):
        raise fail(
            "samples must be a list of texts, ids (n, L), or a list of id sequences.",
            "Put a single text into a list.",
            samples=samples,
        )
    if len(samples) == 0:
        raise fail("samples is empty: there is nothing to score.")
    if attention_mask is not None and not isinstance(samples, Tensor):
        raise fail("attention_mask belongs to ids (n, L); texts and lists are padded here.", "Leave it out.")
    if isinstance(samples, Tensor):
        if check_tensor("samples", samples, ("n", "L")).dtype not in INTEGER_DTYPES:
            raise fail("samples must hold integer token ids.", "Convert them with .long().", samples=samples)
        rows = samples.detach().cpu().long()
        if attention_mask is None:
            return list(rows), rows.shape[1]
        mask = check_mask("attention_mask", attention_mask, samples.shape).cpu()
        return [row[kept] for row, kept in zip(rows, mask, strict=True)], rows.shape[1]
    if any(isinstance(sample, str) for sample in samples):
        if not all(isinstance(sample, str) for sample in samples):
            raise fail("samples must be all texts or all ids.")
        samples = tokenize(tokenizer, [str(sample) for sample in samples])
    sequences = [torch.as_tensor(sample, device="cpu").long() for sample in samples]
    for i, ids in enumerate(sequences):
        if ids.ndim != 1:
            raise fail(f"sample {i} must be one sequence of ids, (L,).", sample=ids)
    return sequences, max(map(len, sequences))


def spread(sizes: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Return the index of a sequence for each length, spread evenly over the sequences that are long enough.

    If no sequence is long enough, the longest remaining one is chosen. No sequence is chosen twice: with fewer
    sequences than lengths, the result is shorter than the lengths.

    Args:
        sizes: Length of every sequence.
        lengths: Wanted lengths, falling.

    >>> spread([9, 2, 9, 2, 9, 2, 9, 2], [5, 5])
    [0, 4]
    """
    left = torch.tensor(sizes)
    chosen = []
    for k, length in enumerate(lengths[: len(left)]):
        fit = (left >= length).nonzero()[:, 0]
        # Multiples of the golden section fall evenly however many there are of one length.
        best = int(fit[int(k * GOLDEN % 1 * len(fit))] if len(fit) else left.argmax())
        chosen.append(best)
        left[best] = -1  # taken
    return chosen


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, whole, without special tokens around it.

    Special tokens written in the text ("<|endoftext|>") become their ids, as in the published evaluations.

    Args:
        tokenizer: A transformers tokenizer (called) or a ``tokenizers.Tokenizer`` (``encode_batch``).
        texts: Samples.

    Raises:
        TokenDriftError: If the tokenizer is missing, of another kind, or set to cut texts.
    """
    if tokenizer is None:
        raise fail(
            "texts need the judge's tokenizer, and none was given.",
            "Pass tokenizer=..., or ids of the judge's vocabulary instead of texts.",
        )
    if hasattr(tokenizer, "encode_batch"):
        if getattr(tokenizer, "truncation", None) is not None:
            raise fail(
                "the tokenizer is set to truncate, so samples would be scored in part.",
                "Call tokenizer.no_truncation(); to score the first tokens only, pass truncate=... instead.",
                truncation=tokenizer.truncation,
            )
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        kept = [zip(e.ids, e.attention_mask, strict=True) for e in encoded]
        return [[token for token, seen in pairs if seen] for pairs in kept]
    if not callable(tokenizer):
        raise fail("tokenizer must be a transformers tokenizer or a tokenizers.Tokenizer.", tokenizer=tokenizer)
    out = tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return [list(ids) for ids in out["input_ids"]]


def decode(tokenizer: Any, ids: Ids, *, clean_up_spaces: bool = False) -> list[str]:
    """Return the text of each sequence of ids, special tokens written out, the same with every release.

    Args:
        tokenizer: The denoiser's: of transformers (``batch_decode``) or a ``tokenizers.Tokenizer``
            (``decode_batch``).
        ids: (n, L), or a list of sequences.
        clean_up_spaces: Close the gap before punctuation and contractions (" ." becomes "."). The published
            evaluations of MDLM and DUO did so: it was the default of transformers 4.38, which they pin, and later
            releases changed it. Default: False, which keeps the text as generated.

    Raises:
        TokenDriftError: If the tokenizer is of another kind.
    """
    rows = [list(map(int, sequence)) for sequence in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    if hasattr(tokenizer, "batch_decode"):
        texts = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    elif hasattr(tokenizer, "decode_batch"):
        texts = tokenizer.decode_batch(rows, skip_special_tokens=False)
    else:
        raise fail("tokenizer must be a transformers tokenizer or a tokenizers.Tokenizer.", tokenizer=tokenizer)
    return [cleaned(text) for text in texts] if clean_up_spaces else list(texts)


def cleaned(text: str) -> str:
    """Return a text without the gaps before punctuation and contractions, as transformers 4.38 closed them.

    >>> cleaned("It 's late . Is n't it ?")
    "It's late. Isn't it?"
    """
    for gap, closed in CLEAN_UP:
        text = text.replace(gap, closed)
    return text
