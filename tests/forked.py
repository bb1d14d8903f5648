"""Processes for tests, forked from one that has imported the large packages, so that each starts in milliseconds."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

FORKS: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
PRELOADED = [
    "pytest",
    "accelerate",
    "torch._dynamo",  # the first step of an optimiser imports it
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_fast",
    "tokendrift.demo",
    "tokendrift.evaluation",
    "tokendrift.sampling",
    "tokendrift.training",
]
FORKS.set_forkserver_preload(PRELOADED)  # not hypothesis: a test asks what an import without it says


def run_all(work: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call a function with each of several tuples of arguments, all at a time, in processes of their own.

    The function has to be that of a module which is imported by its name. The result is what each call returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        files, processes = [], []
        try:
            for number, call in enumerate(calls):
                files.append(Path(folder) / f"{number}.pt")
                processes.append(FORKS.Process(target=_call, args=(files[-1], work, *call)))
                processes[-1].start()
            for process in processes:
                process.join(timeout=300)
                assert process.exitcode == 0, f"{process.exitcode}: see what was written to standard error"
        finally:
            for process in processes:
                process.kill()
        return [torch.load(file, weights_only=False) for file in files]


def run_ranks(work: Callable[[int, int, Path], Any], runs: Iterable[tuple[int, int]]) -> list[Any]:
    """Call ``work(rank, ranks, store)`` once for each (rank, ranks), all at a time; return what each returned.

    The store is a file for the rendezvous of the ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run_all(work, [(*run, Path(folder) / "store") for run in runs])


def run_code(code: str) -> str:
    """Run code in a process of its own and return what it printed."""
    return run_all(_printed, [(code,)])[0]


def _printed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"__name__": "__main__"})
    return printed.getvalue()


def _call(file: Path, work: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    torch.save(work(*arguments), file)
    os._exit(0)  # threads that wrappers of models leave to gloo now and then abort a regular exit
