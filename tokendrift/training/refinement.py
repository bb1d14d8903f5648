"""`refine`: from a checkpoint and text to a refined model, through any interruption."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import fail
from tokendrift.errors import TokenDriftError
from tokendrift.files import weight_digest
from tokendrift.models.checkpoints import build, checkpoint_fields, empty_like, read_checkpoint
from tokendrift.models.random_input import without_random_input
from tokendrift.models.tokenizer import text_tokenizer
from tokendrift.training.checkpointing import Stored
from tokendrift.training.config import RefineConfig, objective_name
from tokendrift.training.few_step import FewStepEvaluation, Row, judge_name
from tokendrift.training.objectives.objective import ObjectiveSetup
from tokendrift.training.optimization import Optimization, Tensors
from tokendrift.training.packing import PackedText, mix
from tokendrift.training.processes import (
    any_rank,
    broadcast_from_main,
    check_accelerator,
    done_by_main,
    make_accelerator,
    termination,
)
from tokendrift.training.records import Records
from tokendrift.training.run_folder import BASELINE, RunFolder, check_output
from tokendrift.training.text import Documents, TextFiles, open_text

NOISE, DROPOUT, ORDER, SAMPLES, BUILDING = range(5)  # purposes of random numbers; each has a stream of its own
NOT_SHOWN = ("step", "learning_rate", "grad_norm", "queue")  # left out beside the progress bar

Best = dict[str, float]  # step and score of the best evaluation


class Refined(NamedTuple):
    """The result of `refine`.

    Attributes:
        folder: Folder with the model, its tokenizer and its card; `load_denoiser` reads it.
        evaluations: Rows of figures: real text, the model before, the refined model, and the matched continuation
            (named by ``model``) if there is one. ``step`` is the number of finished steps. Empty on all processes but
            the main one.
    """

    folder: Path
    evaluations: list[Row]


def refine(
    config: RefineConfig,
    *,
    documents: Documents | None = None,
    judge: Any = None,
    accelerator: Any = None,
    progress: bool = True,
    on_step: Callable[[int], object] | None = None,
) -> Refined:
    """Train a released or saved denoiser further, and write it as a folder.

    If it is called again with the same configuration, it resumes from the last complete checkpoint. On one CPU the
    result is then identical, bit for bit, to that of an uninterrupted run: random numbers are functions of the seed and
    the step, and everything else is in the checkpoint. Under ``accelerate launch`` it runs on several devices; the
    batch, its order and its noise do not depend on their number. All processes must see the output folder.

    On SIGTERM and SIGINT the step is finished, a checkpoint is written, and KeyboardInterrupt is raised; a second
    SIGINT raises it at once. An evaluation that fails after the first step costs a warning and its figures, not the
    run. PyTorch's global generator is seeded anew at every step.

    Args:
        config: The settings.
        documents: A text source of your own, instead of the configured one.
        judge: A judge of your own for the evaluation, instead of the configured one.
        accelerator: An ``accelerate.Accelerator`` of your own, without mixed precision and gradient accumulation: for
            one process, DDP or FSDP2. Default: an accelerator that fits how this process was launched.
        progress: Whether to show a progress bar. Default: True.
        on_step: Called with the number of finished steps after each. Default: None.

    Raises:
        TokenDriftError: For a configuration that cannot work, before any work is done; if training diverges; if the
            output folder belongs to another run, is in use by another process, or holds anything that no run has
            written; if the refined model cannot be written.
    """
    accelerator = accelerator or make_accelerator()
    check_accelerator(accelerator)
    check_output(Path(config.output))
    baseline_rows: list[Row] = []
    # The matched continuation first: the same run with the backbone's own objective, in a folder of its own.
    if config.baseline and objective_name(config.objective) != BASELINE:
        matched = config.replace(objective=BASELINE, output=str(Path(config.output) / BASELINE), baseline=False)
        rows = Run(matched, documents, judge, accelerator).run(progress, None, "baseline: ")
        baseline_rows = [{"model": BASELINE, **row} for row in rows if row["step"]]
        accelerator.free_memory()
    evaluations = Run(config, documents, judge, accelerator, baseline_rows).run(progress, on_step)
    return Refined(Path(config.output), evaluations)


class Run:
    """One run of `refine`: what it consists of, its steps, evaluations and checkpoints.

    Args:
        config: The settings.
        documents: A source of text, in place of the configured one.
        judge: A judge, in place of the configured one.
        accelerator: Devices and processes.
        baseline_rows: Figures of the matched continuation.
    """

    saved: int | None = None  # step of the newest checkpoint that this process has written or read
    best: Best | None = None
    late = False  # whether a checkpoint is due by the clock

    def __init__(
        self,
        config: RefineConfig,
        documents: Documents | None,
        judge: Any,
        accelerator: Any,
        baseline_rows: Sequence[Row] = (),
    ) -> None:
        self.accelerator, self.baseline_rows = accelerator, list(baseline_rows)
        self.main: bool = accelerator.is_main_process
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.micro_batches = config.accumulation(self.ranks)
        # 1. The checkpoint, first on the main process: a hub id is downloaded once.
        with accelerator.main_process_first():
            fields = checkpoint_fields(config.checkpoint_config)
            checkpoint = read_checkpoint(config.checkpoint, revision=config.revision, config=fields)
            base, self.process = build(checkpoint)
            place, trusted = checkpoint.folder, checkpoint.trusted
            self.tokenizer = text_tokenizer(config.tokenizer, place, base.vocab_size, trusted=trusted)
        self.length: int = config.length or base.config.model_length
        objective = config.objective.for_process(self.process, base.config.random_input)
        self.config = config = dataclasses.replace(config, length=self.length, objective=objective)
        # 2. The text; its first sequences are also the real text of the evaluation.
        source = documents or open_text(config)
        self.data = self._packed(source)
        real = self._first_sequences(source, config.evaluate_samples)
        # 3. The objective, around the checkpoint as it is, and the network that is trained.
        autocast = torch.bfloat16 if config.precision == "bf16" else None
        self.generator = torch.Generator(accelerator.device)
        torch.manual_seed(mix(config.seed, BUILDING))
        share, options = (self.rank, self.ranks), (config.seed, config.steps, autocast, accelerator)
        setup = ObjectiveSetup(base, self.process, self.length, self.generator, share, *options)
        self.objective = config.objective.build(setup)
        if self.objective.module is not None:
            self.objective.module.to(accelerator.device)
        model = base.trainable_copy(config.dropout)
        config.objective.prepare(model)
        written = empty_like(model)
        # Until the first step, a random input that the checkpoint does not have is left out.
        self.as_it_was = without_random_input if model.config.random_input != base.config.random_input else nullcontext
        self.optimization = Optimization(model, config.loop(), accelerator=accelerator, autocast=autocast)
        # 4. The evaluation, and the folder of the run.
        judge = judge if judge is not None else config.judge
        text, seed = (self.process, self.tokenizer, real), mix(config.seed, SAMPLES)
        self.evaluator = FewStepEvaluation(config, judge, *text, seed, accelerator.device)
        self.evaluations: list[Row] = []
        self.conditions = self.evaluator.conditions
        self.folder = RunFolder(
            config,
            together=config.micro_batch * self.ranks,
            base=weight_digest(base),
            model=written,
            process=self.process,
            tokenizer=self.tokenizer,
            # Any source is recognised by its first sequence, files also by their content.
            text=[real[0].tolist(), source.identity() if isinstance(source, TextFiles) else None],
            judge=judge_name(judge),
        )

    def run(self, progress: bool, on_step: Callable[[int], object] | None, label: str = "") -> list[Row]:
        """Train from the newest checkpoint to the end; return the evaluations, on the main process alone."""
        with ExitStack() as held:
            done_by_main(self.accelerator, lambda: held.enter_context(self.folder.claimed()))
            self._run(progress, on_step, label)
        return [*self.evaluations, *self.baseline_rows] if self.main else []

    def _run(self, progress: bool, on_step: Callable[[int], object] | None, label: str) -> None:
        config, messages = self.config, list[str]()
        self.saved_at = time.monotonic()
        # 1. Find out where the run stands, before anything is written.
        stored = self._newest(messages.append)
        finished = 0 if stored is None else int(stored.state["step"])
        due = stored is not None and bool(stored.state.get("evaluation_due"))
        done_by_main(self.accelerator, self.folder.open)
        options: dict[str, Any] = {"tensorboard": config.tensorboard, "wandb": config.wandb, "evaluation_due": due}
        options |= {"config": config.settings(), "main": self.main, "progress": progress, "label": label}
        with Records(self.folder.path, finished, config.steps, **options) as records:
            self.records = records
            for message in messages:
                records.warn(finished, message)
            # 2. Begin, or resume.
            if stored is None:
                self.objective.before_training(self._packed(self.data.documents).take)
                self._evaluate(0)
            else:
                due = self._resume(stored) and due
            if due and finished < config.steps:
                self._evaluate_saved(finished)
            # 3. Take the remaining steps; a signal on any process stops all of them after a checkpoint.
            with termination() as received:
                while finished < config.steps:
                    finished, due = self._step(finished)
                    if on_step is not None:
                        on_step(finished)
                    late = time.monotonic() - self.saved_at > 60 * config.checkpoint_minutes
                    stop, self.late = any_rank(self.accelerator, received(), late)
                    if finished < config.steps and stop:
                        self._save(finished)
                        raise KeyboardInterrupt
            # 4. Write the refined model, then measure it.
            self._finish(due)

    def _step(self, step: int) -> tuple[int, bool]:
        """Take a step with all that is due after it.

        Returns:
            The number of finished steps, and whether they are still to be evaluated: the last step is, once its
            checkpoint and its model have been written.
        """
        config, finished = self.config, step + 1
        last = finished == config.steps
        evaluate = last or (config.evaluate_every > 0 and finished % config.evaluate_every == 0)
        evaluate = evaluate and bool(config.evaluate_nfe)
        save = last or self.late or finished % config.checkpoint_every == 0
        log = save or step == 0 or finished % config.log_every == 0  # before saving: a diverged state is not kept
        torch.manual_seed(mix(config.seed, DROPOUT, step, self.rank))
        batches = self._batches(step)
        record = self.optimization.step(step, self.objective, batches, count=self.micro_batches, log=log)
        shown = {name: value for name, value in (record or {}).items() if name not in NOT_SHOWN and "/" not in name}
        self.records.advance(finished, shown or None)
        if record is not None:
            self.records.figures("train", finished, {**record, "step": finished})
        # The checkpoint comes before the evaluation, which may fail.
        if save:
            self._save(finished, evaluation_due=evaluate)
        if evaluate and not last:
            self._evaluate_saved(finished)
        return finished, evaluate and last

    def _batches(self, step: int) -> Iterator[Tensor]:
        """Yield this process's rows of each micro-batch of a step, with the generator seeded for it."""
        size = self.config.micro_batch
        for number in range(self.micro_batches):
            rows = self.data.take(size * self.ranks)
            self.generator.manual_seed(mix(self.config.seed, NOISE, step, number))
            yield rows[self.rank * size : (self.rank + 1) * size]

    def _evaluate(self, finished: int) -> Best | None:
        """Sample and measure the averaged model; return its step and score if it is the best so far.

        If that fails after training has begun, warn: the figures are lost, and the run goes on.
        """
        if not self.config.evaluate_nfe:
            return None
        better: Best | None = None
        error: Exception | None = None
        label = f"evaluation after {finished} steps" if finished else "initial evaluation"
        try:
            with self.records.phase(label, 2 * len(self.config.evaluate_nfe)) as progress:
                with nullcontext() if finished else self.as_it_was(self.optimization.model):
                    drawn = self.evaluator.sample_all(self.optimization, self.accelerator, progress)
                if self.main:
                    better = self._measure(finished, drawn, progress)
        except Exception as caught:
            if finished:
                message = f"the evaluation after {finished} steps has failed, without figures: {caught}"
                self.records.warn(finished, message)
            else:
                error = caught
        # The other processes wait here for the main one, also if it could not measure.
        better, failed = broadcast_from_main(self.accelerator, (better, error is not None))
        if failed or error is not None:
            raise error or fail("the main process could not evaluate the model; its own error says why.")
        return better

    def _measure(self, finished: int, drawn: Mapping[int, Tensor], progress: Callable[[], object]) -> Best | None:
        # 1. Measure; the first evaluation also measures real text.
        rows = []
        for nfe, ids in drawn.items():
            rows.append({"step": finished, "nfe": nfe, **self.evaluator.measure(ids)})
            progress()
        messages, score = self.evaluator.warnings(rows), self.evaluator.score(rows)
        if finished == 0:
            self.evaluations.append({"step": 0, "nfe": None, **self.evaluator.real_row})
            self.records.figures("real_text", 0, self.evaluations[0])
        # 2. Log, and warn of collapse.
        self.evaluations += rows
        for row in rows:
            self.records.figures("evaluation", finished, row)
        for message in messages:
            self.records.warn(finished, f"after {finished} steps, {message}")
        # 3. Compare with the best so far.
        if finished and score is not None and (self.best is None or score < self.best["score"]):
            return {"step": finished, "score": score}
        return None

    def _evaluate_saved(self, finished: int) -> None:
        """Evaluate, and enter the figures into the checkpoint of the step; the best model needs one."""
        better = self._evaluate(finished)
        groups = self._groups() if better else {}
        if not self.main:
            return
        if self.saved != finished:
            if better:
                self._write(finished, groups, better)
            return
        best = better or self.best
        changes = {"evaluations": self.evaluations, "best": best, "evaluation_due": False}
        with self._tolerant(finished, f"the figures of step {finished} could not be written"):
            self.folder.update(finished, changes, keep=[int(best["step"])] if best else [])
            self.best = best
            if better:
                self._export_best(finished, groups)

    def _save(self, finished: int, better: Best | None = None, *, evaluation_due: bool = False) -> None:
        """Write a checkpoint; every process must call."""
        groups = self._groups()
        self.saved_at = time.monotonic()
        if self.main:
            self._write(finished, groups, better, evaluation_due)

    def _write(
        self, finished: int, groups: Mapping[str, Tensors], better: Best | None, evaluation_due: bool = False
    ) -> None:
        """Write a checkpoint; if that fails, the checkpoint before is complete."""
        best = better or self.best
        state: dict[str, Any] = {"data": self.data.position(), "evaluations": self.evaluations, "way": self.conditions}
        state |= {"best": best, "evaluation_due": evaluation_due}
        rest = "; training continues, and an interrupted run would resume from the previous one"
        with self._tolerant(finished, f"the checkpoint of step {finished} could not be written", rest):
            self.folder.save(finished, groups, state, keep=[int(best["step"])] if best else [])
            self.saved = finished
            self.best = best  # not before: the checkpoint of the old best is kept until that of the new one is complete
            if better:
                self._export_best(finished, groups)

    def _export_best(self, step: int, groups: Mapping[str, Tensors]) -> None:
        """Write the best model; if that fails, its checkpoint is kept, and the next start tries again."""
        with self._tolerant(step, f"the best model, of step {step}, could not be written"):
            self.folder.export(groups, self._rows(step), step, best=True)

    @contextmanager
    def _tolerant(self, step: int, complaint: str, rest: str = "") -> Iterator[None]:
        """Warn if a file cannot be read or written inside the block, and leave the block: the run goes on."""
        try:
            yield
        except (TokenDriftError, OSError) as error:
            self.records.warn(step, f"{complaint} ({error}){rest}.")

    def _newest(self, warn: Callable[[str], object]) -> Stored | None:
        """Read the newest complete checkpoint, which must be of this run; return None if there is none."""
        stored: Stored | None = None

        def newest() -> int | None:
            nonlocal stored
            stored = self.folder.newest(warn)
            return None if stored is None else int(stored.state["step"])

        step = done_by_main(self.accelerator, newest)
        if step is None:
            return None
        stored = stored or self.folder.load_step(step)
        self.folder.check_same_run(stored.state)
        return stored

    def _resume(self, stored: Stored) -> bool:
        """Restore a checkpoint; if evaluations are made under other conditions now, begin them anew.

        Returns:
            Whether the evaluations of the checkpoint still count.
        """
        state = stored.state
        finished, before = int(state["step"]), state.get("way", self.conditions)
        self.saved = finished
        anew = before != self.conditions and bool(self.config.evaluate_nfe)
        if anew:
            self.records.warn(
                finished,
                f"evaluations were made with {before} and are made with {self.conditions} from here on: earlier "
                "figures remain only in log.jsonl, and the best checkpoint is chosen among later ones.",
            )
            self._evaluate(0)  # the model before training, whose weights are still in place
        # Versions before 0.1 called the state of the objective "queues".
        of_objective = stored.tensors.pop("objective", None) or stored.tensors.pop("queues", {})
        try:
            self.objective.load_state_dict(of_objective)
        except (RuntimeError, KeyError, TokenDriftError) as error:
            raise fail(
                f"the state of the objective in {self.folder.path} does not fit: {error}.",
                "It may come from another version: finish the run with that version, or choose another output.",
            ) from None
        self.optimization.load_state(stored.tensors)
        stored.tensors.clear()  # several times the weights, which would stay in memory until the run ends
        self.data.restore(state["data"])
        if anew:
            self._save(finished, self._evaluate(finished))
        elif self.main:
            self.evaluations, self.best, self.conditions = state["evaluations"], state["best"], before
            self._restore_best()
        return not anew

    def _restore_best(self) -> None:
        """Write the best model again from its checkpoint: the run may have been killed before it was written."""
        if self.best is not None:
            step = int(self.best["step"])
            with self._tolerant(step, f"the best model, of step {step}, was not written again"):
                self._export_best(step, self.folder.load_step(step).tensors)

    def _finish(self, evaluation_due: bool) -> None:
        """Write the refined model, its tokenizer and its card; then evaluate it, and write the card anew."""
        groups, steps = self._groups(), self.config.steps

        def export() -> None:
            try:
                self.folder.export(groups, self._rows(steps), steps)
            except OSError as error:
                raise fail(
                    f"the refined model cannot be written to {self.folder.path}: {error}.",
                    "Free some space and run the same command again: training is finished, and its last checkpoint "
                    "is kept.",
                ) from None

        done_by_main(self.accelerator, export)
        if evaluation_due:
            self._evaluate_saved(steps)
            if self.main:
                with self._tolerant(steps, "the model card could not be written"):
                    self.folder.write_card(self.folder.path, self._rows(steps), steps)
        self.accelerator.wait_for_everyone()

    def _rows(self, steps: int) -> list[Row]:
        """Return the evaluations up to a step, and those of the matched continuation."""
        return [row for row in self.evaluations if row["step"] <= steps] + self.baseline_rows

    def _groups(self) -> dict[str, Tensors]:
        """Return all tensors of a checkpoint; every process must call."""
        state = {name: tensor.cpu().clone() for name, tensor in self.objective.state_dict().items()}
        return self.optimization.state() | ({"objective": state} if state else {})

    def _first_sequences(self, source: Documents, count: int) -> Tensor:
        """Return the first sequences of the text, which must be long enough for one."""
        packed = self._packed(source)
        first = packed.take(max(1, count))
        least = self.length - 2 if self.config.wrap else self.length
        if packed.source_tokens is not None and packed.source_tokens < least:
            raise fail(
                f"the text has {packed.source_tokens} tokens, too few for one sequence of {least}.",
                "Pass more text, or a smaller length.",
            )
        return first[:count]

    def _packed(self, documents: Documents) -> PackedText:
        """Return the sequences of a source, from its beginning."""
        return PackedText(
            documents,
            self.tokenizer,
            self.length,
            wrap=self.config.wrap,
            shuffle=self.config.shuffle,
            seed=mix(self.config.seed, ORDER),
            vocab_size=self.process.vocab_size,
            mask_id=self.process.mask_id,
        )
