"""The study's parts: every arm trains, keys tell arms apart, what is finished is found again and reported."""

from __future__ import annotations

import ast
import inspect
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tokendrift import TokenDriftError
from tokendrift.corpus import python_documents
from tokendrift.models import DiT, DiTConfig

STUDY = Path(__file__).parents[1] / "examples" / "study"
NAMES = ("arms", "cache", "english", "markov", "pretrain", "report", "run", "stages")


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


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_every_arm_trains(study, kind):
    tool = study["markov"].Markov(Path("unused"))
    process = tool.process(kind)
    torch.manual_seed(0)
    sizes = DiTConfig(process.vocab_size, 16, hidden_dim=16, cond_dim=8, n_blocks=2, n_heads=2, dropout=0.0)
    text = tool.language.sample(32, seed=0)
    for arm in every_arm(study):
        model = DiT(sizes)
        torch.nn.init.normal_(model.output_layer.linear.weight, std=0.1)  # a head of zeros has nothing to drift
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
    assert len(main) == 2 * 2 * (3 * len(arms.MAIN) + 1) + 1  # the base once, and a longer run
    first = next(number for number, cell in enumerate(cells) if cell.arm != arms.CONTINUATION)
    assert all(cell.arm != arms.CONTINUATION for cell in cells[first:])
    assert len({str(cell) for cell in cells}) == len(cells)


def interval(value):
    return {"estimate": value, "low": 0.9 * value, "high": 1.1 * value}


def measured(ppl, entropy, **more):
    names = ("distinct_3", "repetition_4", "copied_share")
    entropies = {"sample_entropy": interval(entropy), "unigram_entropy": interval(entropy + 2)}
    return {"gen_ppl": interval(ppl), **entropies, **{name: interval(0.1) for name in names}, **more}


def english(ppl, curve, matched):
    """Results of a model of given Gen.-PPL at NFE 4, with its curve over temperatures."""
    row = measured(ppl, 3.3, steps=4)
    if matched:
        match = {"ratio": interval(0.5), "entropy_difference": interval(0.01)}
        row["matched"] = {f"{e}, {m}": match for e in ("sample", "unigram") for m in ("temperature", "top_p")}
    points = [measured(p, h, steps=4, temperature=t, top_p=1.0) for t, h, p in curve]
    return {"nelbo": 4.0, "training_seconds": 1.0, "rows": [row], "real": measured(30.0, 3.2), "curve": points}


def test_the_report_compares_at_the_entropy_of_real_text(study, tmp_path):
    arms, run, report = study["arms"], study["run"], study["report"]
    cells = [
        (
            run.Cell("english", "uniform", arms.CONTINUATION, 0, True),
            english(400.0, [(0.8, 3.1, 100.0), (1.0, 3.3, 400.0)], False),
        ),
        (
            run.Cell("english", "uniform", arms.PAIRS, 0, True),
            english(200.0, [(0.8, 3.2, 50.0), (1.0, 3.4, 200.0)], True),
        ),
    ]
    tool = type("Tool", (), {"source": "a test", "sizes": study["english"].Sizes(), "facts": lambda self: {}})()
    report.write(tmp_path, {"english": tool}, cells)
    table = (tmp_path / "english-uniform-matched.md").read_text().splitlines()[2:]
    (ours,) = table
    # Interpolated in the logarithm between 100 and 400 at entropy 3.2: 200. So 50 / 200, and ln(200/50) / ln(200/30).
    assert ours.split(" | ")[-4:] == ["0.25", "73%", "0.25", "73% |"]
    plain = json.loads((tmp_path / "results.json").read_text())
    assert [cell["arm"] for cell in plain["cells"]] == ["continuation", arms.PAIRS.name]
    assert (tmp_path / "english-nfe.svg").exists()


@pytest.mark.slow
def test_a_second_run_makes_nothing_again(study, tmp_path, capfd):
    run = study["run"]
    chosen = "markov, masked: continuation, seed 0"
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


def test_pretraining_writes_tokenizer_and_judge_and_refuses_a_base_without_context(study, tmp_path):
    book = tmp_path / "book.txt"
    documents = [text for text in python_documents() if len(text) > 400][:900]
    book.write_text("\n\n".join(documents), encoding="utf-8")
    with pytest.raises(TokenDriftError, match="knows little more than unigrams"):
        study["pretrain"].pretrain(tmp_path / "out", text=[book], base_steps=2, judge_steps=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["judge", "tokenizer.json"]
    assert (tmp_path / "out" / "judge" / "tokenizer.json").exists()  # finished parts stay
