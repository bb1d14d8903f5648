"""The log of a run: lines of JSON, curves for TensorBoard and Weights & Biases, a progress bar, and warnings."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokendrift._checks import warn_user
from tokendrift.files import write_atomically

LOG, CURVES = "log.jsonl", "tensorboard"
WANDB = "wandb-id.txt"  # under which id Weights & Biases knows the run


class Records:
    """The log of a run, which the main process alone writes.

    Every line of ``log.jsonl`` is an object with ``kind`` (``"train"``, ``"evaluation"``, ``"real_text"`` or
    ``"message"``) and ``step``, the number of finished steps. A resumed run first removes the lines of steps that it
    takes again, and those of an evaluation that it makes again.

    Args:
        folder: Folder of the run.
        step: Number of finished steps.
        steps: Number of all steps.
        main: Whether this process is the main one. Default: True.
        tensorboard: Whether to write curves, if TensorBoard is installed. Default: False.
        wandb: Project of Weights & Biases. Default: none.
        config: Settings of the run, for Weights & Biases. Default: none.
        progress: Whether to show progress bars, if rich is installed. Default: True.
        label: What the labels of the progress bars begin with. Default: nothing.
        evaluation_due: Whether the evaluation after ``step`` is still to be made. Default: False.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        steps: int,
        *,
        main: bool = True,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        progress: bool = True,
        label: str = "",
        evaluation_due: bool = False,
    ) -> None:
        self.path, self.main, self._failed = folder / LOG, main, False
        self.curves: Any = None
        with self._losing_curves():
            self.curves = _tensorboard(folder / CURVES, step) if main and tensorboard else None
        self.wandb = _wandb(wandb, folder, dict(config or {})) if main and wandb else None
        self.label = label
        self.bar = _bar(f"{label}training", step, steps) if main and progress else None
        if main:
            self._cut(step, evaluation_due)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        with self._losing_curves():
            if self.curves is not None:
                self.curves.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)

    def figures(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Log the figures of a step."""
        if not self.main:
            return
        self._line({"kind": kind, "step": step, **values})
        group = kind if values.get("nfe") is None else f"{kind}_{values['nfe']}_nfe"
        scalars = {
            f"{group}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value) and name not in ("step", "nfe")
        }
        with self._losing_curves():
            for name, value in scalars.items() if self.curves is not None else ():
                self.curves.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)

    def warn(self, step: int, message: str) -> None:
        """Log a message and issue it as a warning, once for all processes."""
        if self.main:
            self._line({"kind": "message", "step": step, "message": message})
            warn_user(message)

    def advance(self, step: int, shown: Mapping[str, float] | None = None) -> None:
        """Move the progress bar to a number of finished steps, and show figures beside it."""
        if self.bar is not None:
            text = "" if shown is None else "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.bar.update(self.bar.task_ids[0], completed=step, **({"shown": text} if text else {}))

    @contextmanager
    def phase(self, label: str, parts: int) -> Iterator[Callable[[], object]]:
        """Show a progress bar of a phase inside the block; call what is yielded after each of its parts."""
        bar = self.bar
        if bar is None:
            yield lambda: None
            return
        task = bar.add_task(f"{self.label}{label}", total=parts, shown="")
        try:
            yield lambda: bar.advance(task)
        finally:
            bar.remove_task(task)

    @contextmanager
    def _losing_curves(self) -> Iterator[None]:
        """Continue without curves after an error: TensorBoard's writer raises it again at every call."""
        try:
            yield
        except OSError as error:
            self.curves = None
            warn_user(f"the curves cannot be written ({error}); training continues without them.")

    def _line(self, entry: Mapping[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: _finite(value) for name, value in entry.items()}) + "\n")
        except OSError as error:
            if not self._failed:
                warn_user(f"{self.path} cannot be written ({error}); training continues.")
            self._failed = True

    def _cut(self, step: int, evaluation_due: bool) -> None:
        """Remove lines beyond the step (all of them at step 0), and what is no line of a log, as a crash may leave it.

        Where the evaluation is still to be made, the step itself has no lines but those of training.
        """
        if not self.path.exists():
            return
        kept = [
            line
            for line, entry in _entries(self.path)
            if 0 < step >= entry["step"] + (evaluation_due and entry["kind"] != "train")
        ]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))


def read_log(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's log, or only those of one kind. A line that a crash has left incomplete is left out.

    Args:
        folder: Folder of the run.
        kind: ``"train"``, ``"evaluation"``, ``"real_text"`` or ``"message"``. Default: all.
    """
    return [entry for _, entry in _entries(Path(folder) / LOG) if kind is None or entry["kind"] == kind]


def _entries(log: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a log with what they say, except for those that are no line of a log."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if isinstance(entry["kind"], str) and isinstance(entry["step"], int):
                yield line, entry
        except (ValueError, KeyError, TypeError, RecursionError):
            continue


def _finite(value: Any) -> Any:
    """Return the value, or None for a number that JSON cannot express."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _wandb(project: str, folder: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        warn_user("wandb is not installed, so no curves are written to it. Install it with pip install wandb.")
        return None
    # One run per folder, also after an interruption. The id is random, since several folders may have one name.
    kept = folder / WANDB
    if not kept.exists():
        write_atomically(kept, uuid.uuid4().hex)
    identity = {"id": kept.read_text(encoding="utf-8"), "name": folder.resolve().name}
    return wandb.init(project=project, dir=str(folder), resume="allow", config=config, **identity)


def _bar(label: str, step: int, steps: int) -> Any:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    bar.add_task(label, total=steps, completed=step, shown="")
    bar.start()
    return bar
