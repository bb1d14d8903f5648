"""Real English without a download: what every CPython carries, or the user's own text files.

The language reference (``pydoc_data.topics``) and the docstrings of the standard library, read with
``ast`` and never imported, are cut into paragraphs of prose. A hash of its text assigns each document to a
split, so that it stays there across Python versions.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokendrift._checks import fail
from tokendrift.text_files import read_documents

SKIPPED_FOLDERS = {"site-packages", "__pycache__", "lib2to3", "test", "tests", "idle_test"}
SHARES = (("held_out", 0.10), ("judge", 0.35), ("denoiser", 0.55))
LEAST_WORDS = 20_000


class Splits(NamedTuple):
    """Paragraphs by purpose; no document is in two of them.

    Attributes:
        denoiser: For the denoiser and its continuations.
        judge: For the causal judge alone.
        held_out: For real-text figures and validation.
    """

    denoiser: list[str]
    judge: list[str]
    held_out: list[str]


@functools.cache
def python_documents() -> tuple[str, ...]:
    """Return the language reference's topics, then the docstrings of the standard library."""
    from pydoc_data import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in sorted(root.rglob("*.py")) if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    return (*topics.topics.values(), *(text for path in paths for text in docstrings(path)))


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one Python file without running it; a file that does not parse has none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def file_documents(paths: Iterable[Path]) -> Iterator[str]:
    """Yield chapters of the user's UTF-8 text files: runs of paragraphs, about 200 words each."""
    for path in paths:
        text = "\n\n".join(read_documents(path, argument="--text"))
        chapter: list[str] = []
        for paragraph in re.split(r"\n\s*\n", text):
            chapter.append(paragraph)
            if sum(len(part.split()) for part in chapter) >= 200:
                yield "\n\n".join(chapter)
                chapter = []
        if chapter:
            yield "\n\n".join(chapter)


def prose(document: str) -> Iterator[str]:
    """Yield the paragraphs that read as sentences: no code, tables or signatures; white space folded."""
    for block in re.split(r"\n\s*\n", document):
        text = " ".join(block.split())
        letters = sum(char.isalpha() or char == " " for char in text)
        if len(text.split()) >= 5 and letters >= 0.88 * len(text) and not re.search(r">>>|\.\. |\|", text):
            yield text


def split(documents: Iterable[str]) -> Splits:
    """Assign the prose of each document to a split by a hash of its text; repeated paragraphs count once.

    Raises:
        TokenDriftError: If fewer than 20,000 words of prose remain: too few for a judge and a denoiser.
    """
    parts: dict[str, list[str]] = {name: [] for name, _ in SHARES}
    seen: set[str] = set()
    for document in documents:
        fresh = [paragraph for paragraph in prose(document) if paragraph not in seen]
        seen.update(fresh)
        parts[_assigned(document)].extend(fresh)
    words = sum(len(paragraph.split()) for part in parts.values() for paragraph in part)
    if words < LEAST_WORDS:
        raise fail(
            f"the text holds {words:,} words of prose, but the demo needs {LEAST_WORDS:,} for three separate splits.",
            "Pass more --text files (plain prose; code and tables are left out).",
        )
    return Splits(**parts)


def _assigned(document: str) -> str:
    point = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64
    for name, share in SHARES:
        if point < share:
            return name
        point -= share
    return SHARES[-1][0]
