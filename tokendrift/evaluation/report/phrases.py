"""The phrases that a set of texts says most often, and where they stand in a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import NamedTuple

WORDS = 3  # of a phrase
MOST = 10  # phrases of a set

# A special token is one word, and so is each character of Chinese and Japanese, which put no space between words.
WORD = re.compile(r"<\|?\w+\|?>|[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


class Phrase(NamedTuple):
    """A phrase and how often a set of texts says it."""

    text: str
    times: int


class Part(NamedTuple):
    """A piece of a text: inside a repeated phrase, or between two."""

    text: str
    repeated: bool


def most_repeated(texts: Sequence[str]) -> list[Phrase]:
    """Return the `MOST` most frequent phrases of those that occur more than once in all texts together.

    A phrase is a run of `WORDS` words, special tokens or punctuation marks, whatever the space between them; all but
    one of them are words.

    >>> most_repeated(["the cat sat on the mat", "the cat sat down"])
    [Phrase(text='the cat sat', times=2)]
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        found = WORD.findall(text)
        grams = zip(*(found[k:] for k in range(WORDS)), strict=False)
        counts.update(gram for gram in grams if sum(word[0].isalnum() for word in gram) >= WORDS - 1)
    return [Phrase(" ".join(gram), count) for gram, count in counts.most_common(MOST) if count > 1]


def marked(text: str, phrases: Collection[Phrase]) -> list[Part]:
    """Return a text in pieces, those of the phrases apart; phrases that touch make one piece.

    >>> marked("so the  cat sat", [Phrase("the cat sat", 2)])
    [Part(text='so ', repeated=False), Part(text='the  cat sat', repeated=True)]
    """
    wanted = {phrase.text for phrase in phrases}
    spans = [match.span() for match in WORD.finditer(text)]
    inside = [False] * len(text)
    for k in range(len(spans) - WORDS + 1):
        if " ".join(text[start:end] for start, end in spans[k : k + WORDS]) in wanted:
            first, last = spans[k][0], spans[k + WORDS - 1][1]
            inside[first:last] = [True] * (last - first)
    runs = groupby(zip(text, inside, strict=True), key=lambda letter: letter[1])
    return [Part("".join(letter for letter, _ in run), repeated) for repeated, run in runs]
