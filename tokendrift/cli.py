"""The command ``tokendrift``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
        from tokendrift._checks import fail
        from tokendrift.demo import PRETRAINED, DemoConfig, run_demo
        from tokendrift.demo.demonstration import SIZES, show

        if from_scratch:
            raise fail(
                "--from-scratch is no longer part of the demo.",
                "Train the models with python examples/study/pretrain.py FOLDER, then pass --models FOLDER.",
            )
        if quick and full:
            raise fail("--quick and --full exclude each other.", "Pass one of them.")
        sizes = SIZES["quick" if quick else "full" if full else "default"]
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


@app.command()
def refine(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Hub id, folder or file; may stand in --config or come with --preset.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text or JSON-lines file; repeatable.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hugging Face dataset: name or folder.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the refined model and its checkpoints.")] = None,
    preset: Annotated[str | None, typer.Option(help="mdlm-owt or duo-owt: the paper's values; pairs: ours.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="drift, continuation, combined, pairs, mirror-kl or mirror-mse.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step, over all devices.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences a forward call on one device.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate of AdamW.")] = None,
    judge: Annotated[str | None, typer.Option(help="Causal language model behind Gen.-PPL.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of order, noise, dropout and evaluation.")] = None,
    baseline: Annotated[
        bool | None, typer.Option("--baseline", help="Also train the matched continuation, and show both.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeatable.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the settings as TOML and stop.")] = False,
) -> None:
    """Train a released or saved checkpoint further, with TokenDrift or its own objective.

    Run the same command again to go on after an interruption. For several devices: accelerate launch -m
    tokendrift.cli refine ...
    """
    with plain_errors("run the same command again to go on from the last checkpoint"):
        from tokendrift.training import evaluation_table, make_config, parse_settings
        from tokendrift.training import refine as train

        flags = {
            "checkpoint": checkpoint, "text": text, "dataset": dataset, "output": output, "objective": objective,
            "steps": steps, "batch_size": batch_size, "micro_batch": micro_batch, "learning_rate": learning_rate,
            "judge": judge, "seed": seed, "baseline": baseline,
        }  # fmt: skip
        values = {name: value for name, value in flags.items() if value is not None}
        made = make_config(preset=preset, file=config, values=values | parse_settings(settings or []))
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
def sample(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, folder, safetensors file or Lightning .ckpt.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file; an unfinished one is gone on with.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Samples.")] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="Reverse steps; not with first-hitting.")] = None,
    sampler: Annotated[
        str,
        typer.Option(help="ancestral, analytic, first-hitting, remdm-cap|rescale|conf|loop or psi:HIGH,MIDDLE,LOW."),
    ] = "ancestral",
    eta: Annotated[float, typer.Option(help="Chance of remasking (ReMDM).")] = 0.02,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw within the nucleus of this probability.")] = 1.0,
    nucleus: Annotated[str, typer.Option(help="keep or drop the token that crosses top-p.")] = "keep",
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the likeliest k tokens.")] = None,
    noise_removal: Annotated[str, typer.Option(help="ancestral, greedy or none.")] = "ancestral",
    prefix: Annotated[str | None, typer.Option(help="Text that every sample begins with.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens a sample; the model's own by default.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="New tokens a window, past the model's length; half of it by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the run; sample i has its own numbers.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples drawn together.")] = 32,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, folder or hub id; by default the checkpoint's, or GPT-2's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the parameters: float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to sample.")] = "cpu",
) -> None:
    """Draw samples from a checkpoint into a file.

    Batches are written as they come. After an interruption the same command goes on, and ends with the same bytes.
    """
    options = {name: value for name, value in locals().items() if name != "output"}
    with plain_errors("finished batches are kept: run the same command again to go on"):
        from rich.progress import Progress

        from tokendrift.sampling.to_file import SampleConfig, sample_to_file

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("sampling", total=n)
            file = sample_to_file(
                SampleConfig(**options), output, progress=lambda done: bar.update(task, completed=done)
            )
    typer.echo(f"{file.count} samples in {output}, {file.nfe['mean']:.1f} function evaluations each")


@app.command()
def doctor(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, folder, safetensors file or Lightning .ckpt.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text for the NELBO instead of Python's own documentation.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, folder or hub id; by default the checkpoint's, or GPT-2's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text to measure the NELBO on.")] = 16_384,
    device: Annotated[str, typer.Option(help="Where to measure.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check a checkpoint: weights, vocabulary, tokenizer, mask id, and the NELBO on text.

    Exit code 0 if nothing is wrong, 1 if something is, 2 if it cannot be examined.
    """
    with plain_errors():
        from tokendrift.doctor import diagnose

        options: dict[str, Any] = {"text": text, "tokenizer": tokenizer, "revision": revision, "tokens": tokens}
        with Console(stderr=True).status("examining") as status:
            report = diagnose(checkpoint, device=device, progress=status.update, **options)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        console = Console()
        for table in report.tables():
            console.print(table)
    if not report.healthy:
        raise typer.Exit(1)


@app.command()
def probe(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, folder, safetensors file or Lightning .ckpt.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text for prompts and unigrams.")],
    compare: Annotated[str | None, typer.Option(help="A refined checkpoint, probed side by side.")] = None,
    judge: Annotated[str, typer.Option(help="Causal LM of transformers: hub name or folder.")] = "gpt2-large",
    judge_reads_ids: Annotated[
        bool, typer.Option("--judge-reads-ids", help="The judge has the denoiser's vocabulary: nothing is decoded.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, folder or hub id; by default the checkpoint's, or GPT-2's.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts, spread over the text.")] = 64,
    prompt_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt.")] = None,
    positions: Annotated[int | None, typer.Option(min=1, help="Noisy positions appended.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws for each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of noise and draws.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all numbers to this JSON file.")] = None,
) -> None:
    """Probe what a denoiser predicts far from its context, and what drawing in parallel breaks.

    With --compare: does refinement close the trap, beyond what a lower temperature does?
    """
    with plain_errors():
        from tokendrift.files import write_atomically
        from tokendrift.probes import probe_checkpoints

        with Console(stderr=True).status("probing") as status:
            report = probe_checkpoints(
                checkpoint,
                text,
                compare=compare,
                judge=judge,
                judge_reads_ids=judge_reads_ids,
                tokenizer=tokenizer,
                prompts=prompts,
                prompt_length=prompt_length,
                positions=positions,
                draws=draws,
                seed=seed,
                device=device,
                progress=status.update,
            )
        if output is not None:
            write_atomically(output, json.dumps(report.to_dict(), indent=2) + "\n")
        console = Console()
        if not console.is_terminal:
            console = Console(width=130)  # the tables are wider than the 80 columns that rich assumes for a pipe
        for table in report.tables():
            console.print(table)
        for sentence in report.sentences():
            console.print(sentence, highlight=False, markup=False, soft_wrap=True)


@app.command()
def evaluate(
    real: Annotated[
        str, typer.Option(help="Real text that nothing was trained on: UTF-8 text, or samples of a .jsonl file.")
    ],
    samples: Annotated[
        list[str] | None, typer.Argument(help="Samples files (.jsonl of `tokendrift sample`, .txt), FILE or NAME=FILE.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="Checkpoint to sample, PLACE or NAME=PLACE; repeatable.")
    ] = None,
    nfe: Annotated[
        list[int] | None, typer.Option(min=1, help="Function evaluations to sample checkpoints at; repeatable.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=2, help="Samples of each checkpoint and NFE.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of sampling checkpoints.")] = 1.0,
    baseline: Annotated[
        str | None, typer.Option(help="Name of a checkpoint: compare all sets with it at equal entropy.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Folder for the samples of checkpoints, used again next time.")
    ] = None,
    training_text: Annotated[str | None, typer.Option(help="UTF-8 text, to find copies.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of the denoisers: tokenizer.json, folder or hub id; by default their own.")
    ] = None,
    judge: Annotated[str, typer.Option(help="Causal LM of transformers: hub name or folder.")] = "gpt2-large",
    judge_tokenizer: Annotated[str | None, typer.Option(help="Instead of the judge's own.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the judge.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the judge: float32 or bfloat16.")] = "float32",
    protocol: Annotated[str, typer.Option(help="mdlm (also DUO, ReMDM), sedd, sdtt, bd3 or all.")] = "mdlm",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what cannot be read or scored, and name it.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling checkpoints and of the bootstrap.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of full length the judge reads at once.")] = 8,
    device: Annotated[str, typer.Option(help="Where to sample and to judge.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the table to this file.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write one page with table, plots and samples to this file.")
    ] = None,
) -> None:
    """Measure samples beside real text: Gen.-PPL with its entropies, intervals, and what looks bought.

    Exit code 0 if everything was measured, whatever the guard says, and 2 for bad input.
    """
    options = {
        "samples": tuple(samples or ()), "checkpoint": tuple(checkpoint or ()), "nfe": tuple(nfe or ()), "n": n,
        "temperature": temperature, "baseline": baseline, "keep": keep, "real": real, "training_text": training_text,
        "tokenizer": tokenizer, "judge": judge, "judge_tokenizer": judge_tokenizer, "revision": revision,
        "dtype": dtype, "protocol": protocol, "skip_bad": skip_bad, "seed": seed, "batch_size": batch_size,
        "device": device,
    }  # fmt: skip
    with plain_errors("with --keep, samples of checkpoints are kept: run the same command again to go on"):
        from tokendrift.evaluation.report import EvaluateConfig, as_json, evaluate_files, page
        from tokendrift.evaluation.report.html import require_matplotlib
        from tokendrift.files import write_atomically

        config = EvaluateConfig(**options)  # type: ignore[arg-type]
        if html_file is not None:
            require_matplotlib()
        with Console(stderr=True).status("starting") as status:
            report = evaluate_files(config, progress=status.update)
        console = Console()
        if not console.is_terminal:
            console = Console(width=140)  # the table is wider than the 80 columns that rich assumes for a pipe
        console.print(report.table())
        for sentence in (*report.guard(), *report.differences(), *report.at_equal_entropy()):
            console.print(sentence, highlight=False, markup=False, soft_wrap=True)
        if json_file is not None:
            write_atomically(json_file, json.dumps(as_json(report.to_dict()), indent=2, allow_nan=False) + "\n")
        if csv_file is not None:
            write_atomically(csv_file, report.to_csv())
        if html_file is not None:
            write_atomically(html_file, page(report))


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
