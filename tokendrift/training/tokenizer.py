"""The tokenizer of a checkpoint as training needs it: ids of many texts, and what stands around them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokendrift._checks import fail
from tokendrift.models.tokenizer import find_tokenizer, load_tokenizer


class TextTokenizer(NamedTuple):
    """A tokenizer with the ids that stand around texts.

    Attributes:
        tokenizer: That of transformers.
        bos_id: Begins a wrapped sequence; the EOS where there is none.
        eos_id: Ends documents and wrapped sequences.
    """

    tokenizer: Any
    bos_id: int
    eos_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens, on as many threads as there are."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is not None:
            return [each.ids for each in fast.encode_batch(list(texts), add_special_tokens=False)]
        found = self.tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
        return [list(ids) for ids in found["input_ids"]]

    def identity(self) -> str:
        """Return the SHA-256 of its vocabulary: not of its file, which other releases may write in another way."""
        known = [sorted(self.tokenizer.get_vocab().items()), self.bos_id, self.eos_id]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the files that transformers and tokenizers read.

        Raises:
            OSError: If they cannot be written.
        """
        try:
            self.tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # tokenizers raises bare exceptions
            raise OSError(str(error)) from error


def text_tokenizer(source: str | Path | None, checkpoint: Path, vocab_size: int) -> TextTokenizer:
    """Load the tokenizer for texts to train on.

    Args:
        source: A folder, a ``tokenizer.json`` or a hub id; None for that of the checkpoint.
        checkpoint: Folder of the checkpoint, where its tokenizer may lie.
        vocab_size: V of the checkpoint; one of GPT-2's size has GPT-2's tokenizer where it brings none.

    Raises:
        TokenDriftError: If there is none, it cannot be read, or its end of text is unknown.
    """
    found = (load_tokenizer(source), str(source)) if source is not None else None
    found = found or find_tokenizer(checkpoint, vocab_size, fetch=True)
    if found is None:
        raise fail(
            f"{checkpoint} has no tokenizer, and GPT-2's is not to be had or not its own (V = {vocab_size}).",
            "Pass tokenizer: a folder, a tokenizer.json or a hub id.",
        )
    tokenizer, place = found
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:  # a file may say to cut or to fill up, which would lose text or add what is none
        fast.no_truncation()
        fast.no_padding()
    eos, sep = tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)
    bos, cls = tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None)
    eos = sep if eos is None else eos
    if eos is None:
        raise fail(
            f"the tokenizer {place} does not say which token ends a text.",
            "Name its eos_token in tokenizer_config.json.",
        )
    return TextTokenizer(tokenizer, next(found for found in (bos, cls, eos) if found is not None), eos)
