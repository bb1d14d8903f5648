"""The tokenizer that belongs to a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokendrift._checks import fail

GPT2_VOCABULARY = 50257  # released models have one entry more: MDLM's mask, DUO's [PAD]

ENDS = ("<|endoftext|>", "<eos>", "</s>", "[SEP]")  # a lone tokenizer.json does not say which token ends a text


def load_tokenizer(name: str | Path, *, fetch: bool = True) -> Any:
    """Return a transformers tokenizer; no code that ships with it is run.

    Args:
        name: A ``tokenizer.json``, a folder, or a hub name such as ``gpt2``.
        fetch: Whether a hub name may be downloaded; otherwise the local cache must have it.

    Raises:
        TokenDriftError: If there is none, or transformers is missing.
    """
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise fail(f"{error}; tokenizers need it.", "Install it with pip install 'tokendrift[hf]'.") from None
    path = Path(name)
    if path.is_dir() and not any(_is_tokenizer_file(each) for each in path.iterdir()):
        raise fail(
            f"no tokenizer can be read from {name}: the folder has none.", "Pass a tokenizer.json, or a hub name."
        )
    lone = path if path.is_file() else path / "tokenizer.json"
    try:
        # A lone tokenizer.json is complete in itself; with a tokenizer_config.json beside it goes by its class.
        if path.is_file() or (lone.is_file() and not (path / "tokenizer_config.json").is_file()):
            fast: Any = PreTrainedTokenizerFast
            tokenizer = fast(tokenizer_file=str(lone))
            vocabulary = tokenizer.get_vocab()
            tokenizer.eos_token = next((name for name in ENDS if name in vocabulary), None)
            return tokenizer
        return AutoTokenizer.from_pretrained(str(name), trust_remote_code=False, local_files_only=not fetch)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise fail(
            f"no tokenizer can be read from {name}: {str(error).splitlines()[0]}",
            "Pass a tokenizer.json, a folder that has one, or a hub name.",
        ) from None


def _is_tokenizer_file(path: Path) -> bool:
    return path.name.startswith(("tokenizer", "vocab")) or path.suffix == ".model"


def find_tokenizer(folder: Path, vocab_size: int, *, fetch: bool = False) -> tuple[Any, str] | None:
    """Return the tokenizer of a checkpoint folder and where it was found.

    A folder without one whose vocabulary is GPT-2's, as those of the released models are, gets GPT-2's own.
    Returns None if there is neither.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return load_tokenizer(folder, fetch=False), str(folder)
    if vocab_size not in (GPT2_VOCABULARY, GPT2_VOCABULARY + 1):
        return None
    try:
        return load_tokenizer("gpt2", fetch=fetch), "gpt2"
    except ValueError:
        return None


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
