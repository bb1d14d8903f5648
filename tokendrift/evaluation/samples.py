"""What can be scored: texts or ids, brought to one sequence of ids a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokendrift._checks import INTEGER_DTYPES, check_mask, check_tensor, fail

Samples: TypeAlias = Sequence[str] | Tensor | Sequence[Tensor] | Sequence[Sequence[int]]
"""Texts; or ids of the judge's vocabulary, (n, L) or one sequence a sample."""


def id_sequences(
    samples: Samples, attention_mask: Tensor | None = None, tokenizer: Any = None
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
