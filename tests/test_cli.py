"""The command: help, bad input in one message, interruption with a hint."""

import errno
import runpy
import sys
from pathlib import Path

import pytest
import torch
from commands import invoke
from typer.main import get_command

import tokendrift
from tokendrift import TokenDriftError, cli
from tokendrift.evaluation.judge import load_judge
from tokendrift.models import load_denoiser
from tokendrift.models.hub import check_local
from tokendrift.models.tokenizer import load_tokenizer


@pytest.fixture
def run():
    """Call the command with arguments; return exit code, standard output and standard error."""
    return invoke


def test_help_names_the_options(run):
    result = run("demo", "--help")
    assert result.exit_code == 0
    options = "--process --objective --text --models --steps --window --seed --seeds --quick --full --output"
    for option in options.split():
        assert option in result.stdout


def test_the_terminal_breaks_the_lines_of_the_help():
    from tokendrift.cli import app

    for command in app.registered_commands:
        assert "\n" not in command.help.replace("\n\n", ""), command.callback


def test_the_command_offers_completion_to_the_shell(run):
    assert "--install-completion" in run("--help").stdout


def test_an_unknown_process_is_one_message(run, tmp_path):
    result = run("demo", "--process", "gaussian", "--output", str(tmp_path))
    assert result.exit_code == 2 and list(tmp_path.iterdir()) == []
    assert result.stderr.startswith("tokendrift: process must be one of 'uniform', 'masked'.")
    assert "Traceback" not in result.stderr


def test_a_missing_text_file_is_one_message(run, tmp_path):
    result = run("demo", "--text", str(tmp_path / "none.txt"), "--output", str(tmp_path / "out"))
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "cannot be read" in result.stderr


def test_training_from_scratch_names_the_script_that_does_it(run):
    result = run("demo", "--from-scratch")
    assert result.exit_code == 2 and "examples/study/pretrain.py" in result.stderr


def test_an_unknown_option_is_refused(run):
    assert run("demo", "--stepz", "3").exit_code == 2


def test_interruption_says_that_finished_stages_are_kept(run, monkeypatch, tmp_path):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokendrift.demo.demonstration.read_splits", interrupted)
    result = run("demo", "--output", str(tmp_path))
    assert result.exit_code == 130 and "finished stages are kept" in result.stderr


def test_the_version_is_printed_and_python_runs_the_package(run, monkeypatch, capsys):
    shown = run("--version").stdout
    assert shown.startswith(f"tokendrift {tokendrift.__version__}, torch {torch.__version__}, Python 3")
    monkeypatch.setattr(sys, "argv", ["tokendrift", "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("tokendrift", run_name="__main__")  # as `python -m tokendrift` does
    assert not left.value.code and capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("arguments", "question"),
    [
        (("refine", "--preset", "mdlm_owt"), "Did you mean 'mdlm-owt'?"),
        (("demo", "--process", "mask"), "Did you mean 'masked'?"),
        (("sample", "x", "-o", "y", "--sampler", "ancestal", "--steps", "2"), "Did you mean 'ancestral'?"),
        (("sample", "x", "-o", "y", "--dtype", "float3", "--steps", "2"), "Did you mean 'float32'?"),
    ],
)
def test_the_nearest_choice_is_suggested(run, arguments, question):
    result = run(*arguments)
    assert result.exit_code == 2 and question in result.stderr


@pytest.mark.parametrize(
    "name", ["./gone", "/gone/model", "runs/gone/model", "gone/model.safetensors", "gone.json", Path("gone")]
)
def test_a_local_name_that_does_not_exist_is_not_asked_of_the_hub(name):
    for what in ("checkpoint", "judge"):
        with pytest.raises(TokenDriftError, match=rf"{what} .*gone.* does not exist"):
            check_local(name, what)
    for known in ("gpt2", "s-sahoo/duo", "."):
        check_local(known, "tokenizer")


@pytest.mark.parametrize(
    "use",
    [
        lambda: load_judge("./gone"),
        lambda: load_tokenizer("gone/tokenizer.json"),
        lambda: load_denoiser("gone/model.safetensors"),
    ],
)
def test_every_reader_refuses_a_missing_file_at_once(use):
    with pytest.raises(TokenDriftError, match="does not exist"):
        use()


def test_commands_choose_their_device_alike():
    defaults = {
        command.name: option.default
        for command in get_command(cli.app).commands.values()
        for option in command.params
        if option.name == "device"
    }
    assert defaults == dict.fromkeys(("demo", "refine", "sample", "doctor", "probe", "evaluate"), "auto")


def test_names_reach_the_terminal_without_control_characters_and_their_markup_means_nothing(run, capsys):
    result = run("doctor", "./gone\x1b[2J")
    assert result.exit_code == 2 and "./gone\ufffd[2J does not exist" in result.output
    with cli._status("reading") as progress:
        progress("[/red]\x1b[2J")
    assert "\x1b[2J" not in capsys.readouterr().err
    console = cli.PlainConsole()
    with console.capture() as drawn:
        console.print("[/red][bold]a[/bold]\tb\x9b1m", soft_wrap=True)
    assert drawn.get().split() == ["[/red][bold]a[/bold]", "b\ufffd1m"]


def test_a_path_without_permission_is_one_message(run, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "locked/config.json")

    monkeypatch.setattr(cli, "diagnose", denied)
    result = run("doctor", "locked")
    assert result.exit_code == 2
    assert result.stderr.startswith("tokendrift: locked/config.json cannot be used: Permission denied.\n")


@pytest.mark.parametrize(
    ("place", "why"), [("folder", "it is a folder"), ("file/x.json", "file is a file"), ("folder/x.json", None)]
)
def test_an_output_that_cannot_be_written_is_found_before_the_work(run, tmp_path, place, why):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for command in (["probe", "gone", "--text", "gone"], ["evaluate", "gone", "--real", "gone"]):
        result = run(*command, "--json", tmp_path / place)
        assert result.exit_code == 2
        assert ("cannot be written" in result.stderr) == (why is not None) and (why or "gone") in result.stderr
