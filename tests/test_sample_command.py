"""``tokendrift sample``: a file that says what it is, grows batch by batch, and is gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import invoke

import tokendrift
from tokendrift import TokenDriftError
from tokendrift.demo import PRETRAINED
from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.evaluation.sample_reader import read_samples
from tokendrift.files import exclusive
from tokendrift.models import DiT, load_denoiser, save_denoiser
from tokendrift.sampling import SAMPLERS, Ancestral, FirstHitting, Psi, ReMDM, named_sampler, remdm_loop, sample
from tokendrift.sampling.cost import flops_per_evaluation
from tokendrift.sampling.sample_file import SampleFile
from tokendrift.sampling.to_file import CheckpointSampler, SampleConfig, sample_to_file

TOKENIZER = PRETRAINED / "tokenizer.json"
KINDS = {"masked": MaskedDiffusion, "uniform": UniformDiffusion}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, backbone, tmp_path_factory):
    """Write a small checkpoint of each process with the vocabulary of the demo's tokenizer."""
    vocab = 1025 if request.param == "masked" else 1024
    folder = tmp_path_factory.mktemp(request.param)
    model = backbone(vocab_size=vocab, time_conditioning=request.param == "uniform")
    save_denoiser(model, folder, KINDS[request.param](vocab))
    return folder


@pytest.fixture
def run():
    """Call the command; return exit code and both outputs."""
    return partial(invoke, "sample")


def test_the_file_holds_what_sample_draws_and_says_how(run, checkpoint, tmp_path):
    path = tmp_path / "deep" / "samples.jsonl"
    result = run(
        checkpoint, "--steps", 3, "-n", 5, "--batch-size", 2, "--seed", 7, "--tokenizer", TOKENIZER, "-o", path
    )
    assert result.exit_code == 0, result.output
    header, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    settings = header["tokendrift"]
    assert settings["version"] == tokendrift.__version__ and settings["torch"] == torch.__version__
    assert (settings["seed"], settings["steps"], settings["n"], settings["length"]) == (7, 3, 5, 8)
    assert settings["checkpoint"] == str(checkpoint) and settings["revision"] is None and settings["complete"] is True
    assert len(settings["weights"]) == 16
    model, process = load_denoiser(checkpoint)
    assert settings["flops"] == settings["nfe"]["mean"] * flops_per_evaluation(model, process, 8)
    assert read_samples(path).flops == settings["flops"] and "GFLOPs each" in result.output
    assert settings["nfe"] == {"mean": sum(x["nfe"] for x in lines) / 5, "max": max(x["nfe"] for x in lines)}

    model, process = tokendrift.models.load_denoiser(checkpoint)
    drawn = sample(model, process, (5, 8), steps=3, seed=7)
    assert [line["ids"] for line in lines] == drawn.ids.tolist()
    assert [line["nfe"] for line in lines] == drawn.row_nfe.tolist()
    assert all(isinstance(line["text"], str) for line in lines)
    read = read_samples(path)
    assert read.metadata == settings and read.nfe == settings["nfe"]["max"]
    assert [list(ids) for ids in read.ids] == drawn.ids.tolist()
    assert f"5 samples in {path}" in result.output


def test_without_a_tokenizer_there_are_ids_alone(run, checkpoint, tmp_path):
    result = run(checkpoint, "--steps", 2, "-n", 2, "-o", tmp_path / "s.jsonl")
    assert result.exit_code == 0, result.output
    assert set(json.loads((tmp_path / "s.jsonl").read_text().splitlines()[1])) == {"ids", "nfe"}
    assert "there is no tokenizer, so the samples are ids without text" in result.stderr


@pytest.mark.parametrize("options", [[], ["--length", "20", "--stride", "3"]])
def test_every_sample_begins_with_the_prefix(run, checkpoint, tmp_path, options):
    path = tmp_path / "s.jsonl"
    result = run(checkpoint, "--steps", 2, "-n", 3, "--prefix", "the", "--tokenizer", TOKENIZER, "-o", path, *options)
    assert result.exit_code == 0, result.output
    header, *lines = (json.loads(line) for line in path.read_text().splitlines())
    assert 0 < len(header["tokendrift"]["prefix_ids"]) < 8
    assert all(line["text"].startswith("the") for line in lines)
    assert all(len(line["ids"]) == (20 if options else 8) for line in lines)


OPTIONS = {
    "shaping": ["--temperature", "0.7", "--top-p", "0.9", "--nucleus", "drop", "--top-k", "50", "--steps", "2"],
    "greedy": ["--noise-removal", "greedy", "--steps", "2"],
    "psi": ["--sampler", "psi:pure-pc,constant-0.5,pure-posterior", "--steps", "4"],
    "bfloat16": ["--dtype", "bfloat16", "--steps", "2"],
}


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory):
    """What is sampled without an option."""
    path = tmp_path_factory.mktemp("plain") / "s.jsonl"
    assert invoke("sample", checkpoint, "--steps", 2, "-n", 64, "-o", path).exit_code == 0
    return read_samples(path).ids


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_sampler(run, checkpoint, plain, tmp_path, name):
    path = tmp_path / "s.jsonl"
    # Rounding to bfloat16 changes few of the tokens: with many rows, some change on every CPU.
    result = run(checkpoint, *OPTIONS[name], "-n", 64, "-o", path)
    assert result.exit_code == 0, result.output
    changed = list(map(list, read_samples(path).ids)) != list(map(list, plain))
    assert changed or (name == "greedy" and "masked" in str(checkpoint))  # no mask is left for it to fill


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        *((1, "half a batch"), (4, "half a line"), (4, "half a batch"), (6, "nothing"), (6, "half a line")),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((1, "nothing"), (1, "half a line"), (4, "nothing"), (6, "half a batch"))
        ),
    ],
)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(monkeypatch, checkpoint, tmp_path, stop, left):
    """Ctrl-C in the middle of a batch, and what a crash may leave of the next one."""
    config = SampleConfig(str(checkpoint), n=7, steps=2, batch_size=3)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    sample_to_file(config, whole)
    calls = 0

    forward = DiT.forward

    def counted(model, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return forward(model, *arguments, **options)

    monkeypatch.setattr(DiT, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        sample_to_file(config, broken)
    written = broken.read_bytes()
    assert written.count(b"\n") in (1, 4, 7) and not json.loads(written.splitlines()[0])["tokendrift"]["complete"]
    next_line = whole.read_bytes().splitlines(keepends=True)[written.count(b"\n")]
    broken.write_bytes(written + {"nothing": b"", "half a line": next_line[:-9], "half a batch": next_line}[left])
    file = sample_to_file(config, broken)
    assert file.complete and file.count == 7
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "whole.jsonl"]


def test_a_finished_file_is_left_as_it_is(checkpoint, tmp_path):
    config, path = SampleConfig(str(checkpoint), n=3, steps=2), tmp_path / "s.jsonl"
    sample_to_file(config, path)
    before = path.stat().st_mtime_ns, path.read_bytes()
    assert sample_to_file(config, path).nfe["max"] <= 2
    assert before == (path.stat().st_mtime_ns, path.read_bytes())


@pytest.mark.parametrize("harm", ["a row is gone", "a row is no row", "a row is short", "a row too many", "other NFE"])
def test_a_file_that_was_changed_is_not_complete_and_is_mended(checkpoint, tmp_path, harm):
    config, path = SampleConfig(str(checkpoint), n=5, steps=2, batch_size=2), tmp_path / "s.jsonl"
    sample_to_file(config, path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    if harm == "a row is gone":
        del lines[-1]
    elif harm == "a row is no row":
        lines[2] = b"[3]\n"
    elif harm == "a row is short":
        lines[2] = b'{"ids": [1], "nfe": 2}\n'
    elif harm == "other NFE":
        lines[0] = lines[0].replace(b'"max": ', b'"max": 1')
    else:
        lines.append(lines[-1])
    path.write_bytes(b"".join(lines))
    assert not SampleFile(path, CheckpointSampler(config).settings).complete
    assert not json.loads(path.read_bytes().splitlines()[0])["tokendrift"]["complete"]
    sample_to_file(config, path)
    assert path.read_bytes() == whole


def test_a_file_is_complete_only_with_the_rows_that_it_announces(tmp_path):
    file = SampleFile(tmp_path / "s.jsonl", {"n": 3})
    file.append([{"ids": [1], "nfe": 1}])
    with pytest.raises(TokenDriftError, match="holds 1 of 3 samples"):
        file.finish()
    assert not SampleFile(tmp_path / "s.jsonl", {"n": 3}).complete


def test_one_process_at_a_time_writes_a_file(checkpoint, tmp_path):
    config, path = SampleConfig(str(checkpoint), n=2, steps=2), tmp_path / "s.jsonl"
    with (
        exclusive(tmp_path / ".s.jsonl.lock", path),
        pytest.raises(TokenDriftError, match=r"s\.jsonl is in use by process"),
    ):
        sample_to_file(config, path)
    assert not path.exists()
    assert sample_to_file(config, path).complete


def test_other_settings_and_other_weights_are_refused(run, backbone, tmp_path):
    folder, path, process = tmp_path / "model", tmp_path / "s.jsonl", UniformDiffusion(9)
    save_denoiser(backbone(vocab_size=9, time_conditioning=True), folder, process)
    assert run(folder, "--steps", 2, "-n", 2, "-o", path).exit_code == 0
    before = path.read_bytes()
    result = run(folder, "--steps", 3, "-n", 4, "-o", path)
    assert result.exit_code == 2
    assert "was begun with other settings" in result.stderr
    assert "steps: 2 there, 3 now" in result.stderr and "n: 2 there, 4 now" in result.stderr
    save_denoiser(backbone(vocab_size=9, time_conditioning=True, seed=1), folder, process)
    result = run(folder, "--steps", 2, "-n", 2, "-o", path)
    assert result.exit_code == 2 and "weights: " in result.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"text\n", b"[1]\n", b'{"ids": [1]}\n', b'{"tokendrift": 3}\n', b"\xff\xfe\n"])
def test_a_file_of_another_kind_is_not_touched(checkpoint, tmp_path, content):
    path = tmp_path / "s.jsonl"
    path.write_bytes(content)
    with pytest.raises(TokenDriftError, match="is not a file of samples of this command"):
        sample_to_file(SampleConfig(str(checkpoint), steps=2), path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "all samplers except first-hitting require steps"),
        (["--steps", "2", "--sampler", "first-hitting"], "all samplers except first-hitting require steps"),
        (["--steps", "2", "--sampler", "ddpm"], "sampler must be one of ancestral"),
        (["--steps", "2", "--dtype", "int8"], "dtype must be one of"),
        (["--steps", "2", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["--steps", "2", "--temperature", "0"], "temperature must be a finite number above 0"),
        (["--steps", "2", "--prefix", "the"], "the checkpoint has no tokenizer"),
        (["--steps", "2", "--prefix", "the " * 9, "--tokenizer", str(TOKENIZER)], "a sample has only 8"),
        (["--steps", "2", "--length", "20", "--stride", "8"], "stride must be below window"),
        (["--steps", "2", "--length", "100000000"], "length must be at most 1,000,000"),
        (["--steps", "2", "-n", "10000000", "--length", "1000000"], "more than the 4,294,967,296 tokens of a file"),
        (["--steps", "1000000000"], "steps must be at most 1,000,000"),
        (["--steps", "2", "--seed", str(2**64)], "seed must be at most"),
    ],
)
def test_bad_options_are_one_message_and_no_file(run, checkpoint, tmp_path, options, message):
    result = run(checkpoint, "-n", 2, "-o", tmp_path / "s.jsonl", *options)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_has_tokens_of_the_model_alone(run, backbone, tmp_path, kind):
    process = MaskedDiffusion(1024, 10) if kind == "masked" else UniformDiffusion(8)
    save_denoiser(backbone(vocab_size=process.vocab_size), tmp_path / "model", process)
    options = ("--steps", 2, "--prefix", "*", "--tokenizer", TOKENIZER, "-o", tmp_path / "s.jsonl")
    result = run(tmp_path / "model", *options)
    assert result.exit_code == 2 and "prefix contains id 10, which is the mask" in result.stderr
    assert not (tmp_path / "s.jsonl").exists()


def test_a_place_that_cannot_be_written_is_one_message(run, checkpoint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run(checkpoint, "--steps", 2, "-n", 2, "-o", tmp_path / "file" / "s.jsonl")
    assert result.exit_code == 2 and "cannot be written" in result.stderr and "Traceback" not in result.output


def test_help_names_the_options(run):
    shown = run("--help").stdout
    for option in (
        "--steps",
        "--sampler",
        "--prefix",
        "--noise-removal",
        "--top-p",
        "--seed",
        "--revision",
        "--output",
    ):
        assert option in shown


def test_samplers_have_names():
    assert named_sampler("first-hitting") == FirstHitting()
    assert named_sampler("remdm-conf") == ReMDM("conf")
    assert named_sampler("remdm-loop", eta=0.1) == remdm_loop(0.1)
    assert named_sampler("psi:pure-pc,constant-0.3,pure-posterior,linear-constant-linear-0.5") == Psi(
        "pure-pc", "constant-0.3", "pure-posterior", profile="linear-constant-linear-0.5"
    )
    for name in ("psi", "psi:pure-pc", "remdm"):
        with pytest.raises(TokenDriftError, match="sampler must be one of"):
            named_sampler(name)


def test_appending_and_keeping(tmp_path):
    file = SampleFile(tmp_path / "s.jsonl", {"seed": 0})
    file.append([{"ids": [1], "nfe": 1}, {"ids": [2], "nfe": 3}, {"ids": [3], "nfe": 2}])
    file.keep(2)
    file.finish()
    again = SampleFile(tmp_path / "s.jsonl", {"seed": 0})
    assert (again.count, again.complete, again.nfe) == (2, True, {"mean": 2.0, "max": 3})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_control_c_on_a_shipped_model(name, tmp_path):
    """The real command, a real signal: what is written stays, and the second call ends with the same bytes."""
    path, whole = tmp_path / "s.jsonl", tmp_path / "whole.jsonl"
    arguments = [str(PRETRAINED / name), "--steps", "16", "-n", "120", "--batch-size", "8", "--prefix", "Return the"]
    # A shell may start background commands with SIGINT ignored; the handler is the one of an interactive run.
    handler = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{handler}; from tokendrift import cli; cli.main()"
    command = [sys.executable, "-c", code, "sample", *arguments, "--tokenizer", str(TOKENIZER), "-o"]
    process = subprocess.Popen([*command, str(path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") > 8) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "finished batches are kept" in errors and "Traceback" not in errors
    assert 8 < path.read_bytes().count(b"\n") < 121
    for target in (path, whole):
        subprocess.run([*command, str(target)], check=True, capture_output=True)
    assert path.read_bytes() == whole.read_bytes()
    assert len(Path(path).read_text(encoding="utf-8").splitlines()) == 121


def test_a_sampler_of_ones_own_has_a_name_in_the_command(monkeypatch, run, checkpoint, tmp_path):
    class Slow:
        def __call__(self, chain, steps):
            for _ in range(2):
                yield from Ancestral()(chain, steps)

    monkeypatch.setitem(SAMPLERS, "slow", lambda eta: Slow())
    monkeypatch.setitem(SAMPLERS, "picky", lambda eta, first, last="end": Slow())
    result = run(checkpoint, "--steps", 2, "-n", 2, "--sampler", "slow", "-o", tmp_path / "s.jsonl")
    assert result.exit_code == 0, result.output
    with pytest.raises(TokenDriftError, match=r"sampler must be one of ancestral, .*slow, picky:FIRST\."):
        named_sampler("picky")


def test_a_file_begun_on_the_cpu_by_name_is_the_same_as_by_default(checkpoint, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the default device is a GPU here")
    assert SampleConfig(str(checkpoint), steps=2) == SampleConfig(str(checkpoint), steps=2, device="cpu")
