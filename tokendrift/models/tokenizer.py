"""The tokenizer that belongs to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
