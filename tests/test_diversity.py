"""Diversity of ids: hand-computed examples, agreement with plain counting, and invariances."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import TokenDriftError
from tokendrift.evaluation import (
    copied_share,
    distinct_n,
    duplicate_share,
    longest_repeat,
    most_frequent_share,
    sample_entropy,
    sample_repetition,
    self_bleu,
    unigram_entropy,
)

HUGE = 2**40  # four such tokens do not fit into 63 bits
corpora = st.lists(
    st.lists(st.sampled_from([0, 1, 2, 3, 50_257, HUGE]), min_size=1, max_size=12), min_size=1, max_size=6
)
orders = st.integers(1, 5)


def grams(sequence, n):
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def entropy(tokens):
    return -sum(c / len(tokens) * math.log(c / len(tokens)) for c in Counter(tokens).values())


# ------------------------------------------------------------------------------------------------ examples


def test_entropy_of_the_published_example():
    values = sample_entropy(torch.tensor([[1, 1, 2, 2], [1, 2, 3, 4]]))
    assert values.tolist() == pytest.approx([math.log(2), math.log(4)], abs=1e-15)
    assert values.mean().item() == pytest.approx(1.03972, abs=5e-6)


@pytest.mark.parametrize("case", ["plain", "padded", "chunked"])
def test_entropy_agrees_with_the_official_code(golden, case):
    numbers = golden("gen_ppl")
    numbers.assert_matches(sample_entropy(numbers[f"{case}.ids"]), f"{case}.entropy")


def test_corpus_entropy_sees_what_sample_entropy_does_not():
    same, different = [[1, 2], [1, 2]], [[1, 2], [3, 4]]
    assert sample_entropy(same).equal(sample_entropy(different))
    assert unigram_entropy(same) == pytest.approx(math.log(2))
    assert unigram_entropy(different) == pytest.approx(math.log(4))


def test_examples_by_hand():
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # 12, 21, 12, 12
    assert sample_repetition([[1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6]]).tolist() == [2 / 3, 0]
    assert most_frequent_share([[1, 1, 2], [3]]) == 0.5
    assert duplicate_share([[1], [1, 1], [1], [1]]) == 0.5


def test_a_sequence_shorter_than_n_repeats_nothing():
    assert sample_repetition([[1, 1, 1], [1, 1, 1, 1, 1]], n=4).tolist() == [0, 0.5]
    assert sample_repetition(torch.tensor([[1, 1, 1]]), n=4).tolist() == [0]


# ------------------------------------------------------------------------------------------------ laws


@given(ids=corpora)
def test_entropies_agree_with_counting(ids):
    assert sample_entropy(ids).tolist() == pytest.approx([entropy(s) for s in ids], abs=1e-12)
    assert unigram_entropy(ids) == pytest.approx(entropy([t for s in ids for t in s]), abs=1e-12)


@given(ids=corpora, n=orders)
def test_ngrams_agree_with_counting(ids, n):
    every = [gram for sequence in ids for gram in grams(sequence, n)]
    if every:
        assert distinct_n(ids, n) == len(set(every)) / len(every)
    own = [grams(sequence, n) for sequence in ids]
    expected = [1 - len(set(g)) / len(g) if g else 0 for g in own]
    assert sample_repetition(ids, n).tolist() == pytest.approx(expected, abs=1e-15)


@given(ids=corpora)
def test_shares_agree_with_counting(ids):
    tokens = Counter(token for sequence in ids for token in sequence)
    assert most_frequent_share(ids) == pytest.approx(max(tokens.values()) / tokens.total(), abs=1e-15)
    assert duplicate_share(ids) == pytest.approx(1 - len({tuple(s) for s in ids}) / len(ids), abs=1e-15)


@given(ids=corpora, data=st.data())
def test_neither_names_of_tokens_nor_order_of_samples_matter(ids, data):
    renamed = [[{0: 9, 1: 8, 2: 7, 3: 6}.get(token, token) for token in sequence] for sequence in ids]
    shuffled = data.draw(st.permutations(renamed))
    for figure in (unigram_entropy, most_frequent_share, duplicate_share, lambda x: distinct_n(x, 1)):
        assert figure(shuffled) == pytest.approx(figure(ids), abs=1e-12)
    assert sorted(sample_entropy(shuffled).tolist()) == pytest.approx(sorted(sample_entropy(ids).tolist()), abs=1e-12)


def bleu(sequence, references):
    """BLEU-4 without smoothing, straight from its definition."""
    log = 0.0
    for n in range(1, 5):
        own = Counter(grams(sequence, n))
        clipped = sum(min(count, max(Counter(grams(r, n))[gram] for r in references)) for gram, count in own.items())
        if clipped == 0:
            return 0.0
        log += math.log(clipped / own.total()) / 4
    nearest = min((abs(len(r) - len(sequence)), len(r)) for r in references)[1]
    return math.exp(log + min(0.0, 1 - nearest / len(sequence)))


short_corpora = st.lists(st.lists(st.sampled_from([0, 1, HUGE]), min_size=1, max_size=12), min_size=2, max_size=6)


@given(ids=short_corpora)
def test_self_bleu_is_bleu_against_all_others(ids):
    expected = [bleu(s, ids[:i] + ids[i + 1 :]) for i, s in enumerate(ids)]
    assert self_bleu(ids).tolist() == pytest.approx(expected, abs=1e-12)


@given(ids=short_corpora)
def test_the_longest_repeat_agrees_with_trying_every_length(ids):
    def longest(s):
        return max((n for n in range(1, len(s)) if max(Counter(grams(s, n)).values()) > 1), default=0)

    assert longest_repeat(ids).tolist() == [longest(s) for s in ids]


@given(ids=short_corpora, corpus=short_corpora, n=orders)
def test_copied_share_agrees_with_a_set_of_ngrams(ids, corpus, n):
    known = {gram for document in corpus for gram in grams(document, n)}
    expected = [sum(g in known for g in grams(s, n)) / max(1, len(grams(s, n))) for s in ids]
    assert copied_share(ids, corpus, n).tolist() == pytest.approx(expected, abs=1e-15)


def test_no_ngram_reaches_from_one_document_into_the_next():
    assert copied_share([[1, 2, 3, 4]], [[1, 2], [3, 4]], n=3).tolist() == [0]
    assert copied_share([[1, 2, 3, 4]], [[1, 2, 3, 4]], n=3).tolist() == [1]


def test_tensors_and_lists_agree():
    ids = torch.randint(7, (5, 9), generator=torch.Generator().manual_seed(0))
    for figure in (sample_entropy, sample_repetition):
        assert torch.equal(figure(ids), figure(ids.tolist()))
    for figure in (unigram_entropy, most_frequent_share, duplicate_share):
        assert figure(ids.int()) == figure(ids.tolist())


def test_entropy_lies_between_nothing_and_that_of_all_different():
    ids = torch.tensor([[5] * 8, list(range(8))])
    assert sample_entropy(ids).tolist() == [0, math.log(8)]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "samples is empty"),
        ([[1], []], "sequence 1 is empty"),
        ([[1, -100]], "ids must not be negative"),
        (["text"], "ids must be token ids"),
        (torch.rand(2, 2), "must hold integer token ids"),
        ([[1], [1.5, 2.5]], "sample 1 must hold integer token ids"),
    ],
)
def test_what_has_no_diversity_is_named(ids, says):
    with pytest.raises(TokenDriftError, match=says):
        sample_entropy(ids)


def test_negative_ids_of_training_text_are_refused_and_copy_nothing():
    """(4, -6) would have the number of (2, 4) in a vocabulary of 5."""
    with pytest.raises(TokenDriftError, match="ids must not be negative"):
        copied_share([[2, 4]], [[4, -6]], n=2)


def test_one_sample_has_no_self_bleu():
    with pytest.raises(TokenDriftError, match="it needs at least 2"):
        self_bleu([[1, 2, 3, 4]])


def test_an_order_without_ngrams_is_named():
    with pytest.raises(TokenDriftError, match="no sequence has 3 tokens, so there is no 3-gram"):
        distinct_n([[1, 2]], 3)
    with pytest.raises(TokenDriftError, match="n must be an integer of at least 1"):
        distinct_n([[1, 2]], 0)
