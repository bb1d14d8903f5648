"""The demo: its models, its options, and one small run of each process from end to end."""

import io
import json
import re
from functools import partial
from pydoc_data import topics

import pytest
from rich.console import Console

from tokendrift import TokenDriftError
from tokendrift.corpus import Splits, split
from tokendrift.demo import PRETRAINED, DemoConfig, demonstration, pretrained_path, run_demo
from tokendrift.demo.demonstration import show
from tokendrift.evaluation.report import EvaluateConfig
from tokendrift.models.tokenizer import load_tokenizer
from tokendrift.training import make_config


def test_shipped_models_stay_below_eight_megabytes():
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file()) <= 8 * 2**20


@pytest.mark.parametrize("name", ["masked", "uniform", "judge"])
def test_every_shipped_model_has_the_shared_tokenizer(name):
    own, shared = (load_tokenizer(pretrained_path(place)) for place in (name, "tokenizer.json"))
    assert own.get_vocab() == shared.get_vocab() and own.eos_token_id == shared.eos_token_id == 0


def test_an_unknown_model_is_refused_with_the_names_there_are():
    with pytest.raises(TokenDriftError, match=r"'judge', 'masked', 'tokenizer\.json', 'uniform'"):
        pretrained_path("large")


def test_a_folder_without_the_models_is_refused(tmp_path):
    with pytest.raises(TokenDriftError, match="models must be a folder that holds masked"):
        DemoConfig(models=tmp_path)


@pytest.mark.parametrize("process", ["uniform", "masked"])
@pytest.mark.parametrize("objective", ["matching", "drift", "pairs"])
def test_every_refinement_has_a_valid_configuration(process, objective, tmp_path):
    made = DemoConfig(process=process, objective=objective).refinement(tmp_path / "text.txt", tmp_path)
    assert made.settings()["objective"] == objective and made.baseline and made.steps == 80


PARAMS = [("masked", "matching"), ("uniform", "drift"), ("masked", "pairs")]
SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in PARAMS[1:]]


@pytest.fixture(scope="module", params=[PARAMS[0], *SLOW], ids="-".join)
def small_run(request, tmp_path_factory):
    """Configuration and report of a whole run with two training steps and few samples, and a call that repeats it."""
    folder = tmp_path_factory.mktemp("demo")
    process, objective = request.param
    config = DemoConfig(
        process, objective, output=folder, steps=2, samples=12, nfes=(1, 2), judges=(str(pretrained_path("judge")),)
    )
    splits = Splits(*(part[:100] for part in split(topics.topics.values())))
    small = {"batch_size": 8, "micro_batch": 8} | ({} if objective == "drift" else {"pair_sequences": 64})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstration, "read_splits", lambda files: splits)
        patch.setattr(demonstration, "make_config", lambda values: make_config(values=values | small))
        patch.setattr(demonstration, "EvaluateConfig", partial(EvaluateConfig, resamples=50))

        def run():
            return run_demo(config, Console(file=io.StringIO()))

        yield config, run(), run


def printed(report, config):
    """Return what the demo prints."""
    console = Console(width=100, file=io.StringIO())
    show(report, config, console)
    return console.file.getvalue()


def test_the_demo_measures_both_models_beside_real_text(small_run):
    config, report, _ = small_run
    assert [name for name, _, _ in report.entries()][-1] == "real text"
    assert {report.model(row.name) for row in report.evaluation.rows} == {config.refined, "continuation"}
    assert sorted(row.measures.nfe for row in report.evaluation.rows) == [1, 1, 2, 2]
    assert {row.measures.samples for row in report.evaluation.rows} == {12}
    assert [(report.model(one.name), one.found.kind) for one in report.matched] == [
        (config.refined, kind) for kind in ("sample", "unigram") * 2
    ]

    page = (config.output / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "src=" not in page and "@import" not in page
    assert all(part in page for part in ("real text", "Gen.-PPL", "At equal entropy with continuation", "float32"))
    stored = json.loads((config.output / "results.json").read_text(encoding="utf-8"))
    assert {row["model"] for row in stored["rows"]} == {config.refined, "continuation"}


def test_what_is_printed_fits_100_columns_and_ends_with_the_verdict(small_run):
    config, report, _ = small_run
    lines = printed(report, config).splitlines()
    assert max(len(line) for line in lines[:-1] if str(config.output) not in line) <= 100
    assert not any("…" in line for line in lines[:20])  # no cell of the table is cut
    assert len([line for line in lines if re.match(r" *continuation = (sample|unigram) ", line)]) == 4
    assert lines[-1] == report.verdict() and lines[-1].startswith("At 1 NFE and equal sample entropy, ")


def test_a_second_run_reuses_models_and_samples_and_gives_the_same_figures(small_run, monkeypatch):
    config, first, run = small_run

    def kept():
        found = [path for part in ("checkpoints", "samples") for path in config.output.rglob(f"{part}/*")]
        return {path: path.stat().st_mtime_ns for path in found}

    monkeypatch.setattr(demonstration, "page", lambda report: "drawn above")
    before = kept()
    second = run()
    assert before and kept() == before
    assert printed(first, config) == printed(second, config)


def test_other_settings_and_other_text_have_a_folder_of_their_own():
    texts = Splits(["a"], ["b"], ["c"]), Splits(["a"], ["b"], ["d"])
    configs = DemoConfig(), DemoConfig(seed=1), DemoConfig(window=4)
    assert len({demonstration._digest(config, text) for config in configs for text in texts}) == 6
    moved = DemoConfig(output=PRETRAINED)
    assert demonstration._digest(moved, texts[0]) == demonstration._digest(DemoConfig(), texts[0])


def test_the_command_shows_the_same_run_as_its_configuration():
    import inspect

    from tokendrift.cli import demo

    defaults = {name: each.default for name, each in inspect.signature(demo).parameters.items()}
    config = DemoConfig()
    assert (defaults["process"], defaults["objective"]) == (config.process, config.objective)
    assert defaults["window"] == config.window
