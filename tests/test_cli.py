"""The command: help, bad input in one message, interruption with a hint."""

import pytest
from typer.testing import CliRunner

from tokendrift import cli


@pytest.fixture
def run():
    """Call the command with arguments; returns exit code, standard output and standard error."""
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def test_help_names_the_options(run):
    result = run("demo", "--help")
    assert result.exit_code == 0
    options = "--process --objective --text --models --steps --window --seed --seeds --quick --full --output"
    for option in options.split():
        assert option in result.stdout


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
