"""Several judges on the same samples, judges in GGUF files, and judges with large vocabularies or a start token."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from tokendrift import TokenDriftError
from tokendrift.demo import PRETRAINED
from tokendrift.evaluation import (
    GenerativePerplexity,
    compare_panels,
    evaluate,
    gguf_judge,
    judge_features,
    measure,
)
from tokendrift.evaluation import judge as judge_module
from tokendrift.evaluation.judge import Judge, load_judge
from tokendrift.evaluation.panel import PanelComparison
from tokendrift.evaluation.report.cards import judge_notes

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
SIZES = {
    "GPT2": {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "other": {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))


def judge_of(tokenizer, slope):
    """Return a judge that finds low ids the likelier the steeper the slope."""
    logits = -torch.arange(1024) / 1024 * slope
    found = GenerativePerplexity(lambda ids, mask: logits.expand(*ids.shape, 1024), tokenizer, protocol="all")
    found.judge.name = f"slope {slope}"
    return found


def ids_between(low, high, seed):
    return torch.randint(low, high, (40, 12), generator=torch.Generator().manual_seed(seed)).tolist()


def test_every_judge_has_its_figures_beside_the_first_and_nothing_else_changes(tokenizer):
    judges = [judge_of(tokenizer, slope) for slope in (1.0, 3.0)]
    alone = [measure(ids_between(300, 900, 0), one, tokenizer=tokenizer, resamples=50) for one in judges]
    both = measure(ids_between(300, 900, 0), judges[0], tokenizer=tokenizer, resamples=50, panel=judges[1:])
    assert both.figures == alone[0].figures
    (second,) = both.panel
    assert set(second.figures) == {"gen_ppl", "bits_per_byte", "nats_per_generated_token"}
    assert all(second.figures[name] == alone[1].figures[name] for name in second.figures)
    (plain,) = json.loads(json.dumps(both.summary()))["panel"]
    assert plain["judge"] == "slope 3.0"
    assert plain["bits_per_byte"]["estimate"] == alone[1].bits_per_byte.estimate
    with pytest.raises(TokenDriftError, match="panel is"):
        compare_panels(both, alone[0])
    with pytest.raises(TokenDriftError, match="several judges read texts"):
        measure(ids_between(300, 900, 0), judges[0], panel=judges[1:])


def test_a_sample_is_left_out_of_every_judge_if_one_cannot_score_it(tokenizer):
    long, short = judge_of(tokenizer, 1.0), judge_of(word_tokenizer(), 1.0)
    texts = ["some words of text", "more words", "internationalisation"]  # the last is one word
    found = measure(texts, long, panel=[short], skip_bad=True, resamples=10)
    assert (found.skipped, found.samples, found.panel[0].samples) == (1, 2, 2)
    assert len(found.panel[0].perplexity.sample_nll) == 2


def word_tokenizer():
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return found


def test_judges_agree_or_do_not_and_a_gain_seen_by_one_alone_is_named(tokenizer):
    judges = [judge_of(tokenizer, slope) for slope in (20.0, 40.0, -20.0)]
    sets = {"low": ids_between(300, 500, 0), "high": ids_between(700, 900, 1)}
    options = {"real": ids_between(300, 900, 2), "tokenizer": tokenizer, "resamples": 200}
    found = evaluate(sets, judges[0], panel=judges[1:2], **options)
    low, high = (found[name].measures for name in sets)
    agreeing = compare_panels(low, high)
    assert agreeing.alone is None
    assert agreeing.ratios[0] == found.compare("low", "high").bits_per_byte_ratio
    text = agreeing.agreement("low", "high")
    assert text.startswith("The judges agree on bits per byte: low has fewer than high, 0.")
    assert "by slope 20.0, 0." in text and text.endswith("apart at most.")
    against = evaluate(sets, judges[0], panel=judges[2:], **options)
    against = compare_panels(*(against[name].measures for name in sets))
    assert against.alone == "slope 20.0" and against.to_dict()["gain_seen_by_one_judge_alone"] == "slope 20.0"
    assert "The judges do not agree on bits per byte: low against high, 0." in against.agreement("low", "high")


@pytest.mark.parametrize(
    ("logs", "alone"),
    [
        ((-0.2, 0.1), "a"),
        ((-0.2, -0.1), None),  # both see it
        ((0.2, 0.1), None),  # none does
        ((-0.02, -0.01), None),  # within chance of each other
    ],
)
def test_a_gain_is_one_judges_alone_only_beyond_the_intervals(logs, alone):
    noise = torch.linspace(-0.03, 0.03, 100, dtype=torch.float64)
    others = torch.linspace(-0.05, 0.05, 100, dtype=torch.float64)
    found = PanelComparison(("a", "b"), ((logs[0], logs[0] + noise / 2), (logs[1], logs[1] + others)), 0.95)
    assert found.alone == alone


@pytest.mark.parametrize(
    ("kind", "extra", "in_blocks"),
    [
        ("Llama", {}, True),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "num_key_value_heads": 2}, True),
        ("Granite", {"logits_scaling": 3.0}, False),
        ("GPT2", {}, True),
    ],
)
def test_large_vocabularies_are_scored_in_blocks_with_the_models_own_logits(kind, extra, in_blocks, monkeypatch):
    """A scale that is not known makes the judge compute all logits at once."""
    torch.manual_seed(0)
    size = SIZES.get(kind, SIZES["other"])
    config = getattr(transformers, f"{kind}Config")(**size, **extra)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)  # so that a soft cap matters
    ids = torch.randint(64, (5, 9), generator=torch.Generator().manual_seed(1))
    whole = GenerativePerplexity(model, protocol="all").score(ids)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda layer, given, out: rows.append(out.shape[:-1].numel()))
    monkeypatch.setattr(judge_module, "BLOCK", 64 * 8)
    blocks = GenerativePerplexity(model, protocol="all").score(ids)
    assert (max(rows) <= 8) is in_blocks
    torch.testing.assert_close(blocks.sample_nll, whole.sample_nll, rtol=1e-6, atol=0)
    assert blocks.precision == whole.precision == "float32"


class StartingTokenizer:
    """A tokenizer of letters that, as Gemma's does, begins every text with a token of its own."""

    bos_token_id, eos_token_id = 26, 27

    def __call__(self, texts, add_special_tokens=True, **_):
        rows = [[ord(letter) - ord("a") for letter in text] for text in ([texts] if isinstance(texts, str) else texts)]
        rows = [[26] * add_special_tokens + row for row in rows]
        return {"input_ids": rows[0] if isinstance(texts, str) else rows}


def test_a_judge_with_a_start_token_reads_it_before_every_sample_and_scores_the_first_token():
    seen = []

    def model(ids, mask):
        seen.append(ids)
        return torch.zeros(*ids.shape, 28)

    judge = GenerativePerplexity(model, StartingTokenizer(), protocol="all")
    found = judge.score(["abc", "de"])
    assert judge.judge.start_id == 26
    assert torch.cat([rows[:, 0] for rows in seen]).tolist() == [26, 26]
    assert found.sample_tokens.tolist() == [3, 2] and found.nll == pytest.approx(5 * math.log(28))
    for protocol, sizes, tokens in (("all", [4, 4, 4, 4], 9), ("mdlm", [4, 4, 4], 9)):
        seen.clear()
        long = GenerativePerplexity(
            model, StartingTokenizer(), protocol=protocol, max_length=4, batch_size=1, eos_id=27
        )
        assert long.score(["abcdefghi"]).tokens == tokens
        assert [rows.shape[1] for rows in seen] == sizes and all(rows[0, 0] == 26 for rows in seen)
    ids = judge.score([[26, 0, 1], [0, 1, 2]])
    assert ids.sample_tokens.tolist() == [2, 3] and ids.sample_generated.tolist() == [3, 3]
    assert Judge(model, None).start_id is None


def test_the_start_token_leaves_features_within_the_window_of_the_judge():
    class Model:
        config = SimpleNamespace(max_position_embeddings=4, vocab_size=28)

        def __call__(self, ids, mask, output_hidden_states):
            assert ids.shape[1] <= 4 and (ids[:, 0] == 26).all()
            return SimpleNamespace(hidden_states=[ids[..., None].float()])

    judge = Judge(Model(), StartingTokenizer())
    assert judge_features(["abcdef", "ab"], judge).tolist() == [[2], [1]]
    assert judge_features(["abcdef"], judge, truncate=2).tolist() == [[1]]


def test_a_judge_that_is_no_stranger_to_the_denoiser_is_named(tmp_path):
    cards = {
        "judge": "---\ndatasets:\n- owner/web\n- 'owner/books'\nbase_model: owner/small\n---\n",
        "same-data": "---\ntags: [x]\ndatasets: [owner/books, other]\n---\n",
        "same-base": "---\nbase_model: owner/small\n---\n",
        "stranger": "---\ndatasets: owner/code\n---\ndatasets: owner/web\n",
        "no-card": "datasets: owner/web",
    }
    for name, card in cards.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(card, encoding="utf-8")
    judge, *others = (str(tmp_path / name) for name in cards)
    found = judge_notes([judge, "owner/other"], [(folder.rsplit("/", 1)[-1], folder) for folder in [*others, judge]])
    assert [(note.split(":")[0], "owner/books" in note) for note in found] == [
        ("same-data", True), ("same-base", False), ("judge", True), ("judge", False)
    ]  # fmt: skip
    shipped = [str(PRETRAINED / name) for name in ("judge", "uniform")]
    assert judge_notes(shipped[:1], [("uniform", shipped[1])])[0].endswith(
        "Python documentation as well, and flatters such text."
    )


def test_loading_a_judge_shows_no_bar_and_leaves_those_of_others_on(capfd):
    from transformers.utils import logging

    load_judge(str(PRETRAINED / "judge"))
    assert "it/s" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()


def test_a_gguf_file_is_converted_once_and_a_package_needs_exactly_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "carries_a_judge"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('finding the file imports nothing')")
    converted = []

    def convert(file, folder):
        converted.append(file.name)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_judge, "_convert", convert)
    with pytest.raises(TokenDriftError, match="carries_a_judge has 0 GGUF files"):
        gguf_judge.folder_of_gguf("package:carries_a_judge")
    (package / "model-q4.gguf").write_bytes(b"weights")
    first = gguf_judge.folder_of_gguf("package:carries_a_judge")
    assert first == gguf_judge.folder_of_gguf(str(package / "model-q4.gguf")) and converted == ["model-q4.gguf"]
    assert (first / "config.json").is_file() and [path.name for path in first.parent.iterdir()] == [first.name]
    (package / "model-q4.gguf").write_bytes(b"other weights")
    assert gguf_judge.folder_of_gguf("package:carries_a_judge") != first
    for name, says in (("package:os.path", "is not an installed package"), ("nowhere.gguf", "is no file")):
        with pytest.raises(TokenDriftError, match=says):
            gguf_judge.folder_of_gguf(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(package / "model-q4.gguf"))  # a file, where there should be a folder
    with pytest.raises(TokenDriftError, match="judges cannot be written"):
        gguf_judge.folder_of_gguf("package:carries_a_judge")
