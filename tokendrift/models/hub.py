"""Weights from the Hugging Face hub: only safetensors and JSON files, so that no downloaded file can run code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokendrift._checks import fail

FILES = ("*.safetensors", "*.json")
FILE_ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".json", ".jsonl", ".txt", ".model", ".gz")


def is_hub_id(name: str) -> bool:
    """Tell whether a string has the form ``owner/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def check_local(name: str | Path, what: str) -> None:
    """Require that a path which cannot be the name of a hub repository exists, rather than ask the hub for it.

    It is a path if it begins with ``.``, ``/`` or ``~``, has more than one ``/``, or ends as a file of weights, a
    tokenizer or text does.

    Raises:
        TokenDriftError: If it is such a path, and nothing is there.
    """
    text = str(name)
    path_like = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    if (path_like or text.lower().endswith(FILE_ENDINGS)) and not Path(text).exists():
        raise fail(f"{what} {text} does not exist.", "Pass a file or folder that exists, or a hub id owner/name.")


def download(repo_id: str, revision: str | None = None, more: Sequence[str] = ()) -> Path:
    """Return the local folder of a hub repository, downloading the files that are not cached.

    Args:
        repo_id: ``owner/name``.
        revision: Branch, tag or commit; the main branch by default. Results that others should be able to
            repeat name a commit.
        more: Patterns of other files that are downloaded, too. Default: none.

    Raises:
        TokenDriftError: If the repository or revision does not exist, or the hub cannot be reached and the
            files are not cached.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise fail(
            f"{error}; it is needed to load from the hub.", "Install it with pip install 'tokendrift[hf]'."
        ) from None
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*FILES, *more]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        at = "" if revision is None else f" at revision {revision}"
        raise fail(
            f"{repo_id!r} is not a local path, and cannot be downloaded from the hub{at}: {reason}",
            "Without a network, copy config.json and model.safetensors from a machine that has one into a folder, "
            "and pass that folder.",
        ) from error


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hide the bars of transformers for loading and writing weights, which break those of a command; not downloads."""
    import huggingface_hub.utils
    import transformers.utils.logging

    hub: Any = huggingface_hub.utils
    logging: Any = transformers.utils.logging
    shown, downloads = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if not downloads:  # which the line above has switched on
            hub.disable_progress_bars()
