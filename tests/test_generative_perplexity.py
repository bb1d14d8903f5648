"""Gen.-PPL: parity with the official evaluators, and what a likelihood must not depend on."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import TokenDriftError
from tokendrift.evaluation import GenerativePerplexity, SampleSet, generative_perplexity
from tokendrift.evaluation.judge import Judge, token_nll
from tokendrift.evaluation.protocols import log_perplexity, plan_windows, scored_targets
from tokendrift.evaluation.samples import cleaned
from tokendrift.models.tokenizer import decode

CASES = ("plain", "padded", "chunked")
V = 20
EXACT = {"rtol": 0.0, "atol": 0.0}
WIDTHS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
EVERY_CASE = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def numbers(golden):
    return golden("gen_ppl")


@pytest.fixture
def tiny_gpt2(numbers):
    """Build the fixture's GPT-2 in a dtype."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        **numbers.params["gpt2_config"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=0, bos_token_id=0
    )
    weights = {k.removeprefix("weights."): v for k, v in numbers.data.items() if k.startswith("weights.")}

    def build(dtype=torch.float64):
        model = transformers.GPT2LMHeadModel(config)
        model.load_state_dict(weights)
        return model.to(dtype).eval()

    return build


def bigram(ids, attention_mask=None):
    """Judge by the last token only: logits (B, L, V) of fixed random rows."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return table[ids]


def texts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (length,), generator=generator) for length in lengths]


def options_of(numbers, case, **more):
    params = numbers.params["cases"][case]
    return {"batch_size": params["batch_size"], "max_length": params["context"], "eos_id": 0} | more


def granted(numbers, dtype):
    return numbers.tolerance if dtype == torch.float64 else numbers.tolerance["float32"]


def assert_total(numbers, result, key, dtype):
    """Total NLL and Gen.-PPL within tolerance, the count exact."""
    suffix = "_all" if key.endswith("_all") else ""
    stem = key.removesuffix("_all")
    tolerance = granted(numbers, dtype)
    as_tensor = lambda value: torch.tensor([value], dtype=torch.float64)  # noqa: E731
    assert result.tokens == numbers[f"{stem}.token_count{suffix}"].item()
    numbers.assert_matches(as_tensor(result.nll), f"{stem}.total_nll{suffix}", tolerance=tolerance)
    numbers.assert_matches(as_tensor(result.perplexity), f"{stem}.gen_ppl{suffix}", tolerance=tolerance)


def table_of_nll(judge, ids, mask, windows):
    """NLL of every target (n, L), windows read one at a time."""
    table = torch.zeros(ids.shape, dtype=torch.float64)
    with torch.no_grad():
        for start, end, first in windows:
            part = ids[:, start:end]
            nll = token_nll(judge.logits(part, mask[:, start:end]), part)
            table[:, first:end] = nll[:, first - start :]
    return table


# ------------------------------------------------------------------------------------------------ parity


@WIDTHS
@EVERY_CASE
@pytest.mark.parametrize("drop", [True, False])
def test_mdlm_agrees_with_the_official_code(numbers, tiny_gpt2, case, dtype, drop):
    metric = GenerativePerplexity(tiny_gpt2(dtype), **options_of(numbers, case, drop_remainder=drop, pad_eos=True))
    metric.update(numbers[f"{case}.ids"], attention_mask=numbers[f"{case}.attention_mask"])
    result = metric.compute()
    assert_total(numbers, result, f"{case}.mdlm" + ("" if drop else "_all"), dtype)
    rows = numbers.params["cases"][case]["rows_scored_when_remainder_dropped"]
    assert result.samples == (rows if drop else len(numbers[f"{case}.ids"]))
    assert result.precision == str(dtype).removeprefix("torch.")


@EVERY_CASE
def test_mdlm_agrees_with_the_float32_value_that_upstream_prints(numbers, tiny_gpt2, case):
    result = generative_perplexity(
        numbers[f"{case}.ids"],
        tiny_gpt2(torch.float32),
        attention_mask=numbers[f"{case}.attention_mask"],
        **options_of(numbers, case, drop_remainder=True, pad_eos=True),
    )
    numbers.assert_matches(
        torch.tensor([result.perplexity]), f"{case}.mdlm.gen_ppl_float32", tolerance=granted(numbers, torch.float32)
    )


@WIDTHS
@EVERY_CASE
def test_bd3_agrees_with_the_official_code(numbers, tiny_gpt2, case, dtype):
    stride = numbers.params["cases"][case]["bd3_stride"]
    options = options_of(numbers, case, protocol="bd3", drop_remainder=True)
    if stride < options["max_length"]:  # 512 in the plain case: one window, whatever the stride
        options["stride"] = stride
    result = generative_perplexity(
        numbers[f"{case}.ids"], tiny_gpt2(dtype), attention_mask=numbers[f"{case}.attention_mask"], **options
    )
    assert_total(numbers, result, f"{case}.bd3", dtype)


@WIDTHS
@EVERY_CASE
@pytest.mark.parametrize(("protocol", "drop"), [("sedd", True), ("sdtt", False)])
def test_sedd_and_sdtt_agree_with_the_official_code(numbers, tiny_gpt2, case, protocol, drop, dtype):
    options = options_of(numbers, case, protocol=protocol, drop_remainder=drop, max_length=64)
    result = generative_perplexity(numbers[f"{case}.ids"], tiny_gpt2(dtype), **options)
    numbers.assert_matches(
        torch.tensor([result.perplexity], dtype=torch.float64),
        f"{case}.{protocol}.gen_ppl",
        tolerance=granted(numbers, dtype),
    )


@WIDTHS
@EVERY_CASE
def test_the_nll_of_every_target_agrees(numbers, tiny_gpt2, case, dtype):
    params, tolerance = numbers.params["cases"][case], granted(numbers, dtype)
    ids, mask = numbers[f"{case}.ids"], numbers[f"{case}.attention_mask"]
    judge, length = Judge(tiny_gpt2(dtype)), ids.shape[1]
    chunks = plan_windows(length, params["context"])
    numbers.assert_matches(table_of_nll(judge, ids, mask, chunks), f"{case}.nll", tolerance=tolerance)
    sliding = plan_windows(length, params["context"], min(params["bd3_stride"], params["context"] - 1))
    numbers.assert_matches(table_of_nll(judge, ids, mask, sliding), f"{case}.nll_bd3", tolerance=tolerance)
    whole = plan_windows(length, 64)
    everything = torch.ones_like(mask)
    numbers.assert_matches(table_of_nll(judge, ids, everything, whole), f"{case}.nll_full", tolerance=tolerance)


@EVERY_CASE
def test_the_counted_targets_are_the_official_ones(numbers, case):
    params, ids = numbers.params["cases"][case], numbers[f"{case}.ids"]
    chunks = [scored_targets(ids[:, w.start : w.end], "mdlm", 0) for w in plan_windows(ids.shape[1], params["context"])]
    numbers.assert_matches(torch.cat(chunks, dim=1).to(torch.uint8), f"{case}.mask_mdlm", tolerance=EXACT)
    numbers.assert_matches(scored_targets(ids, "bd3", 0).to(torch.uint8), f"{case}.mask_bd3", tolerance=EXACT)


# ------------------------------------------------------------------------------------------------ what must not matter


@pytest.mark.parametrize("protocol", ["mdlm", "bd3", "all", "sedd", "sdtt"])
def test_batch_size_and_order_do_not_matter(tiny_gpt2, protocol):
    samples = texts_of([2, 9, 31, 17, 30, 3, 31, 24])
    options = {"protocol": protocol, "max_length": 31 if protocol in {"sedd", "sdtt"} else 12, "eos_id": 0}
    model = tiny_gpt2()
    one = generative_perplexity(samples, model, batch_size=1, **options)
    eight = generative_perplexity(samples, model, batch_size=8, **options)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()
    other = generative_perplexity([samples[i] for i in shuffled], model, batch_size=3, **options)
    # Padding changes the order of float64 sums inside the judge, nothing else.
    torch.testing.assert_close(one.sample_nll, eight.sample_nll, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.sample_nll[shuffled], other.sample_nll, rtol=1e-12, atol=1e-12)
    assert torch.equal(one.sample_tokens, eight.sample_tokens)
    assert math.isclose(one.perplexity, other.perplexity, rel_tol=1e-12)


@pytest.mark.parametrize("protocol", ["mdlm", "all"])
def test_padding_side_and_length_do_not_matter(tiny_gpt2, protocol):
    samples, model = texts_of([5, 12, 9]), tiny_gpt2()
    bare = generative_perplexity(samples, model, protocol=protocol)
    for width, left in [(12, False), (12, True), (20, False), (20, True)]:
        ids = torch.zeros(3, width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, sample in enumerate(samples):
            place = slice(width - len(sample), width) if left else slice(0, len(sample))
            ids[i, place], mask[i, place] = sample, 1
        padded = generative_perplexity(ids, model, protocol=protocol, attention_mask=mask)
        torch.testing.assert_close(padded.sample_nll, bare.sample_nll, rtol=1e-12, atol=1e-12)
        assert padded.tokens == bare.tokens


def test_updates_add_up_to_one_call(tiny_gpt2):
    samples, model = texts_of([7, 15, 4, 9, 11]), tiny_gpt2()
    metric = GenerativePerplexity(model, batch_size=2)
    for part in (samples[:2], samples[2:]):
        metric.update(part)
    whole = generative_perplexity(samples, model, batch_size=2)
    assert math.isclose(metric.compute().perplexity, whole.perplexity, rel_tol=1e-12)
    assert metric.compute().samples == 5
    metric.reset()
    with pytest.raises(TokenDriftError, match="Call update"):
        metric.compute()


def test_no_remainder_is_dropped():
    assert generative_perplexity(texts_of([4] * 7), bigram, protocol="all", batch_size=4).samples == 7


def test_scoring_leaves_the_accumulated_state_alone():
    metric = GenerativePerplexity(bigram, protocol="all")
    metric.update(texts_of([4, 5]))
    before = metric.compute().perplexity
    metric.score(texts_of([9], seed=1))
    assert metric.compute().perplexity == before


def test_a_batch_of_end_of_text_tokens_alone_counts_beside_others():
    whole, parts = (GenerativePerplexity(bigram, protocol="mdlm", eos_id=0) for _ in range(2))
    whole.update([[0, 0, 0], [1, 2, 3]])
    parts.update([[0, 0, 0]])
    with pytest.raises(TokenDriftError, match="counts no token of these 1 samples"):
        parts.compute()
    parts.update([[1, 2, 3]])
    assert parts.compute().perplexity == whole.compute().perplexity


def test_every_sample_pools_to_the_total():
    result = generative_perplexity(texts_of([3, 40, 8]), bigram, protocol="all", max_length=16)
    assert math.isclose(result.nll, result.sample_nll.sum().item(), rel_tol=1e-15)
    assert result.tokens == result.sample_tokens.sum().item()
    assert math.isclose(result.perplexity, math.exp(result.nll / result.tokens), rel_tol=1e-12)


# ------------------------------------------------------------------------------------------------ windows and targets


@given(length=st.integers(2, 60), window=st.integers(2, 20), data=st.data())
def test_sliding_windows_score_every_token_but_the_first_once_and_with_context(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    windows = plan_windows(length, window, stride)
    targets = [position for w in windows for position in range(w.first, w.end)]
    assert targets == list(range(1, length))
    assert all(w.first > w.start and w.end - w.start <= window for w in windows)


@given(length=st.integers(2, 60), window=st.integers(2, 20))
def test_chunks_score_every_token_but_the_first_of_each(length, window):
    windows = plan_windows(length, window)
    targets = [position for w in windows for position in range(w.first, w.end)]
    assert targets == [position for position in range(length) if position % window]


def test_a_long_sample_keeps_its_context_under_all_and_every_token_counts(tiny_gpt2):
    sample = texts_of([50])
    result = generative_perplexity(sample, tiny_gpt2(), protocol="all", max_length=20)
    assert result.tokens == 49
    # A judge with one token of memory sees no difference between windows and the whole.
    windowed = generative_perplexity(sample, bigram, protocol="all", max_length=20)
    assert math.isclose(windowed.nll, generative_perplexity(sample, bigram, protocol="all").nll, rel_tol=1e-12)


def test_mdlm_counts_no_eos_after_the_first_and_none_after_a_leading_one():
    rows = torch.tensor([[1, 0, 2, 0, 0], [0, 1, 0, 2, 0], [1, 2, 3, 4, 5]])
    counted = scored_targets(rows, "mdlm", 0).int().tolist()
    assert counted == [[0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 1]]


def test_only_parity_mode_charges_a_sample_for_not_ending():
    samples = [[1, 2, 3], [4, 5, 6, 7, 8]]
    fair = generative_perplexity(samples, bigram, eos_id=0)
    upstream = generative_perplexity(samples, bigram, eos_id=0, pad_eos=True)
    assert fair.sample_tokens.tolist() == [2, 4]
    assert upstream.sample_tokens.tolist() == [3, 4]
    # The end of text that is added for the judge was not generated.
    assert fair.sample_generated.tolist() == upstream.sample_generated.tolist() == [3, 5]


def test_truncate_scores_the_first_tokens_only():
    long = texts_of([30, 6])
    cut = generative_perplexity(long, bigram, protocol="all", truncate=10)
    by_hand = generative_perplexity([long[0][:10], long[1]], bigram, protocol="all")
    assert torch.equal(cut.sample_nll, by_hand.sample_nll)


def test_protocols_average_differently_over_the_same_samples():
    nll, tokens = torch.tensor([6.0, 2.0]), torch.tensor([2, 1])
    assert log_perplexity(nll, tokens, "all").item() == pytest.approx(8 / 3)
    assert log_perplexity(nll, tokens, "sdtt").item() == pytest.approx(2.5)
    assert log_perplexity(nll, tokens, "sedd").exp().item() == pytest.approx((math.exp(3) + math.exp(2)) / 2)


# ------------------------------------------------------------------------------------------------ judges and texts


def test_a_callable_judge_scores_by_hand():
    log_p = bigram(torch.arange(V)).log_softmax(dim=-1)
    sample = [3, 7, 7, 1]
    expected = -sum(log_p[a, b].item() for a, b in itertools.pairwise(sample))
    result = generative_perplexity([sample], bigram, protocol="all")
    assert math.isclose(result.nll, expected, rel_tol=1e-12)
    assert result.precision == "float64"


def test_a_judge_is_shown_what_is_padding():
    seen = []
    judge = lambda ids, mask: seen.append(mask.tolist()) or bigram(ids)  # noqa: E731
    generative_perplexity([[1, 2, 3, 4], [5, 6]], judge, protocol="all")
    assert seen == [[[1, 1, 1, 1], [1, 1, 0, 0]]]


def test_a_certain_judge_gives_one_and_a_uniform_one_gives_v():
    samples = texts_of([9, 9])
    assert generative_perplexity(samples, lambda ids, _: torch.zeros(*ids.shape, V), protocol="all").perplexity == (
        pytest.approx(V, rel=1e-6)
    )
    certain = lambda ids, _: 1e4 * torch.nn.functional.one_hot(ids.roll(-1, 1), V).float()  # noqa: E731
    assert generative_perplexity(samples, certain, protocol="all").perplexity == 1.0


def test_a_token_far_behind_costs_its_nats_instead_of_infinity():
    # softmax then log underflows beyond 104 nats in float32.
    far = lambda ids, _: torch.nn.functional.one_hot(torch.zeros_like(ids), V).float() * 500  # noqa: E731
    assert generative_perplexity([[1, 2, 3]], far, protocol="all").nll == 1000.0


def test_bfloat16_judges_are_named_and_summed_in_float64(tiny_gpt2):
    result = generative_perplexity(texts_of([9, 12]), tiny_gpt2(torch.bfloat16))
    assert result.precision == "bfloat16"
    assert result.sample_nll.dtype == torch.float64


def test_dropout_is_off_while_scoring_and_back_afterwards():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_layer=1, n_embd=8, n_head=1, n_positions=16, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).train()
    model.transformer.h.eval()
    metric = GenerativePerplexity(model)
    first, second = metric.score(texts_of([16])), metric.score(texts_of([16]))
    assert first.nll == second.nll
    assert model.training
    assert not model.transformer.h.training


def test_what_a_model_caches_while_it_is_scored_serves_its_training_too():
    class Caching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.cache = torch.nn.Parameter(torch.zeros(V, V)), None

        def forward(self, ids, mask=None):
            self.cache = torch.ones(V) if self.cache is None else self.cache
            return self.weight[ids] * self.cache

    model = Caching()
    generative_perplexity(texts_of([9]), model, protocol="all")
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.weight.grad.sum() == 2 * V


def test_a_call_reads_as_many_tokens_whatever_the_length_and_progress_counts_its_windows():
    seen, shapes = [], []
    judge = lambda ids, mask: shapes.append(tuple(ids.shape)) or bigram(ids)  # noqa: E731
    samples = texts_of([16] * 3 + [4] * 9)
    generative_perplexity(samples, judge, protocol="all", max_length=16, batch_size=2, progress=seen.append)
    assert seen == [2, 2, 8]
    assert shapes == [(2, 16), (2, 16), (8, 4)]  # the third long one takes a short one with it


def test_a_judge_by_name_is_recorded_with_its_precision_and_revision(tiny_gpt2, tmp_path):
    tiny_gpt2(torch.float32).save_pretrained(tmp_path)
    exact = generative_perplexity(texts_of([9]), tmp_path, word_tokenizer())
    rough = generative_perplexity(texts_of([9]), str(tmp_path), word_tokenizer(), precision="bfloat16", revision="main")
    assert (exact.judge, exact.precision, exact.revision) == (str(tmp_path), "float32", None)
    assert (rough.precision, rough.revision) == ("bfloat16", None)  # a folder has no branches
    # Eight bits of mantissa: logits of size 1 are off by up to 1/256, and so is a mean of NLL.
    assert math.isclose(math.log(rough.perplexity), math.log(exact.perplexity), abs_tol=0.02)
    assert json.loads(json.dumps(exact.to_dict()))["sample_nll"] == exact.sample_nll.tolist()


@pytest.mark.parametrize("interface", ["older", "new"])
def test_tf32_is_recorded_whichever_interface_allowed_it(interface):
    """A CPU runs none: logits that say they are on CUDA stand for those of a GPU."""
    matmul, judge = torch.backends.cuda.matmul, Judge(bigram)
    logits = SimpleNamespace(dtype=torch.float32, is_cuda=True)
    if interface == "new" and not hasattr(matmul, "fp32_precision"):
        pytest.skip("before torch 2.9")
    assert judge.precision(logits) == "float32"
    try:
        if interface == "new":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert judge.precision(logits) == "tf32"
        assert judge.precision(SimpleNamespace(dtype=torch.float32, is_cuda=False)) == "float32"
    finally:
        torch.set_float32_matmul_precision("highest")
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "none"


def test_weights_come_from_safetensors_alone(tiny_gpt2, tmp_path):
    tiny_gpt2(torch.float32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TokenDriftError, match="could not be loaded"):
        generative_perplexity(texts_of([9]), tmp_path, word_tokenizer())


def test_sample_sets_are_read_by_their_text_if_they_have_it():
    by_text = generative_perplexity(
        SampleSet(ids=[[9, 9, 9]], texts=["a b c"]), bigram, word_tokenizer(), protocol="all"
    )
    by_ids = generative_perplexity(SampleSet(ids=[[1, 2, 3]]), bigram, protocol="all")
    assert by_text.nll == by_ids.nll


@pytest.mark.parametrize("clean_up_spaces", [True, False])
def test_decoding_is_the_same_for_both_kinds_of_tokenizer_and_keeps_special_tokens(clean_up_spaces):
    transformers, tokenizer = pytest.importorskip("transformers"), word_tokenizer()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    own, theirs = (decode(t, [[1, 2, 0], [3]]) for t in (tokenizer, wrapped))
    if clean_up_spaces:
        own, theirs = list(map(cleaned, own)), list(map(cleaned, theirs))
    assert own == theirs == ["a b <|endoftext|>", "c"]


def test_clean_up_closes_the_gaps_that_transformers_closed():
    transformers = pytest.importorskip("transformers")
    text = "Is n't it ? I 'm , you 've : ' we 're ' . It 's so !"
    rule = transformers.PreTrainedTokenizerBase.clean_up_tokenization
    try:
        expected = rule(text)
    except TypeError:  # a method since transformers 5
        expected = rule(None, text)
    assert cleaned(text) == expected != text


def word_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<|endoftext|>": 0} | {chr(ord("a") + i): i + 1 for i in range(V - 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def test_texts_score_as_their_ids_for_both_kinds_of_tokenizer():
    transformers, tokenizer = pytest.importorskip("transformers"), word_tokenizer()
    texts = ["a b c <|endoftext|> d", "e f", "b b b"]
    ids = generative_perplexity([[1, 2, 3, 0, 4], [5, 6], [2, 2, 2]], bigram, eos_id=0)
    own = generative_perplexity(texts, bigram, tokenizer, eos_id=0)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    theirs = generative_perplexity(texts, bigram, wrapped)  # the tokenizer names the EOS
    assert torch.equal(own.sample_nll, ids.sample_nll)
    assert torch.equal(theirs.sample_nll, ids.sample_nll)


def test_a_padding_tokenizer_does_not_change_the_score():
    tokenizer = word_tokenizer()
    bare = generative_perplexity(["a b c", "e f"], bigram, tokenizer, protocol="all")
    tokenizer.enable_padding(pad_id=0, pad_token="<|endoftext|>")
    assert generative_perplexity(["a b c", "e f"], bigram, tokenizer, protocol="all").tokens == bare.tokens


def test_a_judge_loads_from_a_folder(tiny_gpt2, tmp_path):
    tiny_gpt2(torch.float32).save_pretrained(tmp_path)
    by_folder = generative_perplexity(texts_of([9]), str(tmp_path), word_tokenizer())
    assert by_folder.perplexity == generative_perplexity(texts_of([9]), tiny_gpt2(torch.float32)).perplexity


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ([], "samples is empty: there is nothing to score"),
        ("one text", "samples must be a list of texts"),
        (["a b"], "texts need a tokenizer"),
        ([[1, 2], [3]], "sample 1 has 1 token; the judge predicts each token from"),
        ([[1, 2], []], "sample 1 has 0 tokens; "),
        ([[-100, 2]], "ids from -100 to 2, but ids are not negative"),
        (torch.rand(2, 3), "samples must hold integer token ids"),
        (torch.tensor([1, 2]), r"samples must have shape \(n, L\)"),
        ([[[1, 2]]], r"sample 0 must be one sequence of ids, \(L,\)"),
        (["a", [1, 2]], "all texts or all ids"),
        ([[0, 0], [0, 0]], "counts no token"),
    ],
)
def test_samples_that_cannot_be_scored_are_named(samples, says):
    with pytest.raises(TokenDriftError, match=says):
        generative_perplexity(samples, bigram, eos_id=0)


def test_ids_outside_the_judges_vocabulary_are_named(tiny_gpt2):
    says = r"ids from 1 to 20, but the judge's vocabulary V has 20 entries \(0 to 19\)"
    with pytest.raises(TokenDriftError, match=says):  # known from the configuration, before any forward call
        generative_perplexity([[1, 20]], tiny_gpt2())
    with pytest.raises(TokenDriftError, match=says):  # seen only in the logits
        generative_perplexity([[1, 20]], lambda ids, _: bigram(ids.clamp(max=V - 1)), protocol="all")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"protocol": "ppl"}, "protocol must be one of 'mdlm', 'sedd', 'sdtt', 'bd3', 'all'"),
        ({}, "Pass eos_id, or protocol='all'"),
        ({"protocol": "all", "precision": "float32"}, "precision and revision apply to a judge that is loaded by name"),
        ({"protocol": "all", "device": "gpu"}, "device 'gpu' cannot be used"),
        ({"protocol": "all", "batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"protocol": "all", "max_length": 1}, "max_length must be an integer of at least 2"),
        ({"protocol": "all", "max_length": 8, "stride": 8}, "stride must be below max_length = 8"),
        ({"protocol": "mdlm", "eos_id": 0, "stride": 4}, "stride is for the protocols bd3, all, not for 'mdlm'"),
    ],
)
def test_options_out_of_range_are_named(options, says):
    with pytest.raises(TokenDriftError, match=says):
        GenerativePerplexity(bigram, **options)


def test_too_long_samples_are_refused_where_a_sample_is_scored_whole():
    with pytest.raises(TokenDriftError, match="scores each sample as a whole"):
        generative_perplexity(texts_of([9]), bigram, protocol="sdtt", max_length=8)


def test_a_window_beyond_the_judge_is_refused(tiny_gpt2):
    with pytest.raises(TokenDriftError, match="max_length is 65, but the judge has 64 positions"):
        GenerativePerplexity(tiny_gpt2(), max_length=65)


def test_an_end_of_text_outside_the_vocabulary_is_refused(tiny_gpt2):
    with pytest.raises(TokenDriftError, match="eos_id is 50256, which is not in the judge's vocabulary of V = 20"):
        GenerativePerplexity(tiny_gpt2(), eos_id=50256)


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        (3, "judge must be a causal LM, a callable"),
        (lambda ids, mask: torch.zeros(1, 1, V), r"must return logits \(B, L, V\) with \(B, L\) = \(1, 3\)"),
        (lambda ids, mask: torch.full((*ids.shape, V), math.nan), "the logits of the judge are NaN"),
        ("no/such-folder-anywhere", "judge 'no/such-folder-anywhere' could not be loaded"),
    ],
)
def test_a_judge_that_cannot_score_is_named(judge, says, monkeypatch):
    if isinstance(judge, str):
        pytest.importorskip("transformers")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TokenDriftError, match=says):
        generative_perplexity([[1, 2, 3]], judge, protocol="all")


def test_a_cutting_tokenizer_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.enable_truncation(2)
    with pytest.raises(TokenDriftError, match="the tokenizer truncates"):
        generative_perplexity(["a b c"], bigram, tokenizer, protocol="all")


def test_a_mask_belongs_to_a_rectangle_of_ids():
    with pytest.raises(TokenDriftError, match=r"attention_mask belongs to ids \(n, L\)"):
        generative_perplexity([[1, 2]], bigram, protocol="all", attention_mask=torch.ones(1, 2))
