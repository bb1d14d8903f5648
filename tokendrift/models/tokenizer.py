"""The tokenizer of a checkpoint: finding, loading and comparing it, and text to ids and back.

A tokenizer is one of transformers (fast or slow) or a ``tokenizers.Tokenizer``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tokendrift._checks import fail, warn_user
from tokendrift.files import foreign_errors, is_failure, reason
from tokendrift.models.hub import check_local

UNKNOWN = "\ufffd"  # what stands in a text for an id that the tokenizer does not have
GPT2_VOCABULARY = 50257  # released models have one entry more: MDLM's mask, DUO's [PAD]
UNUSED = ("truncation", "padding", "post_processor")  # parts of a serialised tokenizer that `encode` does not apply
ENDS = ("<|endoftext|>", "<eos>", "</s>", "[SEP]")  # a lone tokenizer.json does not say which token ends a text

# ------------------------------------------------------------------------------------------ finding and loading


def load_tokenizer(name: str | Path, *, fetch: bool = True, trusted: bool = False) -> Any:
    """Return a transformers tokenizer; no code that ships with it is run unless it is trusted.

    Args:
        name: A ``tokenizer.json``, a folder, or a hub name such as ``gpt2``.
        fetch: Whether a hub name may be downloaded; otherwise the local cache must have it.
        trusted: Whether Python code that ships with it may be run. Default: False.

    Raises:
        TokenDriftError: If there is none, or transformers is missing.
    """
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise fail(
            f"{error}; it is needed to load a tokenizer.", "Install it with pip install 'tokendrift[hf]'."
        ) from None
    path = Path(name)
    if path.is_dir() and not any(_is_tokenizer_file(each) for each in path.iterdir()):
        raise fail(
            f"no tokenizer can be read from {name}: the folder has none.", "Pass a tokenizer.json, or a hub name."
        )
    lone = path if path.is_file() else path / "tokenizer.json"
    try:
        check_local(name, "tokenizer")
        # A lone tokenizer.json is complete in itself; with a tokenizer_config.json beside it goes by its class.
        if path.is_file() or (lone.is_file() and not (path / "tokenizer_config.json").is_file()):
            fast: Any = PreTrainedTokenizerFast
            tokenizer = fast(tokenizer_file=str(lone))
            vocabulary = tokenizer.get_vocab()
            tokenizer.eos_token = next((token for token in ENDS if token in vocabulary), None)
            return tokenizer
        return AutoTokenizer.from_pretrained(str(name), trust_remote_code=trusted, local_files_only=not fetch)
    except BaseException as error:  # the tokenizers library raises bare exceptions, and panics
        if not is_failure(error):
            raise
        raise fail(
            f"no tokenizer can be read from {name}: {reason(error)}.",
            "Pass a tokenizer.json, a folder that has one, or a hub name.",
        ) from None


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _is_tokenizer_file(path: Path) -> bool:
    return path.name.startswith(("tokenizer", "vocab")) or path.suffix == ".model"


def find_tokenizer(
    folder: Path, vocab_size: int, *, source: str | Path | None = None, fetch: bool = False, trusted: bool = False
) -> tuple[Any, str] | None:
    """Return the tokenizer of a checkpoint and where it was found, None if there is none.

    A folder without a tokenizer whose vocabulary is GPT-2's, as those of the released models are, gets GPT-2's own.

    Args:
        folder: Folder of the checkpoint.
        vocab_size: V of the checkpoint.
        source: A ``tokenizer.json``, folder or hub name to use instead of the checkpoint's own tokenizer.
        fetch: Whether GPT-2's tokenizer may be downloaded; otherwise the local cache must have it.
        trusted: Whether Python code of the checkpoint's own tokenizer may be run. Default: False.

    Raises:
        TokenDriftError: If ``source``, or the tokenizer in the folder, cannot be read.
    """
    if source is not None:
        return load_tokenizer(source), str(source)
    if has_tokenizer(folder):
        return load_tokenizer(folder, fetch=False, trusted=trusted), str(folder)
    if vocab_size not in (GPT2_VOCABULARY, GPT2_VOCABULARY + 1):
        return None
    try:
        return load_tokenizer("gpt2", fetch=fetch), "gpt2"
    except ValueError:
        return None


def require_tokenizer(
    folder: Path, vocab_size: int, *, source: str | Path | None = None, trusted: bool = False
) -> tuple[Any, str]:
    """Return what `find_tokenizer` finds, downloading it where that is needed.

    Raises:
        TokenDriftError: If there is none, or it cannot be read.
    """
    found = find_tokenizer(folder, vocab_size, source=source, fetch=True, trusted=trusted)
    if found is None:
        raise fail(
            f"{folder} has no tokenizer, and GPT-2's cannot be loaded or is not its own (V = {vocab_size}).",
            "Pass tokenizer: a folder, a tokenizer.json or a hub id.",
        )
    return found


# -------------------------------------------------------------------------------------------- text to ids and back


_tokenizer_errors = foreign_errors("the tokenizer fails", "Its files may be damaged; fetch them again.")


@_tokenizer_errors
def encode(tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
    """Return the ids of each text, whole and without special tokens around it.

    A fast tokenizer uses as many threads as there are.

    Args:
        tokenizer: A transformers tokenizer or a ``tokenizers.Tokenizer``.
        texts: Any number of texts.
        special_tokens: Whether special tokens that are written in a text, such as "<|endoftext|>", become their ids,
            as `decode` wrote them. Otherwise they are text like any other. Default: False.

    Raises:
        TokenDriftError: If the tokenizer is of another kind, or a ``tokenizers.Tokenizer`` is set to truncate.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:  # its file may say to truncate or to pad, which would lose text or add what is none
        fast.no_truncation()
        fast.no_padding()
        return [one.ids for one in _encode_batch(fast, texts, special_tokens)]
    if hasattr(tokenizer, "encode_batch"):
        if getattr(tokenizer, "truncation", None) is not None:
            raise fail(
                "the tokenizer truncates, so only part of a text would be read.",
                "Call tokenizer.no_truncation().",
                truncation=tokenizer.truncation,
            )
        encoded = _encode_batch(tokenizer, texts, special_tokens)
        return [[i for i, kept in zip(one.ids, one.attention_mask, strict=True) if kept] for one in encoded]
    if tokenizer is None:
        raise fail("texts need a tokenizer, and none was given.", "Pass tokenizer=..., or ids instead of texts.")
    if not callable(tokenizer):
        raise fail("tokenizer must be a transformers tokenizer or a tokenizers.Tokenizer.", tokenizer=tokenizer)
    options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
    found = tokenizer(list(texts), split_special_tokens=not special_tokens, **options)
    return [list(ids) for ids in found["input_ids"]]


def _encode_batch(tokenizer: Any, texts: Sequence[str], special_tokens: bool) -> Any:
    before = getattr(tokenizer, "encode_special_tokens", None)
    if before is None:  # a tokenizer of another library with the same interface
        return tokenizer.encode_batch(list(texts), add_special_tokens=False)
    tokenizer.encode_special_tokens = not special_tokens
    try:
        return tokenizer.encode_batch(list(texts), add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = before


@_tokenizer_errors
def decode(tokenizer: Any, ids: Tensor | Sequence[Sequence[int]] | Sequence[Tensor]) -> list[str]:
    """Return the text of each sequence of ids: special tokens are written out, and spaces stay as generated.

    An id that the tokenizer does not have, as a model may generate whose vocabulary is larger, is written as U+FFFD,
    and a warning says how many there were.

    Args:
        tokenizer: A transformers tokenizer or a ``tokenizers.Tokenizer``.
        ids: Ids (n, L), or a list of sequences.

    Raises:
        TokenDriftError: If the tokenizer is of another kind.
    """
    rows = [list(map(int, sequence)) for sequence in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    if hasattr(tokenizer, "batch_decode"):
        write = partial(tokenizer.batch_decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    elif hasattr(tokenizer, "decode_batch"):
        write = partial(tokenizer.decode_batch, skip_special_tokens=False)
    else:
        raise fail("tokenizer must be a transformers tokenizer or a tokenizers.Tokenizer.", tokenizer=tokenizer)
    size = vocabulary_size(tokenizer)
    unknown = [token for row in rows for token in row if token >= size]
    if not unknown:
        return list(write(rows))
    warn_user(
        f"{len(unknown)} of {sum(map(len, rows))} ids, such as {unknown[0]}, are not in the vocabulary of the "
        f"tokenizer, which has {size} entries. They are written as {UNKNOWN!r}."
    )
    return [UNKNOWN.join(write(_split(row, size))) for row in rows]


def vocabulary_size(tokenizer: Any) -> float:
    """Return the number of entries of a tokenizer, added tokens included; infinity if it does not say."""
    if hasattr(tokenizer, "get_vocab_size"):
        size: int = tokenizer.get_vocab_size()
        return size
    return len(tokenizer) if hasattr(tokenizer, "__len__") else math.inf


def _split(row: Sequence[int], size: float) -> list[list[int]]:
    """Return the runs of known ids in a row, between which the unknown ones stand."""
    runs: list[list[int]] = [[]]
    for token in row:
        if token < size:
            runs[-1].append(token)
        else:
            runs.append([])
    return runs


def end_of_text(tokenizer: Any) -> int | None:
    """Return the id that ends a text: the EOS token, else the separator of BERT; None if the tokenizer has neither."""
    return _first_id(tokenizer, "eos_token_id", "sep_token_id")


def start_of_text(tokenizer: Any) -> int | None:
    """Return the id that begins a text: the BOS token, else BERT's CLS, else the end of text; None without any."""
    return _first_id(tokenizer, "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id")


def _first_id(tokenizer: Any, *names: str) -> int | None:
    found = (getattr(tokenizer, name, None) for name in names)
    return next((token for token in found if token is not None), None)


# ------------------------------------------------------------------------------------------------------- identity


def tokenizer_identity(tokenizer: Any) -> str:
    """Return the SHA-256 of all that determines the ids of a text: copies of a tokenizer have equal identities.

    A fast tokenizer is read in its whole serialised form: normaliser, splitting, merges, vocabulary, special tokens.
    Truncation, padding and what is put around texts are left out, because `encode` does not apply them. Of a slow
    tokenizer, the class and the vocabulary count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        content = json.loads(backend.to_str()) | dict.fromkeys(UNUSED)
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return _sha256(content)


def same_tokenizer(first: Any, second: Any) -> bool:
    """Return whether two tokenizers encode every text in the same way, that is, whether their identities are equal."""
    return tokenizer_identity(first) == tokenizer_identity(second)


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class TextTokenizer(NamedTuple):
    """A tokenizer with the ids that begin and end texts.

    Attributes:
        tokenizer: A transformers tokenizer.
        bos_id: Begins a wrapped sequence; the EOS where there is none.
        eos_id: Ends documents and wrapped sequences.
    """

    tokenizer: Any
    bos_id: int
    eos_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, see `encode`."""
        return encode(self.tokenizer, texts)

    def identity(self) -> str:
        """Return the SHA-256 of the tokenizer and of the ids around texts."""
        return _sha256([tokenizer_identity(self.tokenizer), self.bos_id, self.eos_id])

    def has_identity(self, stored: str) -> bool:
        """Tell whether a stored identity is that of this tokenizer.

        Checkpoints of earlier versions stored the SHA-256 of the vocabulary and of the ids around texts alone, which
        is accepted, too.
        """
        earlier = _sha256([sorted(self.tokenizer.get_vocab().items()), self.bos_id, self.eos_id])
        return stored in (self.identity(), earlier)

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


def text_tokenizer(
    source: str | Path | None, checkpoint: Path, vocab_size: int, *, trusted: bool = False
) -> TextTokenizer:
    """Load the tokenizer for texts to train on.

    Args:
        source: A folder, a ``tokenizer.json`` or a hub id; None for that of the checkpoint.
        checkpoint: Folder of the checkpoint, which may contain its tokenizer.
        vocab_size: V of the checkpoint. A checkpoint without a tokenizer whose V is that of GPT-2 uses the tokenizer of
            GPT-2.
        trusted: As in `find_tokenizer`.

    Raises:
        TokenDriftError: If there is none, it cannot be read, or its end of text is unknown.
    """
    tokenizer, place = require_tokenizer(checkpoint, vocab_size, source=source, trusted=trusted)
    bos, eos = start_of_text(tokenizer), end_of_text(tokenizer)
    if bos is None or eos is None:
        raise fail(
            f"the tokenizer {place} does not state its end-of-text token.",
            "Set eos_token in its tokenizer_config.json.",
        )
    return TextTokenizer(tokenizer, bos, eos)
