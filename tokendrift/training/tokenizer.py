"""The tokenizer of a checkpoint: found, read, and written beside the refined model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokendrift._checks import fail
from tokendrift.models.hub import is_hub_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
GPT2, GPT2_VOCABULARY = "openai-community/gpt2", (50257, 50258)  # without and with a mask entry
END = ("<|endoftext|>", "<eos>", "</s>", "[SEP]", "<|end_of_text|>")
BEGIN = ("<|endoftext|>", "<bos>", "<s>", "[CLS]", "<|begin_of_text|>")


class TextTokenizer(NamedTuple):
    """A tokenizer with the ids that stand around texts.

    Attributes:
        tokenizer: That of the package ``tokenizers``.
        bos_id: Begins a wrapped sequence; the EOS where there is none.
        eos_id: Ends documents and wrapped sequences.
        settings: Content of ``tokenizer_config.json``.
    """

    tokenizer: Tokenizer
    bos_id: int
    eos_id: int
    settings: dict[str, Any]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        return [each.ids for each in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each sequence of ids, special tokens written out."""
        found: list[str] = self.tokenizer.decode_batch([list(each) for each in ids], skip_special_tokens=False)
        return found

    def save(self, folder: Path) -> None:
        """Write the two files that ``tokenizers`` and ``transformers`` read a tokenizer from."""
        self.tokenizer.save(str(folder / FILE))
        (folder / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(source: str | Path | None, checkpoint: Path, vocab_size: int) -> TextTokenizer:
    """Load a tokenizer.

    Args:
        source: A folder, a ``tokenizer.json`` or a hub id; None for that of the checkpoint.
        checkpoint: Folder of the checkpoint, in which or beside which its tokenizer may lie.
        vocab_size: V of the checkpoint; one of GPT-2's size has GPT-2's tokenizer where it brings none.

    Raises:
        TokenDriftError: If there is none, it cannot be read, or its end of text is unknown.
    """
    place = _found(source, checkpoint, vocab_size)
    settings: dict[str, Any] = {}
    try:
        from tokenizers import Tokenizer

        if isinstance(place, Path):
            tokenizer = Tokenizer.from_file(str(place))
            beside = place.with_name(SETTINGS)
            settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        else:
            tokenizer = Tokenizer.from_pretrained(place)
    except ImportError as error:
        raise fail(f"{error}; training on text needs it.", "Install it with pip install 'tokendrift[train]'.") from None
    except Exception as error:  # tokenizers raises bare exceptions
        reason = str(error).strip().split("\n")[0]
        raise fail(f"the tokenizer {place} cannot be read: {reason}", "Pass tokenizer: a folder or a file.") from None
    eos = _special(tokenizer, settings.get("eos_token"), END)
    bos = _special(tokenizer, settings.get("bos_token"), BEGIN)
    if eos is None:
        raise fail(
            f"the tokenizer {place} does not say which token ends a text.",
            "Name its eos_token in tokenizer_config.json.",
        )
    settings.setdefault("eos_token", tokenizer.id_to_token(eos))
    settings.setdefault("bos_token", tokenizer.id_to_token(eos if bos is None else bos))
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    return TextTokenizer(tokenizer, eos if bos is None else bos, eos, settings)


def _found(source: str | Path | None, checkpoint: Path, vocab_size: int) -> Path | str:
    """Return the file of the tokenizer, or its name on the hub."""
    if source is None:
        for folder in (checkpoint, checkpoint.parent):
            if (folder / FILE).is_file():
                return folder / FILE
        if vocab_size in GPT2_VOCABULARY:
            return GPT2
        raise fail(
            f"{checkpoint} has no {FILE}, and its vocabulary of {vocab_size} entries is not GPT-2's.",
            "Pass tokenizer: a folder, a file or a hub id.",
        )
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    if path.is_file():
        return path
    if is_hub_id(str(source)) or str(source) == "gpt2":
        return str(source)
    raise fail(f"there is no tokenizer at {source}.", f"Pass a folder with {FILE}, such a file, or a hub id.")


def _special(tokenizer: Tokenizer, stated: Any, usual: Sequence[str]) -> int | None:
    """Return the id of a special token: the stated one, or the first of the usual names that the vocabulary has."""
    name = stated.get("content") if isinstance(stated, dict) else stated
    for candidate in [name] if name else usual:
        found: int | None = tokenizer.token_to_id(candidate)
        if found is not None:
            return found
    return None
