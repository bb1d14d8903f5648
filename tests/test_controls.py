"""Sets made from real text alone: each keeps what it is named for, and loses the rest."""

from __future__ import annotations

import pydoc_data.topics
from collections import Counter
from itertools import pairwise

import pytest

from tokendrift import TokenDriftError
from tokendrift.corpus import prose
from tokendrift.demo import PRETRAINED
from tokendrift.evaluation.controls import PASSAGES, control_sets

tokenizers = pytest.importorskip("tokenizers")
COUNT, LENGTH = 40, 30


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))


@pytest.fixture(scope="module")
def text():
    topics = pydoc_data.topics.topics
    return " ".join(paragraph for name in sorted(topics)[:20] for paragraph in prose(topics[name]))


@pytest.fixture(scope="module")
def found(tokenizer, text):
    return control_sets(text, tokenizer, count=COUNT, length=LENGTH)


def test_controls_are_as_many_and_as_long_as_asked_and_the_same_for_one_seed(found, tokenizer, text):
    assert list(found) == ["unigram draws", "3-gram draws", "shuffled sentences", "tiled text"]
    for samples in found.values():
        assert len(samples) == COUNT and {len(row) for row in samples.ids} == {LENGTH}
        assert samples.texts == tokenizer.decode_batch(samples.ids, skip_special_tokens=False)
        assert samples.metadata["control"] is True
    again = control_sets(text, tokenizer, count=COUNT, length=LENGTH, with_ids=False)
    assert [one.texts for one in again.values()] == [one.texts for one in found.values()]
    assert all(one.ids is None for one in again.values())
    with pytest.raises(TokenDriftError, match="fewer than a sample of 30"):
        control_sets("short", tokenizer, count=COUNT, length=LENGTH)


def test_each_control_keeps_what_it_is_named_for(found, tokenizer, text):
    stream = tokenizer.encode(text).ids
    pairs, words = Counter(pairwise(stream)), Counter(stream)
    share = {name: _known_share(samples.ids, pairs) for name, samples in found.items()}
    assert all(token in words for row in found["unigram draws"].ids for token in row)
    assert share["unigram draws"] < 0.5
    assert share["3-gram draws"] > 0.95
    assert share["shuffled sentences"] > 0.95
    passage = -(-LENGTH // PASSAGES)
    for row in found["tiled text"].ids:
        assert row[passage:] == row[:-passage] and all(pair in pairs for pair in pairwise(row[:passage]))


def _known_share(rows, pairs):
    own = [pair for row in rows for pair in pairwise(row)]
    return sum(pair in pairs for pair in own) / len(own)
