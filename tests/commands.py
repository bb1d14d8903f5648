"""The command line as the tests call it."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from tokendrift import cli


def invoke(*arguments: object, columns: int = 200) -> Any:
    """Call the command ``tokendrift`` with arguments; return exit code, standard output and standard error."""
    return CliRunner().invoke(cli.app, [str(part) for part in arguments], env={"COLUMNS": str(columns), "TERM": "dumb"})
