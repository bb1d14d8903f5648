"""The main job: its text, its cache, its honesty, and one small run from end to end."""

import ast
import inspect
import io
import json
import re
import sys

import pytest
import torch
from rich.console import Console

from tokendrift import TokenDriftError
from tokendrift.demo import run as demo_run
from tokendrift.demo.cache import cached
from tokendrift.demo.corpus import docstrings, file_documents, prose, python_documents, split
from tokendrift.demo.report import over_seeds, table, write
from tokendrift.demo.run import MATCHED, Demo
from tokendrift.demo.stages import PRETRAINED, Corpus, DemoConfig, check_base, make_denoiser, make_process

WORDS = "the model reads a long sentence and writes another one about fields"


def sentences(count: int, start: int = 0) -> list[str]:
    return [f"Sentence {'abcdefghij'[i % 10] * (1 + i // 10)} says that " + WORDS for i in range(start, start + count)]


def test_prose_keeps_sentences_and_drops_code_and_tables():
    document = (
        "A plain paragraph\nof several words here.\n\n>>> print(1)\n1\n\na | b | c | d | e\n\nx = {1: 2, 3: [4]}; y"
    )
    assert list(prose(document)) == ["A plain paragraph of several words here."]


def test_docstrings_are_read_without_running_the_file(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""Module text."""\nraise SystemExit\ndef f():\n    "Function text."\n')
    assert list(docstrings(path)) == ["Module text.", "Function text."]
    path.write_text("def broken(:\n")
    assert list(docstrings(path)) == []


def test_a_document_is_in_one_split_only_and_stays_there():
    documents = sentences(3000)
    first, reordered = split(documents), split(reversed(documents))
    parts = [set(part) for part in first]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == 3000
    assert [set(part) for part in reordered] == parts


def test_repeated_paragraphs_count_once():
    documents = sentences(3000)
    assert sum(map(len, split([*documents, *documents]))) == 3000


def test_python_carries_enough_english():
    parts = split(python_documents())
    words = {name: sum(len(text.split()) for text in part) for name, part in parts._asdict().items()}
    assert words["denoiser"] > 80_000 and words["judge"] > 50_000 and words["held_out"] > 10_000


def test_too_little_text_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(TokenDriftError, match=r"words of prose, but the demo needs 20,000"):
        split(sentences(3))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TokenDriftError, match="cannot be read as UTF-8"):
        list(file_documents([tmp_path / "latin.txt"]))


def test_a_stage_is_made_once_for_each_key(tmp_path):
    calls = []

    def make(place):
        calls.append(place)
        (place / "result").write_text("done")

    first = cached(tmp_path, "stage", {"a": 1}, make)
    again = cached(tmp_path, "stage", {"a": 1}, make)
    other = cached(tmp_path, "stage", {"a": 2}, make)
    assert len(calls) == 2 and first == (again[0], False) and again[1] and other[0] != first[0]
    assert (first[0] / "result").read_text() == "done"


def test_an_interrupted_stage_leaves_nothing_behind(tmp_path):
    def make(place):
        (place / "half").write_text("...")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "stage", {}, make)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_knows_only_unigrams_is_refused():
    corpus = Corpus(None, torch.zeros(9), torch.zeros(9), torch.zeros(4, 32, dtype=torch.int64), 1.0)
    with pytest.raises(TokenDriftError, match="knows little more than unigrams: NELBO"):
        check_base(make_denoiser(make_process("masked")), make_process("masked"), corpus)


def test_shipped_models_stay_below_eight_megabytes():
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file()) <= 8 * 2**20


def test_the_judge_never_reads_the_denoisers_split():
    tree = ast.parse(inspect.getsource(sys.modules["tokendrift.demo.stages"]))
    trainer = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train_judge")
    used = {
        n.attr for n in ast.walk(trainer) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "corpus"
    }
    assert used == {"judge"}


@pytest.fixture(scope="module", params=["uniform", "masked"])
def small_run(request, tmp_path_factory):
    """One whole run with two training steps and few samples."""
    folder = tmp_path_factory.mktemp("demo")
    config = DemoConfig(process=request.param, steps=2, samples=16, nfes=(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "TEMPERATURES", (1.0, 0.7, 0.4))
        patch.setattr(demo_run, "OWN_TEMPERATURES", (1.0,))

        def go():
            output = Console(width=110, record=True, quiet=True)
            demo = Demo(config, [], folder, from_scratch=False, console=output)
            prepared = demo.prepare()
            outcome = demo.run_seed(*prepared, 0)
            return demo, prepared, outcome

        yield config, folder, go


def test_the_demo_measures_every_model_at_every_nfe_beside_real_text(small_run):
    config, folder, go = small_run
    _, (corpus, _, base), outcome = go()
    names = [row.model for row in outcome.rows]
    assert names == ["real text", *["base", "continuation", "TokenDrift", *MATCHED.values()] * 2]
    assert {row.measures.nfe for row in outcome.rows} == {None, 1, 2}
    assert all(row.measures.samples == 16 for row in outcome.rows)
    head = outcome.headline
    ratio = next(r for r in outcome.rows if r.model == "TokenDrift").measures.gen_ppl.estimate
    continued = next(r for r in outcome.rows if r.model == "continuation").measures.gen_ppl.estimate
    assert head["relative_change"] == pytest.approx(ratio / continued - 1)
    assert outcome.nelbo["base"] == check_base(base, make_process(config.process), corpus)

    path = write(folder, config, [outcome])
    page = path.read_text()
    assert page.count("<svg") == 5 and "src=" not in page and "<script" not in page and "@import" not in page
    assert all(part in page for part in ("real text", "Gen.-PPL", "H unigram", "16 samples a row", "float32", "mdlm"))
    stored = json.loads((folder / "results.json").read_text())
    assert stored["seeds"][0]["rows"][0]["sample_entropy"]["estimate"] > 0
    assert {row["nfe"] for row in stored["seeds"][0]["rows"]} == {None, 1, 2}
    other = outcome._replace(headline={**outcome.headline, "log_gap_closed": outcome.headline["log_gap_closed"] + 0.2})
    assert f"closed {outcome.headline['log_gap_closed'] + 0.1:.3f} ± 0.141" in over_seeds([outcome, other])
    view = Console(width=110, record=True, file=io.StringIO())
    view.print(table(outcome, "title"))
    assert len(re.findall(r"TokenDrift", view.export_text())) == 2


def test_a_second_run_reuses_the_stages_and_gives_the_same_figures(small_run):
    _, folder, go = small_run
    first = go()[2]
    before = {path: path.stat().st_mtime_ns for path in (folder / "stages").rglob("*") if path.is_file()}
    second = go()[2]
    after = {path: path.stat().st_mtime_ns for path in (folder / "stages").rglob("*") if path.is_file()}
    assert before == after and len(list((folder / "stages").iterdir())) == 2
    assert first.headline == second.headline


def test_from_scratch_trains_tokenizer_judge_and_base_and_refuses_a_base_without_context(tmp_path):
    book = tmp_path / "book.txt"
    documents = [text for text in python_documents() if len(text) > 400][:900]
    book.write_text("\n\n".join(documents), encoding="utf-8")
    config = DemoConfig(process="uniform", base_steps=2, judge_steps=2)
    shown = Console(width=110, record=True, file=io.StringIO())
    demo = Demo(config, [book], tmp_path / "out", from_scratch=False, console=shown)
    with pytest.raises(TokenDriftError, match="knows little more than unigrams"):
        demo.prepare()
    assert re.search(r"from scratch takes about \d+ minutes on this machine, once", shown.export_text())
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "out" / "stages").iterdir())
    assert kept == ["base", "judge"]  # finished stages stay for the next run
