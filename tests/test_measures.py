"""The figures of a set together, two sets beside each other, and several beside real text."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import TokenDriftError
from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.evaluation import (
    GenerativePerplexity,
    Interval,
    SampleSet,
    bootstrap_interval,
    check_samples,
    compare,
    copied_share,
    distinct_n,
    duplicate_share,
    evaluate,
    generative_perplexity,
    longest_repeat,
    measure,
    most_frequent_share,
    nelbo,
    nelbo_interval,
    perplexity_interval,
    perplexity_ratio_interval,
    sample_entropy,
    sample_repetition,
    self_bleu,
    sequence_nelbo,
    unigram_entropy,
)
from tokendrift.evaluation.evaluator import cut_to_lengths
from tokendrift.evaluation.samples import cleaned, id_sequences, spread

V = 20


def bigram(ids, attention_mask=None):
    """Judge by the last token only."""
    return torch.randn(V, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[ids]


class Letters:
    """A tokenizer of single letters behind the interface of ``tokenizers``; id i is the i-th letter."""

    truncation = None

    def decode_batch(self, rows, skip_special_tokens):
        assert not skip_special_tokens
        return ["".join(chr(ord("a") + token) for token in row) for row in rows]

    def encode_batch(self, texts, add_special_tokens):
        assert not add_special_tokens
        ids = [[ord(letter) - ord("a") for letter in text] for text in texts]
        return [type("Encoding", (), {"ids": row, "attention_mask": [1] * len(row)}) for row in ids]


@pytest.fixture
def judge():
    return GenerativePerplexity(bigram, Letters(), protocol="all")


def random_ids(n=40, length=24, *, seed=0, size=V):
    return torch.randint(size, (n, length), generator=torch.Generator().manual_seed(seed))


def test_every_figure_is_that_of_its_function(judge):
    ids = torch.cat([random_ids(), random_ids()[20:22]])
    found = measure(ids, judge, nfe=4, training=ids[:5], resamples=200)
    values = {name: interval.estimate for name, interval in found.intervals().items()}
    assert values == pytest.approx(
        {
            "gen_ppl": generative_perplexity(ids, bigram, protocol="all").perplexity,
            "nats_per_generated_token": generative_perplexity(ids, bigram, protocol="all").nll / (42 * 24),
            "sample_entropy": sample_entropy(ids).mean().item(),
            "unigram_entropy": unigram_entropy(ids),
            **{f"distinct_{n}": distinct_n(ids, n) for n in range(1, 5)},
            "repetition_4": sample_repetition(ids, 4).mean().item(),
            "longest_repeat": longest_repeat(ids).double().mean().item(),
            "most_frequent_share": most_frequent_share(ids),
            "duplicate_share": duplicate_share(ids),
            "self_bleu": self_bleu(ids).mean().item(),
            "length": 24,
            "copied_share": copied_share(ids, ids[:5]).mean().item(),
        },
        rel=1e-12,
    )
    assert values["duplicate_share"] == pytest.approx(2 / 42)
    assert values["copied_share"] == pytest.approx(5 / 42)
    assert (found.samples, found.tokens, found.nfe, found.skipped) == (42, 42 * 24, 4, 0)
    assert found.gen_ppl == pytest.approx(perplexity_interval(found.perplexity, resamples=200), rel=1e-12)
    for value in found.intervals().values():
        assert value.low - 1e-12 <= value.estimate <= value.high + 1e-12


def test_bits_per_byte_and_nats_per_token_are_ratios_of_sums(judge):
    ids = [row[: 6 + i % 10] for i, row in enumerate(random_ids(30, 16).tolist())]
    texts = Letters().decode_batch(ids, skip_special_tokens=False)
    found = measure(SampleSet(ids=ids, texts=texts), judge, resamples=200)
    nll, tokens = found.perplexity.nll, sum(map(len, ids))
    assert found.bits_per_byte.estimate == pytest.approx(
        nll / math.log(2) / tokens, rel=1e-12
    )  # a byte for each letter
    assert found.nats_per_generated_token.estimate == pytest.approx(nll / tokens, rel=1e-12)
    assert found.bits_per_byte.estimate == pytest.approx(found.perplexity.bits_per_byte, rel=1e-12)
    assert found.bits_per_byte.low < found.bits_per_byte.estimate < found.bits_per_byte.high
    ratio = bootstrap_interval(
        lambda a, b: a.sum(dim=-1) / b.sum(dim=-1),
        found.perplexity.sample_nll / math.log(2),
        found.perplexity.sample_bytes,
        resamples=200,
    )
    assert found.bits_per_byte == pytest.approx(ratio, rel=1e-9)
    assert measure(ids, judge, resamples=10).bits_per_byte is None
    half = judge.score(texts[:15]), judge.score(texts[15:])
    judge.update(texts[:15])
    judge.update(texts[15:])
    whole = judge.compute()
    assert whole.bits_per_byte == pytest.approx(sum(part.nll for part in half) / math.log(2) / tokens, rel=1e-12)
    assert whole.nats_per_generated_token is None


def test_intervals_of_the_whole_set_move_as_new_draws_do(judge):
    """The spread that resampling predicts from one set is the spread over independent sets."""
    weights = 1 / torch.arange(1.0, V + 1)
    generator = torch.Generator().manual_seed(0)
    sets = [torch.multinomial(weights, 60 * 12, True, generator=generator).view(60, 12) for _ in range(240)]
    found = [measure(ids, judge, resamples=200).replicates for ids in sets[:12]]
    # A standard deviation from 240 sets is known to 5 %. Halves of a small vocabulary are less saturated than the
    # whole, so the interval of distinct n-grams is too wide there, never too narrow.
    for name, figure, most in (
        ("unigram_entropy", unigram_entropy, 1.2),
        ("most_frequent_share", most_frequent_share, 1.2),
        ("distinct_2", lambda ids: distinct_n(ids, 2), 1.8),
    ):
        spread = torch.tensor([figure(ids) for ids in sets]).std().item()
        predicted = sum(replicates[name].std().item() for replicates in found) / len(found)
        assert 0.8 < predicted / spread < most, name


def test_measures_go_into_json_with_all_that_a_gen_ppl_needs(judge):
    found = measure(random_ids(), judge, nfe=8, nelbo=Interval(3.0, 2.9, 3.1), resamples=50)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["gen_ppl"]["estimate"] == found.gen_ppl.estimate
    assert plain["nelbo"] == {"estimate": 3.0, "low": 2.9, "high": 3.1}
    assert (plain["protocol"], plain["precision"], plain["judge"], plain["nfe"]) == ("all", "float64", "bigram", 8)
    assert (plain["vocabulary"], plain["retokenised"], plain["clean_up_spaces"]) == ("generated", False, None)
    assert plain["scored_tokens"] == 40 * 23
    assert all(len(values) == 40 for values in plain["per_sample"].values())
    assert plain["copied_share"] is None and "replicates" not in plain and "per_sample" not in found.summary()


def test_what_is_not_defined_becomes_null(judge):
    plain = measure([[1, 2], [3, 4]], judge, resamples=10).to_dict()
    assert plain["distinct_3"] == {"estimate": None, "low": None, "high": None}
    assert plain["distinct_2"]["estimate"] == 1.0


def test_the_judge_reads_the_decoded_text_and_diversity_the_ids(judge):
    class Shifted(Letters):
        def decode_batch(self, rows, skip_special_tokens):
            return super().decode_batch([[token + 1 for token in row] for row in rows], skip_special_tokens)

    ids = [[0, 1, 2], [3, 4, 4]]
    found = measure(ids, judge, tokenizer=Shifted(), resamples=10)
    assert found.perplexity.nll == generative_perplexity([[1, 2, 3], [4, 5, 5]], bigram, protocol="all").nll
    assert found.per_sample["sample_entropy"].tolist() == sample_entropy(ids).tolist()
    assert (found.retokenised, found.vocabulary, found.clean_up_spaces) == (True, "generated", False)
    in_judge = measure(ids, judge, tokenizer=Shifted(), vocabulary="judge", resamples=10)
    assert in_judge.vocabulary == "judge"
    from_text = measure(["bcd", "eff"], judge, resamples=10)
    assert from_text.perplexity.nll == found.perplexity.nll and from_text.vocabulary == "judge"
    with pytest.raises(TokenDriftError, match="vocabulary='generated' needs the ids as generated"):
        measure(["bcd", "eff"], judge, vocabulary="generated")
    with pytest.raises(TokenDriftError, match="ids were given and there is no tokenizer to decode them"):
        measure(ids, judge, vocabulary="judge")


def test_samples_too_short_to_score_are_an_error_or_counted(judge):
    texts = ["abc", "a", "def", "", "ghi"]
    with pytest.raises(TokenDriftError, match="sample 1 has 1 token; the judge predicts each token from"):
        measure(texts, judge)
    found = measure(texts, judge, skip_bad=True, resamples=10)
    assert (found.samples, found.skipped) == (3, 2)
    with pytest.raises(TokenDriftError, match="at least 2 samples, and there are 1 to score"):
        measure(["abc", "a"], judge, skip_bad=True)


def test_training_text_without_a_tokenizer_is_named(judge):
    with pytest.raises(TokenDriftError, match="training is text, but there is no tokenizer to encode it"):
        measure(random_ids(), judge, training=["abc"])
    texts = ["abcdefghij", "jihgfedcba"]
    copies = measure(texts, judge, training=["xabcdefghijx"], resamples=10)
    assert copies.per_sample["copied_share"].tolist() == [1, 0]


# ------------------------------------------------------------------------------------------------ comparison


def test_training_text_is_read_in_the_vocabulary_of_the_figures(judge):
    ids, tokenizer = random_ids(9, 12).tolist(), DoubleLetters()
    both = SampleSet(ids=ids, texts=tokenizer.decode_batch(ids, skip_special_tokens=False))
    for vocabulary in ("generated", "judge"):
        found = measure(both, judge, tokenizer=tokenizer, vocabulary=vocabulary, training=both, resamples=10)
        assert found.copied_share.estimate == 1


def test_a_judge_that_truncates_gives_no_figure_of_whole_samples():
    options = {"tokenizer": DoubleLetters(), "resamples": 10}
    cut = GenerativePerplexity(bigram, Letters(), protocol="all", truncate=6)
    found = measure(random_ids(), cut, **options)
    assert found.nats_per_generated_token is None and found.bits_per_byte is None
    dropping = GenerativePerplexity(bigram, Letters(), protocol="all", drop_remainder=True)
    with pytest.raises(TokenDriftError, match="drop_remainder leaves samples out"):
        measure(random_ids(9), dropping, **options)


def test_a_set_does_not_differ_from_itself_and_differences_turn_round(judge):
    a, b = (measure(random_ids(seed=seed), judge, resamples=200) for seed in (0, 1))
    same = compare(a, a)
    assert same.gen_ppl_ratio == (1, 1, 1)
    assert all(value == (0, 0, 0) for value in same.differences.values())
    forth, back = compare(a, b), compare(b, a)
    assert forth.gen_ppl_ratio.low == pytest.approx(1 / back.gen_ppl_ratio.high, rel=1e-9)
    assert forth.differences["sample_entropy"].low == pytest.approx(-back.differences["sample_entropy"].high, abs=1e-12)
    paired = perplexity_ratio_interval(a.perplexity, b.perplexity, paired=True, resamples=200)
    assert forth.gen_ppl_ratio == pytest.approx(paired, rel=1e-12)
    assert forth.paired


class DoubleLetters(Letters):
    """A denoiser's tokenizer of which the judge knows nothing: even ids are written with two letters of the judge."""

    def decode_batch(self, rows, skip_special_tokens):
        texts = super().decode_batch(rows, skip_special_tokens)
        return ["".join(letter * (2 - ord(letter) % 2) for letter in text) for text in texts]


def test_sets_compare_in_bits_per_byte_unless_the_judge_has_the_tokens_of_the_denoiser(judge):
    ids = [random_ids(seed=seed, size=size) for seed, size in ((0, V), (1, 5))]
    foreign = [measure(each, judge, tokenizer=DoubleLetters(), resamples=100) for each in ids]
    found = compare(*foreign)
    expected = foreign[0].bits_per_byte.estimate / foreign[1].bits_per_byte.estimate
    assert found.headline == "bits_per_byte" and found.ratio == found.bits_per_byte_ratio != found.gen_ppl_ratio
    assert found.ratio.estimate == pytest.approx(expected, rel=1e-12) and found.ratio.low < expected < found.ratio.high
    assert compare(foreign[0], foreign[0]).ratio == (1, 1, 1)
    assert found.to_dict()["bits_per_byte_ratio"]["verdict"] == found.verdict("bits_per_byte")
    own = [measure(each, judge, tokenizer=judge.judge.tokenizer, resamples=100) for each in ids]
    assert compare(*own).headline == "gen_ppl" and compare(*own).ratio == compare(*own).gen_ppl_ratio
    assert measure(random_ids(), judge, resamples=10).headline == "gen_ppl"  # the judge read the ids as they came
    for pair, figure in ((foreign, "bits_per_byte"), (own, "gen_ppl")):
        low, high = sorted(pair, key=lambda m: m.figures[figure].estimate)
        found = [finding.figure for finding in check_samples(low, high).findings]
        assert [name for name in found if name in ("gen_ppl", "bits_per_byte")] == [figure]


def test_a_gen_ppl_too_large_for_floats_still_has_a_ratio():
    hopeless = GenerativePerplexity(lambda ids, mask: 2000 * bigram(ids), protocol="all")
    a, b = (measure(random_ids(seed=seed, size=2), hopeless, resamples=50) for seed in (0, 1))
    assert a.gen_ppl.estimate == math.inf and a.summary()["gen_ppl"]["estimate"] is None
    ratio = math.exp(a.perplexity.nll / a.perplexity.tokens - b.perplexity.nll / b.perplexity.tokens)
    assert compare(a, b).gen_ppl_ratio.estimate == pytest.approx(ratio, rel=1e-9)


def test_a_difference_is_claimed_only_beyond_its_interval(judge):
    usual, other, dull = (
        measure(random_ids(seed=s, size=z), judge, resamples=400) for s, z in ((0, V), (1, V), (2, 5))
    )
    assert compare(dull, usual).verdict("sample_entropy") == "lower"
    assert compare(usual, dull).verdict("sample_entropy") == "higher"
    assert compare(other, usual).verdict("sample_entropy") == "not distinguishable"
    plain = json.loads(json.dumps(compare(dull, usual).to_dict()))
    assert plain["sample_entropy"]["verdict"] == "lower" and plain["gen_ppl_ratio"]["verdict"] in {"lower", "higher"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"protocol": "sdtt"}, "protocol is 'all' for one and 'sdtt' for the other"),
        ({"judge": lambda ids, mask: bigram(ids).float()}, "precision is 'float64' for one and 'float32'"),
        ({"vocabulary": "judge", "tokenizer": Letters()}, "vocabulary is 'generated' for one and 'judge'"),
        ({"tokenizer": Letters()}, "retokenised is False for one and True"),
        ({"resamples": 20}, "resamples is 10 for one and 20"),
        ({"level": 0.9}, "level is 0.95 for one and 0.9"),
    ],
)
def test_sets_measured_differently_do_not_compare(judge, change, says):
    a = measure(random_ids(), judge, resamples=10)
    model, protocol = change.pop("judge", bigram), change.pop("protocol", "all")
    b = measure(random_ids(), GenerativePerplexity(model, Letters(), protocol=protocol), **{"resamples": 10, **change})
    with pytest.raises(TokenDriftError, match=says):
        compare(a, b)


def test_gaps_before_punctuation_are_closed_in_every_text_alike(gappy):
    texts = ["a .b .", "b .c ,d"]
    ids = [tokens.tolist() for tokens in id_sequences(texts, None, gappy.judge.tokenizer)[0]]
    closed = measure([cleaned(text) for text in texts], gappy, resamples=10)
    for samples in (texts, SampleSet(ids=ids), SampleSet(ids=ids, texts=texts)):
        found = measure(samples, gappy, tokenizer=gappy.judge.tokenizer, clean_up_spaces=True, resamples=10)
        assert found.clean_up_spaces is True and found.perplexity.nll == closed.perplexity.nll
    with pytest.raises(TokenDriftError, match="clean_up_spaces is True for one and False"):
        compare(found, measure(ids, gappy, tokenizer=gappy.judge.tokenizer, resamples=10))


def test_real_text_is_cleaned_before_it_is_cut(gappy):
    """Closing a gap takes a token: cut first, real text would be shorter than the samples."""
    texts = ["a .b .c .", "b .c ,d ."] * 5
    found = evaluate({"text": texts}, gappy, real=[text + text for text in texts], clean_up_spaces=True, resamples=10)
    assert found["text"].real.length.estimate == found["text"].measures.length.estimate == 6


def test_the_distance_to_real_text_is_that_of_the_texts_that_the_judge_reads(gappy):
    texts = ["a .b .c .", "b .c ,d ."] * 5
    closed = evaluate({"text": texts}, gappy, real=texts, clean_up_spaces=True, resamples=10)
    texts = [cleaned(text) for text in texts]
    again = evaluate({"text": texts}, gappy, real=texts, resamples=10)
    assert closed["text"].measures.energy_distance == again["text"].measures.energy_distance


@pytest.fixture
def gappy():
    """Judge texts of the tokens a to d, blank, point and comma."""
    letters = "abcd .,"

    class Gappy(Letters):
        def decode_batch(self, rows, skip_special_tokens):
            return ["".join(letters[token] for token in row) for row in rows]

        def encode_batch(self, texts, add_special_tokens):
            rows = [[letters.index(letter) for letter in text] for text in texts]
            return [type("Encoding", (), {"ids": row, "attention_mask": [1] * len(row)}) for row in rows]

    return GenerativePerplexity(bigram, Gappy(), protocol="all")


# ------------------------------------------------------------------------------------------------ evaluation


def test_real_text_is_cut_to_the_samples(judge):
    short, long = random_ids(10, 8), random_ids(30, 16, seed=1)
    found = evaluate({"short": short, "long": long}, judge, real=random_ids(64, 24, seed=2), resamples=50)
    sizes = {row.name: (row.real.samples, row.real.length.estimate) for row in found.rows}
    assert sizes == {"short": (10, 8), "long": (30, 16)}
    assert found["short"].measures.samples == 10
    with pytest.raises(KeyError):
        found["other"]


def test_the_samples_of_real_text_are_spread_over_it_among_those_that_are_long_enough(judge):
    real = [[i] * 5 for i in range(10)] + [[i] * 20 for i in range(10)]
    cut = cut_to_lengths(SampleSet(ids=real), (16,) * 4, None, "generated", as_text=False)
    assert [len(ids) for ids in cut.ids] == [16] * 4
    tokens = sorted(ids[0] for ids in cut.ids)
    assert tokens[0] == 0 and tokens[-1] >= 6 and len(set(tokens)) == 4


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), lengths=st.lists(st.integers(1, 9), max_size=30))
def test_no_sequence_stands_for_two_and_as_many_as_can_are_long_enough(sizes, lengths):
    lengths = sorted(lengths, reverse=True)
    chosen = spread(sizes, lengths)
    assert len(chosen) == len(set(chosen)) == min(len(sizes), len(lengths))
    best = sorted(sizes, reverse=True)[: len(lengths)]  # the longest of all for the longest wanted
    if all(size >= length for size, length in zip(best, lengths, strict=False)):
        assert all(sizes[i] >= length for i, length in zip(chosen, lengths, strict=False))


def test_real_text_is_read_as_the_set_beside_it_was(judge):
    """One set came as ids and one with texts: lengths alone do not say how their real text is to be read."""
    ids = random_ids(12, 8).tolist()
    both = SampleSet(ids=ids, texts=Letters().decode_batch(ids, skip_special_tokens=False))
    found = evaluate({"ids": ids, "file": both}, judge, real=both, resamples=10)
    assert [(row.measures.retokenised, row.real.retokenised) for row in found.rows] == [(False, False), (True, True)]


def test_samples_that_are_left_out_are_left_out_of_the_distances_too(judge):
    texts = Letters().decode_batch(random_ids(30, 8).tolist(), skip_special_tokens=False)
    options = {"real": texts[12:], "skip_bad": True, "resamples": 10}
    whole, gaps = (evaluate({"set": some}, judge, **options)["set"] for some in (texts[:12], [*texts[:12], "", "a"]))
    assert gaps.measures.skipped == 2 and gaps.measures.kept == tuple(range(12))
    assert gaps.measures.energy_distance == whole.measures.energy_distance


def test_real_ids_beside_texts_are_decoded_by_the_tokenizer_of_the_denoiser(judge):
    ids, tokenizer = random_ids(30, 8).tolist(), DoubleLetters()
    texts = tokenizer.decode_batch(ids, skip_special_tokens=False)
    options = {"tokenizer": tokenizer, "resamples": 10}
    by_ids, by_text = (evaluate({"set": texts[:9]}, judge, real=x[9:], **options)["set"].real for x in (ids, texts))
    assert by_ids.gen_ppl == by_text.gen_ppl and by_ids.length == by_text.length


def test_no_gen_ppl_is_printed_without_what_belongs_to_it(judge):
    ids = SampleSet(ids=random_ids(30, 16).tolist(), nfe=4)
    found = evaluate({"model": ids}, judge, real=random_ids(40, 16, seed=1), resamples=50)
    text = str(found)
    heading, real, model, caption, *_ = text.splitlines()
    for label in ("NFE", "n", "Gen.-PPL", "H sample", "H unigram"):
        assert label in heading
    assert real.startswith("real text") and model.split()[:3] == ["model", "4", "30"]
    assert f"{found['model'].measures.gen_ppl.estimate:.1f}" in model
    assert "float64" in caption and "protocol all" in caption
    plain = json.loads(json.dumps(found.to_dict()))
    assert {"gen_ppl", "sample_entropy", "nfe", "samples", "precision", "real_text", "guard"} <= set(plain["rows"][0])


def test_figures_are_counted_in_one_vocabulary_for_all(judge):
    ids = random_ids(30, 16)
    texts = Letters().decode_batch(random_ids(40, 16, seed=1).tolist(), skip_special_tokens=False)
    in_judge = evaluate({"ids": SampleSet(ids=ids.tolist(), texts=texts[:30])}, judge, real=texts, resamples=20)
    assert in_judge["ids"].measures.vocabulary == in_judge["ids"].real.vocabulary == "judge"
    own = evaluate({"ids": ids}, judge, real=texts, tokenizer=Letters(), resamples=20)
    assert own["ids"].measures.vocabulary == own["ids"].real.vocabulary == "generated"
    assert own["ids"].real.retokenised


def test_ragged_samples_are_judged_beside_real_text_of_their_lengths(judge):
    rows = [row[: 6 + i % 10] for i, row in enumerate(random_ids(40, 16).tolist())]
    found = evaluate({"ragged": rows}, judge, real=random_ids(60, 16, seed=1), resamples=20)["ragged"]
    assert sorted(found.real.per_sample["length"].tolist()) == sorted(map(len, rows))


def test_an_evaluation_of_nothing_is_refused(judge):
    with pytest.raises(TokenDriftError, match="evaluate needs at least one set"):
        evaluate({}, judge, real=random_ids())
    with pytest.raises(TokenDriftError, match=r"samples is empty"):
        evaluate({"none": []}, judge, real=random_ids())


# ------------------------------------------------------------------------------------------------ NELBO


def test_the_nelbo_of_a_denoiser_that_knows_only_the_uniform_law_is_log_v():
    process = MaskedDiffusion(V + 1)
    denoiser = lambda x_t, sigma: torch.zeros(*x_t.shape, V + 1)  # noqa: E731
    ids = random_ids(64, 24)
    values = sequence_nelbo(denoiser, process, ids, batch_size=64)
    found = nelbo_interval(denoiser, process, ids, batch_size=64)
    # 1/t weights: the mean over 64 stratified times of a ratio of mean 1.
    assert found.low < math.log(V) < found.high
    assert found.estimate == pytest.approx(values.mean().item(), abs=1e-12)
    assert torch.equal(values, sequence_nelbo(denoiser, process, ids, batch_size=64))


@pytest.mark.parametrize("process", [MaskedDiffusion(V + 1), UniformDiffusion(V + 1)])
def test_the_nelbo_holds_few_logits_at_once_and_its_noise_does_not_depend_on_how_few(process, monkeypatch):
    shapes = []

    def denoiser(x_t, sigma):
        shapes.append(tuple(x_t.shape))
        return torch.randn(V + 1, V + 1, generator=torch.Generator().manual_seed(0))[x_t]

    whole = sequence_nelbo(denoiser, process, random_ids(10, 24))
    monkeypatch.setattr(nelbo, "LOGITS", 3 * 24 * (V + 1))
    torch.testing.assert_close(sequence_nelbo(denoiser, process, random_ids(10, 24)), whole)
    assert shapes == [(10, 24), (3, 24), (3, 24), (3, 24), (1, 24)]


def test_measures_are_frozen(judge):
    with pytest.raises(dataclasses.FrozenInstanceError):
        measure(random_ids(), judge, resamples=10).nfe = 1
