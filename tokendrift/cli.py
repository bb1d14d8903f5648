"""The command ``tokendrift``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from tokendrift.errors import TokenDriftError

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit(f"tokendrift: {error}; the command needs the extra 'all': pip install 'tokendrift[all]'") from None

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Drifting refinement of discrete diffusion LMs.")


@app.callback()
def _root() -> None:
    """Drifting refinement of discrete diffusion language models (arXiv 2605.19470)."""


@app.command()
def demo(
    process: Annotated[str, typer.Option(help="Corruption process: uniform (DUO) or masked (MDLM).")] = "uniform",
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text files instead of Python's own documentation; repeatable.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of each continuation.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat the continuations with this many seeds.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps and samples: minutes instead of a quarter hour.")
    ] = False,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Train tokenizer, judge and base instead of loading the shipped ones."),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for report.html, results.json and finished stages.")] = Path(
        "demo-output"
    ),
) -> None:
    """Refine a small real model on real text and show what the loss does to few-step generation.

    Continues one base twice, by its own objective and by TokenDrift, samples both at 4 to 32 function
    evaluations and prints one table. Finished stages are kept below the output folder and reused.
    """
    from tokendrift.demo.report import caption, sentences, table, write
    from tokendrift.demo.run import Demo
    from tokendrift.demo.stages import DemoConfig

    console = Console()
    if not console.is_terminal:
        console = Console(width=110)  # the table is wider than the 80 columns that rich assumes for a pipe
    options: dict[str, Any] = {"process": process, "seeds": seeds}
    if quick:
        options |= {"steps": QUICK_STEPS, "samples": 256}
    if steps is not None:
        options["steps"] = steps
    config = DemoConfig(**options)
    run = Demo(config, text or [], output, from_scratch=from_scratch, console=console)
    corpus, judge, base = run.prepare()
    outcomes = []
    for seed in range(config.seeds):
        outcomes.append(run.run_seed(corpus, judge, base, seed))
        console.print(
            table(outcomes[-1], f"seed {seed}" if seeds > 1 else "What TokenDrift does to few-step generation")
        )
        console.print(caption(config, outcomes[-1]), style="dim", highlight=False)
        for sentence in sentences(outcomes[-1]):
            console.print(sentence, highlight=False)
        report = write(output, config, outcomes)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


QUICK_STEPS = 300


def main() -> None:
    """Run the command; bad input ends in one message instead of a traceback, Ctrl-C in a hint."""
    try:
        app(standalone_mode=False)
    except TokenDriftError as error:
        raise SystemExit(f"tokendrift: {error}") from None
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit("\ninterrupted; finished stages are kept: run the same command again to go on") from None
    except typer.BadParameter as error:
        raise SystemExit(f"tokendrift: {error.format_message()}") from None


if __name__ == "__main__":
    main()
