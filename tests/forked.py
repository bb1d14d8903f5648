"""Processes for tests, forked from a copy of the test process that has run nothing yet, so that each starts at once."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# What the first step of an optimiser, wrapped models and checkpoints import: once here, and not once in every process.
import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp

CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
_server: list[Connection] = []  # to the copy


def start() -> None:
    """Copy this process, which has imported the test modules; it must not have run a backward pass, nor any thread."""
    if not _server and sys.platform == "linux":
        own, other = multiprocessing.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pytest-xdist has a thread that waits for messages
            CONTEXT.Process(target=_serve, args=(other, own)).start()
        other.close()
        _server.append(own)


def stop() -> None:
    """End the copy."""
    while _server:
        _server.pop().close()


def _serve(requests: Connection, other: Connection) -> None:
    other.close()
    with contextlib.suppress(EOFError):
        while True:
            requests.send(_run(requests.recv()))


def run_all(work: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call a function with each of several tuples of arguments, all at a time, in processes of their own.

    The function has to be that of a module which is imported by its name. The result is what each call returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(Path(folder) / f"{number}.pt", work, *call) for number, call in enumerate(calls)]
        if _server:
            _server[0].send(jobs)
            codes = _server[0].recv()
        else:
            codes = _run(jobs)
        for code in codes:
            assert code == 0, f"{code}: see what was written to standard error"
        return [torch.load(file, weights_only=False) for file, *_ in jobs]


def _run(jobs: list[tuple[Any, ...]]) -> list[int | None]:
    """Run `_call` with each of several arguments and return the exit codes: of the first that failed, not after it."""
    processes: list[Any] = []
    try:
        for job in jobs:
            processes.append(CONTEXT.Process(target=_call, args=job))
            processes[-1].start()
        for process in processes:
            process.join(timeout=300)
            if process.exitcode != 0:
                break
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


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
