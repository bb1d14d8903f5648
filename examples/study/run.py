"""The study of a language whose law is known: what each way of training does for a masked and a uniform-state model.

    python examples/study/run.py --output study-output

Two processes, three seeds of the main comparison and one of the ablations, about an hour on two cores. Every finished
part is a folder below the output, and the same command continues where it was stopped. At the end, and whenever asked
by ``--report``, everything that is finished is collected into ``results.json``, tables and plots.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import markov
import report
import torch
import typer
from arms import BASE, CONTINUATION, LONGER, MAIN, OUR_ABLATIONS, PAPER_ABLATIONS, Arm
from cache import cached, place_of

from tokendrift.models import load_denoiser, save_denoiser

SEEDS = (0, 1, 2)
RESULTS = "results.json"
QUICK = markov.Sizes(base_share=0.1, steps=60, ablation_steps=20, samples=512)


class Plan(NamedTuple):
    """What a worker needs to know."""

    output: Path
    quick: bool


class Cell(NamedTuple):
    """One trained and measured model.

    Attributes:
        kind: Process.
        arm: How it was trained.
        seed: Of text, times, noise and samples.
        main: Whether it belongs to the main comparison, which runs longer and is measured in full.
    """

    kind: str
    arm: Arm
    seed: int
    main: bool

    def __str__(self) -> str:
        return f"{self.kind}: {self.arm.name}, seed {self.seed}" + ("" if self.main else ", short")


@cache
def instrument(plan: Plan) -> markov.Markov:
    """Return the language with its bases, read once a process."""
    return markov.Markov(plan.output / "parts" / "markov", QUICK if plan.quick else markov.Sizes())


def cells(kinds: Iterable[str] = ("masked", "uniform"), seeds: Iterable[int] = SEEDS) -> Iterator[Cell]:
    """Yield all cells, continuations first: the others are measured against them."""
    for main in (True, False):
        yield from (Cell(k, CONTINUATION, s, main) for k in kinds for s in (seeds if main else (0,)))
    yield from (Cell(k, BASE, 0, True) for k in kinds)
    for seed in seeds:
        yield from (Cell(k, arm, seed, True) for k in kinds for arm in MAIN if arm != CONTINUATION)
    yield Cell("uniform", LONGER, 0, True)
    for arm in (*(arm for arm in MAIN if arm != CONTINUATION), *PAPER_ABLATIONS, *OUR_ABLATIONS):
        # Masked encoders are told no time.
        yield from (Cell(kind, arm, 0, False) for kind in kinds if kind != "masked" or not arm.encoder_time)


def stage(plan: Plan, cell: Cell) -> tuple[str, dict[str, Any]]:
    """Return the name and the key of a cell: what its result depends on, beside the constants of these files."""
    tool = instrument(plan)
    sizes = tool.sizes
    key = {"base": tool.base_key(cell.kind), "arm": cell.arm.key(), "seed": cell.seed, "steps": steps_of(tool, cell)}
    key |= {"sizes": [sizes.batch_size, sizes.learning_rate, sizes.samples], "full": cell.main}
    return f"{cell.kind}-{cell.arm.slug}", key


def steps_of(tool: Any, cell: Cell) -> int:
    """Return the optimiser steps of a cell."""
    return round((tool.sizes.steps if cell.main else tool.sizes.ablation_steps) * cell.arm.length)


def folder_of(plan: Plan, cell: Cell) -> Path:
    """Return the folder of a finished cell, training and measuring it first where it is missing."""
    tool = instrument(plan)
    steps = steps_of(tool, cell)

    def make(place: Path) -> None:
        began = time.perf_counter()
        baseline = None
        if cell.arm != CONTINUATION:
            theirs = folder_of(plan, cell._replace(arm=CONTINUATION))
            baseline = (load_denoiser(theirs)[0], json.loads((theirs / RESULTS).read_text(encoding="utf-8")))
        model, records = tool.train(cell.arm, cell.kind, cell.seed, steps)
        trained = time.perf_counter()
        full = cell.main or baseline is None
        found = tool.evaluate(model, cell.kind, cell.seed, baseline=baseline, full=full)
        found |= {"optimiser_steps": steps, "records": records, "training_seconds": trained - began}
        save_denoiser(model, place, tool.process(cell.kind))
        (place / RESULTS).write_text(json.dumps(found), encoding="utf-8")

    return cached(tool.folder, *stage(plan, cell), make)[0]


def work(plan: Plan, job: str | Cell) -> str:
    """Make one cell, or the base of a process, in a worker process; return what was made."""
    torch.set_num_threads(1)  # at this size, threads would only wait for one another
    if isinstance(job, Cell):
        folder_of(plan, job)
        return str(job)
    instrument(plan).base_folder(job)
    return f"base, {job}"


def main(
    output: Annotated[Path, typer.Option(help="Folder of everything that is made.")] = Path("study-output"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = max(1, os.cpu_count() or 1),
    only: Annotated[str, typer.Option(help="A word that a cell's name must contain.")] = "",
    quick: Annotated[bool, typer.Option(help="Minutes instead of hours: shows the machinery, not the method.")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="Collect what is finished and stop.")] = False,
) -> None:
    """Run the study of the known language, or what is left of it."""
    plan = Plan(output.absolute(), quick)
    wanted = [] if only_report else [cell for cell in cells() if only in str(cell)]
    waves: list[list[str | Cell]] = [
        [] if only_report else list(markov.Markov.kinds),
        [cell for cell in wanted if cell.arm == CONTINUATION],
        [cell for cell in wanted if cell.arm != CONTINUATION],
    ]
    began, done, total = time.monotonic(), 0, sum(map(len, waves))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for wave in waves:
            for future in as_completed([pool.submit(work, plan, job) for job in wave]):
                done += 1
                print(f"[{done}/{total}] {time.monotonic() - began:6.0f} s  {future.result()}", flush=True)
    found = []
    for cell in cells():  # all that is there: models are compared with continuations, whatever was wanted
        place = place_of(instrument(plan).folder, *stage(plan, cell)) / RESULTS
        if place.exists():
            found.append((cell, json.loads(place.read_text(encoding="utf-8"))))
    report.write(output, instrument(plan), found)


if __name__ == "__main__":
    typer.run(main)
