"""Samples as texts or ids, brought to one sequence of ids for each sample, and ids decoded to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokendrift._checks import INTEGER_DTYPES, check_mask, check_tensor, fail
from tokendrift.models.tokenizer import encode
from tokendrift.sampling.sample_set import SampleSet

# The replacements of transformers' clean_up_tokenization, in its order.
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip

GOLDEN = 0.6180339887498949

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
        samples = encode(tokenizer, [str(sample) for sample in samples], special_tokens=True)
    sequences = [torch.as_tensor(sample, device="cpu") for sample in samples]
    for i, ids in enumerate(sequences):
        if ids.ndim != 1:
            raise fail(f"sample {i} must be one sequence of ids, (L,).", sample=ids)
        if len(ids) and ids.dtype not in INTEGER_DTYPES:
            raise fail(f"sample {i} must hold integer token ids.", "Convert them with .long().", sample=ids)
    return [ids.long() for ids in sequences], max(map(len, sequences))


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


def cleaned(text: str) -> str:
    """Return a text without the gaps before punctuation and contractions, as transformers 4.38 closed them.

    >>> cleaned("It 's late . Is n't it ?")
    "It's late. Isn't it?"
    """
    for gap, closed in CLEAN_UP:
        text = text.replace(gap, closed)
    return text
