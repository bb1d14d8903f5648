"""English prose that needs no download: the documentation inside every CPython, or text files of your own.

The topics of the language reference (``pydoc_data.topics``) and the docstrings of the standard library, which are
parsed and never imported, are cut into paragraphs of prose. A hash of its text assigns each document to one of three
splits, so that a document stays in its split when other documents are added or the Python version changes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokendrift._checks import fail
from tokendrift.text_files import read_documents

SKIPPED_FOLDERS = {"site-packages", "__pycache__", "lib2to3", "test", "tests", "idle_test"}
SHARES = (("held_out", 0.10), ("judge", 0.35), ("denoiser", 0.55))
CHAPTER_WORDS = 200
MINIMUM_WORDS = 20_000


class Splits(NamedTuple):
    """Paragraphs by purpose. No document is in two of the splits.

    Attributes:
        denoiser: Text to train and refine denoisers on, 55 % of the documents.
        judge: Text to train a judge on, 35 % of the documents.
        held_out: Text that no model is trained on, 10 % of the documents.
    """

    denoiser: list[str]
    judge: list[str]
    held_out: list[str]


def read_splits(files: Sequence[str | Path] = ()) -> Splits:
    """Read text and split it by document.

    Args:
        files: UTF-8 text files. Default: the documentation that CPython carries.

    Raises:
        TokenDriftError: If a file cannot be read, or there is too little prose, see `split`.
    """
    return split(file_documents(map(Path, files)) if files else python_documents())


@functools.cache
def python_documents() -> tuple[str, ...]:
    """Return the topics of the language reference, then the docstrings of the standard library."""
    from pydoc_data import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in sorted(root.rglob("*.py")) if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    return (*topics.topics.values(), *(text for path in paths for text in docstrings(path)))


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file without running it. A file that cannot be parsed yields none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in _statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what `ast.walk` yields, without the expressions, which hold no definition."""
    todo = deque([tree])
    while todo:
        node = todo.popleft()
        todo.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
        yield node


def file_documents(paths: Iterable[Path]) -> Iterator[str]:
    """Yield chapters of UTF-8 text files: successive paragraphs of at least 200 words together.

    Raises:
        TokenDriftError: If a file cannot be read, or is not UTF-8.
    """
    for path in paths:
        chapter: list[str] = []
        for paragraph in re.split(r"\n\s*\n", "\n\n".join(read_documents(path))):
            chapter.append(paragraph)
            if sum(len(part.split()) for part in chapter) >= CHAPTER_WORDS:
                yield "\n\n".join(chapter)
                chapter = []
        if chapter:
            yield "\n\n".join(chapter)


def prose(document: str) -> Iterator[str]:
    """Yield the paragraphs of a document that read as sentences, with every run of white space made one space.

    Code, tables and signatures are left out: a paragraph needs at least five words, and letters and spaces must make
    up 88 % of its characters.
    """
    for block in re.split(r"\n\s*\n", document):
        text = " ".join(block.split())
        letters = sum(char.isalpha() or char == " " for char in text)
        if len(text.split()) >= 5 and letters >= 0.88 * len(text) and not re.search(r">>>|\.\. |\|", text):
            yield text


def split(documents: Iterable[str]) -> Splits:
    """Assign the prose of each document to a split by a hash of the document's text.

    A paragraph that occurs several times is kept once.

    Raises:
        TokenDriftError: If fewer than 20,000 words of prose remain, too few for three splits.
    """
    parts: dict[str, list[str]] = {name: [] for name, _ in SHARES}
    seen: set[str] = set()
    for document in documents:
        fresh = [paragraph for paragraph in prose(document) if paragraph not in seen]
        seen.update(fresh)
        parts[_split_of(document)].extend(fresh)
    words = sum(len(paragraph.split()) for part in parts.values() for paragraph in part)
    if words < MINIMUM_WORDS:
        raise fail(
            f"the text holds {words:,} words of prose, but {MINIMUM_WORDS:,} are needed for three separate splits.",
            "Pass more text files of plain prose; code and tables are left out.",
        )
    return Splits(**parts)


def _split_of(document: str) -> str:
    """Return the name of the split whose share of the unit interval holds the hash of a document."""
    point = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64
    for name, share in SHARES:
        if point < share:
            return name
        point -= share
    return SHARES[-1][0]
