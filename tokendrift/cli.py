"""The command ``tokendrift``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from tokendrift.errors import TokenDriftError
from tokendrift.sampling.named import sampler_names
from tokendrift.sampling.to_file import SampleConfig
from tokendrift.training.config import setting_help

try:
    import typer
    from rich.console import Console

    from tokendrift.options import options_of
except ImportError as error:
    raise SystemExit(f"tokendrift: {error}; the command needs the extra 'all': pip install 'tokendrift[all]'") from None

JudgeOption = Annotated[str, typer.Option(help="Judge: hub name or folder of a causal language model.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Drifting refinement of discrete diffusion LMs.")


@app.callback()
def _root() -> None:
    """Drifting refinement of discrete diffusion language models (arXiv 2605.19470)."""


@app.command()
def demo(
    process: Annotated[
        str, typer.Option(help="Corruption process of the model: uniform (as DUO) or masked (as MDLM).")
    ] = "uniform",
    objective: Annotated[
        str, typer.Option(help="What refines the model: drift (the loss of the paper) or pairs (token pairs).")
    ] = "drift",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file to refine on; repeatable. Default: the documentation inside CPython."),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(help="Folder with the models masked, uniform and judge. Default: those of the package."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of each refinement.")] = None,
    window: Annotated[
        int, typer.Option(min=1, help="Tokens that the drift pools into one feature; the paper pools 32, a sequence.")
    ] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Random seed. Default: 0.")] = 0,
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Number of successive seeds to run with, each in a folder of its own."),
    ] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run for less than a minute, to see that everything works.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Train longer, and sample more and at 4 to 32 function evaluations.")
    ] = False,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", hidden=True)] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for report.html, results.json, the refined models and their samples.")
    ] = Path("demo-output"),
) -> None:
    """Refine a small model on real English and show what that does to sampling in few steps.

    The model is refined twice, by TokenDrift and by its own objective, and both results are sampled and compared at
    equal entropy. After an interruption, run the same command again to go on.
    """
    with plain_errors():
        from tokendrift.demo import PRETRAINED, DemoConfig, run_demo
        from tokendrift.demo.demonstration import show

        sizes = _demo_size(quick, full, from_scratch)
        console = Console()
        # The table needs more than the 80 columns that rich assumes for a pipe.
        console.width = min(console.width, 100) if console.is_terminal else 100
        for number in range(seed, seed + seeds):
            options = sizes if steps is None else sizes | {"steps": steps}
            config = DemoConfig(
                process=process,
                objective=objective,
                text=tuple(text or ()),
                models=models or PRETRAINED,
                output=output if seeds == 1 else output / f"seed-{number}",
                window=window,
                seed=number,
                **options,
            )
            show(run_demo(config, Console(stderr=True)), config, console)


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
        raise fail("--quick and --full exclude each other.", "Pass one of them.")
    return SIZES["quick" if quick else "full" if full else "default"]


def _setting(name: str, *flags: str) -> Any:
    """Return the option of a setting of `refine`, whose help is that of the configuration."""
    return typer.Option(*flags, help=setting_help(name), show_default=False)


@app.command()
def refine(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint to refine: hub id, folder or file. Required, unless --config or --preset names one."
        ),
    ] = None,
    text: Annotated[list[str] | None, _setting("text")] = None,
    dataset: Annotated[str | None, _setting("dataset")] = None,
    tokenizer: Annotated[str | None, _setting("tokenizer")] = None,
    output: Annotated[str | None, _setting("output")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings to start from: mdlm-owt or duo-owt (the paper's), or pairs (the objective of token pairs). "
            "Default: none."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings, such as config.toml of an earlier run. Default: none.")
    ] = None,
    objective: Annotated[str | None, _setting("objective")] = None,
    steps: Annotated[int | None, _setting("steps")] = None,
    batch_size: Annotated[int | None, _setting("batch_size")] = None,
    micro_batch: Annotated[int | None, _setting("micro_batch")] = None,
    learning_rate: Annotated[float | None, _setting("learning_rate")] = None,
    judge: Annotated[str | None, _setting("judge")] = None,
    seed: Annotated[int | None, _setting("seed")] = None,
    baseline: Annotated[bool | None, _setting("baseline", "--baseline")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting, see --show; lists are separated by commas. Repeatable.",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print all settings as a TOML file and exit, without training.")
    ] = False,
) -> None:
    """Train a released or saved checkpoint further, with TokenDrift or another objective.

    Run the same command again to resume after an interruption. Settings of --set and of flags override those of
    --config, which override those of --preset.

    The device is chosen by Accelerate: cuda if available, else mps, else cpu. Set ACCELERATE_USE_CPU=true to use the
    CPU, and CUDA_VISIBLE_DEVICES to choose among GPUs. For several devices: accelerate launch -m tokendrift.cli
    refine ...
    """
    flags = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("preset", "config", "settings", "show")
    }
    with plain_errors("run the same command again to resume from the last checkpoint"):
        from tokendrift.training import evaluation_table, make_config, parse_settings
        from tokendrift.training import refine as train

        made = make_config(preset=preset, file=config, values=flags | parse_settings(settings or []))
        if show:
            typer.echo(made.as_toml(), nl=False)
            return
        refined = train(made)
        from accelerate import PartialState

        if PartialState().is_main_process:
            if refined.evaluations:
                Console().print(evaluation_table(refined.evaluations))
            typer.echo(f"refined model: {refined.folder}")


@app.command()
@options_of(
    SampleConfig,
    n={"names": ("-n",), "min": 1},
    steps={"min": 1},
    sampler={"help": f"Sampler: {', '.join(sampler_names())}. Default: ancestral."},
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

    Batches are written as they are drawn. After an interruption, the same command resumes at the first batch that is
    not complete and ends with the same bytes.
    """
    with plain_errors("finished batches are kept: run the same command again to go on"):
        from rich.progress import Progress

        from tokendrift.sampling.to_file import sample_to_file

        config = SampleConfig(**options)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"sampling on {config.device}", total=config.n)
            file = sample_to_file(config, output, progress=lambda done: bar.update(task, completed=done))
    calls = f"{file.nfe['mean']:.1f} function evaluations each"
    typer.echo(f"{file.count} samples in {output}, {calls}, drawn on {config.device}")


@app.command()
def doctor(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, folder, safetensors file or Lightning .ckpt.")],
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text file to measure the NELBO on. Default: Python's own documentation."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer: a tokenizer.json, a folder or a hub id. Default: the checkpoint's own, or GPT-2's for a "
            "vocabulary of its size."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id. Default: the main branch.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens of text to measure the NELBO on.")] = 16_384,
    device: Annotated[
        str, typer.Option(help="Device such as cpu or cuda:0; auto takes cuda if it is available, else cpu.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check a checkpoint: weights, vocabulary, tokenizer, mask id, and the NELBO on text.

    The exit code is 0 if nothing is wrong, 1 if something is, and 2 if the checkpoint cannot be examined.
    """
    with plain_errors():
        from tokendrift.doctor import diagnose

        with Console(stderr=True).status("examining") as status:
            found = diagnose(
                checkpoint,
                text=text,
                tokenizer=tokenizer,
                revision=revision,
                tokens=tokens,
                device=device,
                progress=status.update,
            )
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        console = Console()
        for table in found.tables():
            console.print(table)
    if not found.healthy:
        raise typer.Exit(1)


@app.command()
def probe(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, folder, safetensors file or Lightning .ckpt.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file: prompts and unigram frequencies are taken from it.")],
    compare: Annotated[
        str | None, typer.Option(help="Refined checkpoint to probe beside the first. Default: none.")
    ] = None,
    judge: JudgeOption = "gpt2-large",
    judge_reads_ids: Annotated[
        bool,
        typer.Option(
            "--judge-reads-ids", help="The judge has the denoiser's vocabulary and reads token ids instead of text."
        ),
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer of the denoiser: tokenizer.json, folder or hub id. Default: the checkpoint's own, or "
            "GPT-2's for a vocabulary of its size."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Number of prompts, evenly spread over the text.")] = 64,
    prompt_length: Annotated[
        int | None, typer.Option(min=1, help="Length of a prompt in tokens. Default: 64, or what the model leaves.")
    ] = None,
    positions: Annotated[
        int | None,
        typer.Option(min=1, help="Noisy positions after each prompt. Default: 32, or half of the model's length."),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws for each prompt, averaged.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of noise and draws.")] = 0,
    device: Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda:0.")] = "cpu",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write all numbers to. Default: none.")
    ] = None,
) -> None:
    """Probe what a denoiser predicts far from its context, and what drawing tokens in parallel costs.

    With --compare, the probes also show whether refinement closes the marginal trap by more than a lower sampling
    temperature does.
    """
    options = {name: value for name, value in locals().items() if name not in ("checkpoint", "text", "output")}
    with plain_errors():
        from tokendrift.files import write_atomically
        from tokendrift.probes import probe_checkpoints

        with Console(stderr=True).status("probing") as status:
            report = probe_checkpoints(checkpoint, text, progress=status.update, **options)
        if output is not None:
            write_atomically(output, json.dumps(report.to_dict(), indent=2) + "\n")
        console = _console(130)
        for table in report.tables():
            console.print(table)
        for sentence in report.sentences():
            console.print(sentence, highlight=False, markup=False, soft_wrap=True)


@app.command()
def evaluate(
    real: Annotated[
        str, typer.Option(help="Real text that neither model nor judge was trained on: UTF-8 text or a samples file.")
    ],
    samples: Annotated[
        list[str] | None,
        typer.Argument(help="Samples files, FILE or NAME=FILE: .jsonl of `tokendrift sample`, or UTF-8 text."),
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="Checkpoint to sample, PATH or NAME=PATH; repeatable.")
    ] = None,
    nfe: Annotated[
        list[int] | None, typer.Option(min=1, help="Function evaluations at which checkpoints are sampled; repeatable.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=2, help="Number of samples of each checkpoint and NFE.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature of the checkpoints.")] = 1.0,
    baseline: Annotated[
        str | None, typer.Option(help="Name of a checkpoint with which all sets are compared at equal entropy.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Folder for the samples of checkpoints; later runs use them again.")
    ] = None,
    training_text: Annotated[str | None, typer.Option(help="UTF-8 file of training text, to find copies.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer of the denoisers: tokenizer.json, folder or hub id. Default: their own."),
    ] = None,
    judge: JudgeOption = "gpt2-large",
    judge_tokenizer: Annotated[str | None, typer.Option(help="Tokenizer of the judge. Default: its own.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the judge.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the judge: float32 or bfloat16.")] = "float32",
    protocol: Annotated[str, typer.Option(help="Protocol of Gen.-PPL: mdlm, sedd, sdtt, bd3 or all.")] = "mdlm",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what cannot be read or scored, and report it.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of sampling and of the bootstrap.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of full length that the judge reads at once.")] = 8,
    device: Annotated[str, typer.Option(help="Device to sample and to judge on, such as cpu or cuda:0.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file to write every number to.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="CSV file to write the table to.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="HTML file to write a page with table, plots and samples to.")
    ] = None,
) -> None:
    """Measure samples beside real text: Gen.-PPL with its entropies and intervals, and the guard's verdict.

    The exit code is 0 if everything was measured, whatever the guard says, and 2 for bad input.
    """
    options = {name: value for name, value in locals().items() if not name.endswith("_file")}
    lists = {name: tuple(options[name] or ()) for name in ("samples", "checkpoint", "nfe")}
    with plain_errors("with --keep, samples of checkpoints are kept: run the same command again to go on"):
        from tokendrift.evaluation.plots import require_matplotlib
        from tokendrift.evaluation.report import EvaluateConfig, evaluate_files

        config = EvaluateConfig(**(options | lists))
        if html_file is not None:
            require_matplotlib()
        with Console(stderr=True).status("starting") as status:
            report = evaluate_files(config, progress=status.update)
        console = _console(160)
        console.print(report.table())
        for sentence in (*report.guard(), *report.differences(), *report.at_equal_entropy()):
            console.print(sentence, highlight=False, markup=False, soft_wrap=True)
        _write_report(report, json_file, csv_file, html_file)


def _write_report(report: Any, json_file: Path | None, csv_file: Path | None, html_file: Path | None) -> None:
    from tokendrift.evaluation.report import as_json, page
    from tokendrift.files import write_atomically

    if json_file is not None:
        write_atomically(json_file, json.dumps(as_json(report.to_dict()), indent=2, allow_nan=False) + "\n")
    if csv_file is not None:
        write_atomically(csv_file, report.to_csv())
    if html_file is not None:
        write_atomically(html_file, page(report))


def _console(width: int) -> Console:
    """Return the terminal, or a console of this width if the output is a pipe, for which rich assumes 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


@contextmanager
def plain_errors(hint: str = "finished stages are kept: run the same command again to go on") -> Iterator[None]:
    """Turn bad input into one message without a traceback, and Ctrl-C into a hint."""
    try:
        yield
    except TokenDriftError as error:
        typer.echo(f"tokendrift: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; {hint}", err=True)
        raise typer.Exit(130) from None


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
