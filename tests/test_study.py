"""The study's parts: every arm trains, keys tell arms apart, what is finished is found again and reported."""

from __future__ import annotations

import ast
import inspect
import json
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from tokendrift import TokenDriftError
from tokendrift.corpus import split
from tokendrift.demo import pretrained_path
from tokendrift.evaluation import GenerativePerplexity, measure
from tokendrift.models import DiT, DiTConfig
from tokendrift.sampling import SamplingSetting

STUDY = Path(__file__).parents[1] / "examples" / "study"
NAMES = ("arms", "cache", "english", "english_report", "markov", "pretrain", "report", "run", "stages")


LAW = torch.linspace(1.5, -1.5, 8, dtype=torch.float64)


def letters():
    """A tokenizer whose entries are letters."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate("abcdefgh")}, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture(scope="module")
def study():
    """The study's modules, which lie beside each other and not in the package."""
    sys.path.insert(0, str(STUDY))
    try:
        yield {name: __import__(name) for name in NAMES}
    finally:
        sys.path.remove(str(STUDY))
        for name in NAMES:
            sys.modules.pop(name, None)


def every_arm(study):
    arms = study["arms"]
    return (*arms.MAIN, *arms.PAPER_ABLATIONS, *arms.OUR_ABLATIONS)


def test_no_two_arms_have_one_name_or_one_setting(study):
    arms = every_arm(study)
    assert len({arm.slug for arm in arms}) == len(arms)
    assert len({json.dumps(arm.key()) for arm in arms}) == len(arms)
    assert study["arms"].PAPER.key() == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_every_arm_trains(study, kind):
    tool = study["markov"].Markov(Path("unused"))
    process = tool.process(kind)
    torch.manual_seed(0)
    sizes = DiTConfig(
        process.vocab_size, 16, hidden_dim=16, cond_dim=8, n_blocks=2, n_heads=2, dropout=0.0, mask_id=process.mask_id
    )
    text = tool.language.sample(32, seed=0)
    for arm in every_arm(study):
        model = DiT(sizes)
        torch.nn.init.normal_(model.output_layer.linear.weight, std=0.1)  # a head of zeros has nothing to drift
        if arm.loss == "matching":
            study["arms"].matching_config(arm, process).prepare(model)
        learn = study["arms"].objective(arm, DiT(sizes), process, 0, text)
        for _ in range(2):
            loss = learn(model, text[:8]).loss
        loss.backward()
        assert math.isfinite(loss.item()), arm.name
        if arm.field.temperatures != (0.02,):  # where the features of an untrained encoder lie too far apart
            assert any((p.grad != 0).any() for p in model.parameters() if p.grad is not None), arm.name


def test_the_main_comparison_has_three_seeds_and_continuations_come_first(study):
    cells = list(study["run"].cells())
    main = [cell for cell in cells if cell.main]
    assert {cell.seed for cell in main} == {0, 1, 2}
    arms = study["arms"]
    assert len(main) == 2 * (3 * len(arms.MAIN) + 1) + 1  # the base once, and a longer run
    first = next(number for number, cell in enumerate(cells) if cell.arm != arms.CONTINUATION)
    assert all(cell.arm != arms.CONTINUATION for cell in cells[first:])
    assert len({str(cell) for cell in cells}) == len(cells)


def judged(logits, seed, judges=2):
    """Figures of 64 samples from a law, under judges that expect the law of `LAW` in other tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(logits.softmax(dim=-1), 64 * 8, replacement=True, generator=generator).view(64, 8)
    evaluators = [
        GenerativePerplexity(lambda ids, attention_mask: LAW.expand(*ids.shape, 8), letters(), protocol="all")
    ]
    evaluators *= judges
    return measure(
        ids, evaluators[0], tokenizer=letters(), panel=evaluators[1:], nfe=4, training=ids[:1], resamples=100
    )


def test_the_report_of_english_compares_at_equal_entropy(study, tmp_path):
    cell, report = study["english"].Cell, study["english_report"]
    cooled = {SamplingSetting(4, t): judged(LAW / t, seed=1) for t in (1.0, 0.7)}
    nucleus = {SamplingSetting(4, 1.0, 0.9): judged(LAW / 0.8, seed=3)}
    cells = {
        cell("masked", "base", 0): cooled | nucleus,
        cell("masked", "pairs", 0): {
            SamplingSetting(4): judged(LAW / 0.85, seed=4),
            SamplingSetting(2): judged(LAW, seed=5),
        },
        cell("masked", "pairs", 1): {SamplingSetting(4): judged(LAW / 0.85, seed=6)},
    }
    report.write(tmp_path, judged(LAW, seed=0), cells)
    head, _, two, four = (
        line.split(" | ") for line in (tmp_path / "judged-masked-matched.md").read_text().splitlines()
    )
    assert two[1:3] == ["4", "T = 1"] and four[0] == "| pairs"
    at = head.index("over the base by temperature, <lambda>")
    mean, rest = four[at].split(" (", 1)
    assert float(mean) == pytest.approx(1.0, abs=0.1) and rest.endswith("2 seeds)")
    assert two[at] == ""  # two steps do not compare with four
    rows = (tmp_path / "judged-masked.md").read_text().splitlines()
    assert rows[2].startswith("| real text |") and len(rows) == 2 + 1 + 3 + 2
    assert (tmp_path / "judged.svg").exists()


def test_other_models_and_another_text_make_cells_of_their_own(study, tmp_path):
    english = study["english"]
    (tmp_path / "masked").mkdir()
    plan = english.Plan(tmp_path, models=tmp_path, text="bible", steps=7, batch_size=3)
    kinds = {cell.kind for cell in english.cells(plan, 1)}
    arms = {cell.arm for cell in english.cells(plan, 1)}
    assert kinds == {"masked", english.CONTROLS} and "SDTT" in arms and "DCD" not in arms
    whole = english.cells(english.Plan(tmp_path), 2)
    assert {cell.kind for cell in whole if cell.arm == "DCD"} == {"uniform"}
    assert len(set(whole)) == len(whole)


def test_a_second_refinement_starts_from_the_model_of_the_first(study, tmp_path, monkeypatch):
    english = study["english"]
    started = []

    def refine(config, progress):
        started.append((config.checkpoint, type(config.objective).__name__))
        Path(config.output).mkdir(parents=True)

    monkeypatch.setattr(english, "refine", refine)
    monkeypatch.setattr(sys.modules["corpora"], "read_splits", lambda: split(topics.values()))
    tool = english.English(english.Plan(tmp_path, quick=True))
    drifted = tool.model(english.Cell("masked", "TokenDrift after SDTT", 0))
    distilled = tool.model(english.Cell("masked", "SDTT", 0))
    assert started == [(str(pretrained_path("masked")), "SelfDistillationConfig"), (str(distilled), "DriftConfig")]
    assert tool.model(english.Cell("masked", "TokenDrift", 0)) not in (drifted, distilled)


@pytest.mark.slow
def test_a_row_of_english_is_trained_sampled_and_judged_once(study, tmp_path):
    judge = str(pretrained_path("judge"))
    plan = study["english"].Plan(tmp_path, (judge, judge), quick=True)
    tool = study["english"].English(plan)
    cell = study["english"].Cell("masked", "continuation", 0)
    first = tool.row(cell, SamplingSetting(4))
    assert first.samples == 8 and first.nfe == 4 and len(first.panel) == 1
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = study["english"].English(plan).row(cell, SamplingSetting(4), make=False)
    assert again.bits_per_byte == first.bits_per_byte
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == made
    assert tool.row(None, SamplingSetting(4)).nfe is None


@pytest.mark.slow
def test_a_second_run_makes_nothing_again(study, tmp_path, capfd):
    run = study["run"]
    chosen = "masked: continuation, seed 0"
    run.main(output=tmp_path, jobs=1, only=chosen, quick=True, only_report=False)
    folders = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts" / "markov").iterdir()}
    assert len(folders) == 5  # two bases, the main comparison and the short one, the exact denoiser
    run.main(output=tmp_path, jobs=1, only=chosen, quick=True, only_report=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts" / "markov").iterdir()} == folders
    assert "with 2 cells" in capfd.readouterr().out
    assert (tmp_path / "markov-masked.md").read_text().count("continuation") == 2


def test_a_stage_is_made_once_for_each_key(study, tmp_path):
    calls = []

    def make(place):
        calls.append(place)
        (place / "result").write_text("done")

    cached = study["cache"].cached
    first = cached(tmp_path, "stage", {"a": 1}, make)
    again = cached(tmp_path, "stage", {"a": 1}, make)
    other = cached(tmp_path, "stage", {"a": 2}, make)
    assert len(calls) == 2 and first == (again[0], False) and again[1] and other[0] != first[0]
    assert (first[0] / "result").read_text() == "done"


def test_an_interrupted_stage_leaves_nothing_behind(study, tmp_path):
    def make(place):
        (place / "half").write_text("...")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study["cache"].cached(tmp_path, "stage", {}, make)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_knows_only_unigrams_is_refused(study):
    stages = study["stages"]
    corpus = stages.Corpus(None, torch.zeros(9), torch.zeros(9), torch.zeros(4, 32, dtype=torch.int64), 1.0)
    process = stages.make_process("masked")
    with pytest.raises(TokenDriftError, match="knows little more than unigrams: NELBO"):
        stages.check_base(stages.make_denoiser(process), process, corpus)


def test_the_judge_never_reads_the_denoisers_split(study):
    tree = ast.parse(inspect.getsource(study["stages"]))
    trainer = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train_judge")
    used = {
        n.attr for n in ast.walk(trainer) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "corpus"
    }
    assert used == {"judge"}


@pytest.mark.slow
def test_pretraining_writes_tokenizer_and_judge_and_refuses_a_base_without_context(study, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(list(topics.values())[:45]), encoding="utf-8")
    with pytest.raises(TokenDriftError, match="knows little more than unigrams"):
        study["pretrain"].pretrain(tmp_path / "out", text=[book], base_steps=2, judge_steps=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["judge", "tokenizer.json"]
    assert (tmp_path / "out" / "judge" / "tokenizer.json").exists()  # finished parts stay
