"""``tokendrift evaluate``: samples files and checkpoints in; table, JSON, CSV and a page out."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from functools import partial

import pytest
from commands import invoke

from tokendrift.demo import PRETRAINED
from tokendrift.evaluation.report import EvaluateConfig
from tokendrift.models.tokenizer import load_tokenizer
from tokendrift.sampling.to_file import SampleConfig, sample_to_file

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

TOKENIZER = PRETRAINED / "tokenizer.json"
JUDGE = ("--judge", PRETRAINED / "judge", "--judge-tokenizer", TOKENIZER)
SENTENCES = [
    "The method returns a new list of all the values in the mapping object.",
    "If the argument is omitted, the default encoding of the platform is used.",
    "Changed in version 3.8: the function accepts keyword arguments as well.",
    "An exception is raised when the given file does not exist or is not readable.",
    "Return the number of items that were found in the container so far.",
    "This module provides access to the classes of the parser.",
]


run = partial(invoke, "evaluate", "--resamples", 200, columns=150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write real text, a set that says one thing over and over, and one with a broken line."""
    place = tmp_path_factory.mktemp("evaluate")
    (place / "real.txt").write_text("\n\n".join(SENTENCES * 6), encoding="utf-8")
    dull = [json.dumps({"text": "of the list of the list of the list of the list", "nfe": 4}) for _ in range(12)]
    (place / "dull.jsonl").write_text("\n".join(dull), encoding="utf-8")
    (place / "broken.jsonl").write_text("\n".join([*dull[:5], '{"text": 3}', *dull[5:]]), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def outcome(folder):
    """Run once on a file and a checkpoint with every output."""
    outputs = [part for kind in ("json", "csv", "html") for part in (f"--{kind}", folder / f"report.{kind}")]
    return run(
        f"repeater={folder / 'dull.jsonl'}", "--checkpoint", PRETRAINED / "uniform", "--nfe", 1, "--nfe", 2, "-n", 12,
        "--tokenizer", TOKENIZER, "--keep", folder / "kept", "--real", folder / "real.txt", *JUDGE,
        "--training-text", folder / "real.txt", "--baseline", "uniform", *outputs,
    )  # fmt: skip


def test_files_and_checkpoints_stand_in_one_table_beside_real_text(outcome, folder):
    assert outcome.exit_code == 0, outcome.output
    for heading in ("NFE", "precision", "Gen.-PPL", "H sample", "H unigram", "guard"):
        assert heading in outcome.output
    rows = [line.split("float32")[0].split() for line in outcome.output.splitlines() if "  float32  " in line]
    sets = [["repeater", "4", "12"], ["uniform", "1", "12"], ["uniform", "2", "12"]]
    assert rows[:4] == [*sets, ["real", "text", "12"]]
    said = "".join(outcome.output.split())
    assert "measuredon" in said and ";writtento" in said and f"{folder / 'report.html'}" in said
    with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
        assert [line["name"] for line in csv.DictReader(file)] == [
            "repeater", "uniform, 1 NFE", "uniform, 2 NFE", "real text", "real text, cut as uniform, 1 NFE"
        ]  # fmt: skip


def test_the_guard_names_the_cheat_in_words(outcome):
    text = " ".join(outcome.output.split())
    assert "repeater: flag: unigram_entropy" in text and "repeater: flag: repetition_4" in text
    assert "few different tokens within a sample" in text


def test_the_json_holds_settings_figures_verdicts_and_the_nelbo_of_the_checkpoint(outcome, folder):
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert found["settings"]["nfe"] == [1, 2] and found["settings"]["tokendrift"]
    by_name = {row["name"]: row for row in found["rows"]}
    assert "unigram_entropy" in {one["figure"] for one in by_name["repeater"]["guard"]["findings"]}
    assert by_name["repeater"]["copied_share"]["estimate"] == 0
    assert by_name["uniform, 2 NFE"]["nfe"] == 2 and by_name["uniform, 2 NFE"]["made"]["steps"] == 2
    assert by_name["uniform, 2 NFE"]["gen_ppl"]["estimate"] < by_name["uniform, 1 NFE"]["gen_ppl"]["estimate"]


def test_sampling_the_baseline_colder_wins_nothing_at_equal_entropy(folder, tmp_path):
    cold = SampleConfig(str(PRETRAINED / "uniform"), n=12, steps=2, temperature=0.55, tokenizer=str(TOKENIZER))
    sample_to_file(cold, tmp_path / "cold.jsonl")
    result = run(
        tmp_path / "cold.jsonl", "--checkpoint", f"base={PRETRAINED / 'uniform'}", "--nfe", 2, "-n", 12,
        "--tokenizer", TOKENIZER, "--real", folder / "real.txt", *JUDGE, "--baseline", "base",
        "--json", tmp_path / "report.json", "--html", tmp_path / "report.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["at_equal_entropy"]
    assert [(one["name"], one["against"], one["kind"]) for one in found] == [
        ("cold", "base", "sample"), ("cold", "base", "unigram")
    ]  # fmt: skip
    for one in found:  # 0.55 is on the grid of temperatures, and both draws take the same random numbers
        assert one["temperature"] == pytest.approx(0.55, abs=1e-6) and one["verdict"] == "not distinguishable"
        assert one["ratio"]["estimate"] == pytest.approx(1, abs=1e-5)  # rounding of batches
    text = " ".join(result.output.split())
    assert "cold against base: Gen.-PPL lower" in text  # as drawn it looks better
    assert "cold against base: Gen.-PPL ratio at equal sample entropy 1.000" in text
    assert "At equal entropy with base" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Two checkpoint folders, each with its own copy of the tokenizer, as `refine` leaves them."""
    place = tmp_path_factory.mktemp("checkpoints")
    for name in ("base", "refined"):
        shutil.copytree(PRETRAINED / "masked", place / name)
        shutil.copy(TOKENIZER, place / name)
    return place


def test_checkpoints_with_copies_of_one_tokenizer_share_their_vocabulary(folder, copies, tmp_path):
    result = run(
        "--checkpoint", copies / "base", "--checkpoint", copies / "refined", "--nfe", 32, "-n", 4, "--baseline", "base",
        "--real", folder / "real.txt", *JUDGE, "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {row["vocabulary"] for row in found["rows"]} == {"generated"}
    # A row of this length skips some of 32 calls. The baseline takes the 32 steps nevertheless: at temperature 1 both
    # are one model with one noise, down to the samples.
    assert all(row["made"]["steps"] == 32 > row["nfe"] for row in found["rows"])
    for one in found["at_equal_entropy"]:
        assert one["temperature"] == 1 and one["matched"] and one["entropy_difference"]["estimate"] == 0
        assert one["baseline"]["nfe"] == found["rows"][0]["nfe"]
        assert one["ratio"]["estimate"] == pytest.approx(1, abs=1e-5)  # rounding of batches


def test_a_baseline_beside_ids_of_an_unknown_vocabulary_is_read_by_its_own_tokenizer(folder, copies, tmp_path):
    lines = [json.dumps({"ids": [5000 + i] * 9, "text": SENTENCES[i], "nfe": 2}) for i in range(4)]
    (tmp_path / "foreign.jsonl").write_text("\n".join(lines), encoding="utf-8")
    result = run(
        tmp_path / "foreign.jsonl", "--checkpoint", copies / "base", "--nfe", 2, "-n", 4, "--baseline", "base",
        "--real", folder / "real.txt", *JUDGE, "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {row["vocabulary"] for row in found["rows"]} == {"judge"}
    assert found["rows"][1]["nelbo"]["estimate"] > 0
    for one in found["at_equal_entropy"]:
        assert one["baseline"]["vocabulary"] == "judge" and one["baseline"]["retokenised"] is True


def test_the_baseline_is_not_compared_at_an_nfe_that_it_was_not_sampled_at(outcome):
    assert "repeater against uniform: Gen.-PPL ratio" not in " ".join(outcome.output.split())


def test_samples_of_checkpoints_are_kept_and_used_again(outcome, folder):
    kept = folder / "kept" / "uniform-2.jsonl"
    before = kept.stat().st_mtime_ns
    again = run(
        kept, "--real", folder / "real.txt", "--tokenizer", TOKENIZER, *JUDGE, "--json", folder / "again.json"
    )  # fmt: skip
    assert again.exit_code == 0 and kept.stat().st_mtime_ns == before
    first, second = (
        json.loads((folder / name).read_text(encoding="utf-8"))["rows"][-1] for name in ("report.json", "again.json")
    )
    assert first["gen_ppl"]["estimate"] == pytest.approx(second["gen_ppl"]["estimate"], rel=1e-5)  # rounding of batches
    assert second["vocabulary"] == "generated"


def test_a_broken_line_stops_it_or_is_named(folder):
    arguments = (folder / "broken.jsonl", "--real", folder / "real.txt", *JUDGE)
    result = run(*arguments)
    assert result.exit_code == 2 and "line 6 of" in result.output and '"text" must be a string' in result.output
    result = run(*arguments, "--skip-bad")
    assert result.exit_code == 0
    assert 'broken.jsonl left out: the first is line 6 ("text" must be a string)' in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "there is nothing to evaluate"),
        (("--checkpoint", "x"), "checkpoint and nfe belong together"),
        (("{dull}", "--nfe", "4"), "checkpoint and nfe belong together"),
        (("{dull}", "--temperature", "0.5"), "keep and temperature are for samples of checkpoints"),
        (("--checkpoint", "x", "--nfe", "4", "--baseline", "y"), "baseline must be the name of a checkpoint"),
        (("--checkpoint", "x", "--checkpoint", "y/x", "--nfe", "4"), "two checkpoints have the same name"),
        (("{surrogate}",), "line 1 of"),
        (("real text={dull}",), "a set of samples is called 'real text', as real text is"),
        (("nowhere.jsonl",), "samples file nowhere.jsonl cannot be read: No such file"),
        (("{dull}", "--real", "nowhere.txt"), "text file nowhere.txt cannot be read: No such file"),
        (("{dull}", "--real", "{empty}"), "is empty"),
        (("{dull}", "--training-text", "nowhere.txt"), "text file nowhere.txt cannot be read"),
        (("{dull}", "--judge", "{folder}"), "could not be loaded"),
        (("{dull}", "--device", "gpu"), "device 'gpu' cannot be used"),
        (("{dull}", "--dtype", "float8"), "dtype must be one of 'float32', 'bfloat16'"),
        (("{dull}", "a={dull}", "a={dull}", "--judge", "./gone"), "two sets of samples are called 'a, 4 NFE'"),
    ],
)
def test_bad_input_ends_with_code_2_and_says_what_to_do(folder, arguments, said):
    (folder / "empty.txt").write_text(" \n", encoding="utf-8")
    (folder / "half.jsonl").write_text('{"text": "a \\ud800 b"}', encoding="utf-8")
    names = {
        "{surrogate}": folder / "half.jsonl",
        "{dull}": folder / "dull.jsonl",
        "{folder}": folder,
        "{empty}": folder / "empty.txt",
    }
    given = [str(argument) for argument in arguments]
    for name, place in names.items():
        given = [argument.replace(name, str(place)) for argument in given]
    defaults = () if "--real" in given else ("--real", folder / "real.txt")
    defaults += () if "--judge" in given else JUDGE
    result = run(*given, *defaults)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_several_judges_and_controls_stand_in_every_output(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(PRETRAINED / "judge", other)
    load_tokenizer(TOKENIZER).save_pretrained(other)
    outputs = [part for kind in ("json", "csv", "html") for part in (f"--{kind}", tmp_path / f"report.{kind}")]
    result = run(
        folder / "dull.jsonl", f"same={folder / 'dull.jsonl'}", "--real", folder / "real.txt", *JUDGE,
        "--judge", other, "--controls", "--gradient-moment", *outputs,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "control: unigram" in text and f"Beside it: {other}." in text
    assert "The judges agree on bits per byte: dull does not differ beyond chance from same, 1.000" in text
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("At 4 NFE, dull has 0.") and "times the bits per byte of real text" in last
    assert "control" not in last
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["verdict"] == last and [(one["a"], one["b"]) for one in found["comparisons"]] == [("dull", "same")]
    (beside,) = found["rows"][0]["panel"]
    assert beside["bits_per_byte"]["estimate"] == pytest.approx(found["rows"][0]["bits_per_byte"]["estimate"])
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert {"control: unigram draws", "control: 3-gram draws", "control: tiled text", "real text"} <= set(lines)
    assert float(lines["dull"][f"bits_per_byte ({other})"]) == pytest.approx(float(lines["dull"]["bits_per_byte"]))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    moment = found["rows"][0]["gradient_moment"]["estimate"]
    assert moment > 0 and moment == pytest.approx(float(lines["dull"]["gradient_moment"]))
    assert found["rows"][0]["gradient_moment_z"]["estimate"] > 5 and found["settings"]["gradient_moment"]
    assert "gradient" in result.output and all(f"{moment:.3f}" in shown for shown in (html, result.output))
    assert "Whether the judges agree" in html and "bits/byte, other" in html
    again = run(folder / "dull.jsonl", "--real", folder / "real.txt", *JUDGE, "--judge", PRETRAINED / "judge")
    assert again.exit_code == 2 and "judge must name one or several different judges" in again.output


def test_real_text_is_not_optional(folder):
    result = run(folder / "dull.jsonl")
    assert result.exit_code == 2 and "--real" in result.output


def test_on_a_full_disk_the_old_report_stays(folder, monkeypatch):
    old = folder / "old.html"
    old.write_text("the old report", encoding="utf-8")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = run(folder / "dull.jsonl", "--real", folder / "real.txt", *JUDGE, "--html", old)
    assert result.exit_code == 2
    assert "could not be written: No space left on device. The older file is unchanged." in result.output
    assert old.read_text(encoding="utf-8") == "the old report"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert "Gen.-PPL" in result.output  # the table was printed before


def test_a_number_of_evaluations_that_is_given_twice_is_sampled_once():
    assert EvaluateConfig(checkpoint=("base",), nfe=(8, 4, 8)).nfe == (8, 4)
