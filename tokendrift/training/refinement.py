"""Continual training as a product: from a checkpoint and text to a refined model, whatever interrupts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tokendrift._checks import fail
from tokendrift.diffusion import Process
from tokendrift.models import DiT
from tokendrift.models.checkpoints import build, read_checkpoint
from tokendrift.training.config import RefineConfig
from tokendrift.training.few_step import FewStep, Row
from tokendrift.training.loop import Optimization, Tensors
from tokendrift.training.objectives import Continuation, Drift, Objective
from tokendrift.training.packing import PackedText, mix
from tokendrift.training.parts import drifting_loss, make_accelerator, termination, text_source, weight_digest
from tokendrift.training.ranks import RowsOfRank
from tokendrift.training.records import Records
from tokendrift.training.run_folder import RunFolder
from tokendrift.training.text import Documents
from tokendrift.training.tokenizer import text_tokenizer

BASELINE = "continuation"  # folder of the matched continuation
NOISE, DROPOUT, ORDER, SAMPLES = range(4)  # what random numbers are for; each has a stream of its own
SHOWN = ("drift", "nelbo", "token_entropy", "raw_drift_rms")


class Refined(NamedTuple):
    """What a refinement leaves, beside its folder.

    Attributes:
        folder: With the model, its tokenizer and card; `load_denoiser` reads it.
        evaluations: Rows of figures: real text, the model before, the model as it was refined, and the matched
            continuation (``model`` says so) where there is one. ``step`` counts finished steps.
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

    Run again with the same configuration, it goes on from its last whole checkpoint, and ends with the same bits
    (on one CPU) as if it had not been interrupted: random numbers are functions of seed and step, and all else is in
    the checkpoint. Under ``accelerate launch`` it runs on several devices; the batch, its order and its noise do not
    depend on their number. The output folder has to be one that all of them see.

    On SIGTERM the step is finished and a checkpoint written, then KeyboardInterrupt raised. PyTorch's global generator
    is seeded anew at every step.

    Args:
        config: What to do.
        documents: A source of text of your own, in place of the configured one.
        judge: A judge of your own for the evaluation, in place of the configured one.
        accelerator: An ``accelerate.Accelerator`` of your own, without mixed precision of its own.
        progress: Show a bar.
        on_step: Called with the number of finished steps after each.

    Raises:
        TokenDriftError: For a configuration that cannot work, before any work is done; if training diverges; if the
            output folder belongs to another run; if the refined model cannot be written.
    """
    accelerator = accelerator or make_accelerator()
    beside: list[Row] = []
    if config.baseline and config.objective != "continuation":
        matched = config.replace(objective="continuation", output=str(Path(config.output) / BASELINE), baseline=False)
        done = _Run(matched, documents, judge, accelerator).run(progress, None)
        beside = [{"model": "continuation", **row} for row in done.evaluations if row["step"]]
        accelerator.free_memory()
    return _Run(config, documents, judge, accelerator, beside).run(progress, on_step)


class _Run:
    """One refinement, from its configuration to its folder."""

    def __init__(
        self,
        config: RefineConfig,
        documents: Documents | None,
        judge: Any,
        accelerator: Any,
        beside: Sequence[Row] = (),
    ) -> None:
        self.accelerator, self.beside = accelerator, list(beside)
        self.main: bool = accelerator.is_main_process
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.micro_batches = config.accumulation(self.ranks)
        # Checkpoint first on the main process: a hub id is fetched once.
        with accelerator.main_process_first():
            checkpoint = read_checkpoint(config.checkpoint, revision=config.revision)
            base, self.process = build(checkpoint)
            self.tokenizer = text_tokenizer(config.tokenizer, checkpoint.folder, base.vocab_size)
        self.length = config.length or base.config.model_length
        self.config = config = self._completed(config, base)
        self.data = self._data(documents or text_source(config))
        real = self._data(self.data.documents).take(config.evaluate_samples)

        model = DiT(base.config if config.dropout is None else dataclasses.replace(base.config, dropout=config.dropout))
        model.load_state_dict(base.state_dict())
        self.folder = RunFolder(
            config,
            together=config.micro_batch * self.ranks,
            base=weight_digest(base),
            model=model.config,
            process=self.process,
            tokenizer=self.tokenizer,
        )
        self.generator = torch.Generator(accelerator.device)
        self.drift = drifting_loss(config, base, self.process)
        if self.drift is not None:
            self.drift.to(accelerator.device)
        autocast = torch.bfloat16 if config.precision == "bf16" else None
        self.optimization = Optimization(model, config.loop(), accelerator=accelerator, autocast=autocast)
        self.objective = self._objective()
        self.evaluator = FewStep(
            self.process,
            self.tokenizer,
            real,
            nfes=config.evaluate_nfe,
            judge=judge if judge is not None else config.judge,
            batch=config.evaluate_batch,
            seed=mix(config.seed, SAMPLES),
            device=accelerator.device,
            tolerance=config.entropy_tolerance,
        )
        self.evaluations: list[Row] = []
        self.best: dict[str, float] | None = None

    def run(self, progress: bool, on_step: Callable[[int], object] | None) -> Refined:
        """Train from where the folder stands to the end."""
        config, messages = self.config, list[str]()
        finished = self._resume(messages.append)
        if self.main:
            self.folder.open()
        options: dict[str, Any] = {"tensorboard": config.tensorboard, "wandb": config.wandb}
        options |= {"config": dataclasses.asdict(config), "main": self.main, "progress": progress}
        with Records(self.folder.path, finished, config.steps, **options) as records:
            self.records = records
            for message in messages:
                records.warn(finished, message)
            if finished == 0:
                self._evaluate(0)
            with termination() as asked:
                while finished < config.steps:
                    finished = self._step(finished)
                    if on_step is not None:
                        on_step(finished)
                    if finished < config.steps and self._anywhere(asked()):
                        self._save(finished, False)
                        raise KeyboardInterrupt
            self._finish()
        return Refined(self.folder.path, [*self.evaluations, *self.beside])

    def _step(self, step: int) -> int:
        """Take a step with all that is due after it; return the number of finished steps."""
        config, finished = self.config, step + 1
        last = finished == config.steps
        evaluate = last or (config.evaluate_every > 0 and finished % config.evaluate_every == 0)
        save = last or finished % config.checkpoint_every == 0
        log = save or step == 0 or finished % config.log_every == 0  # before saving: a diverged state is not kept
        torch.manual_seed(mix(config.seed, DROPOUT, step, self.rank))
        frozen: AbstractContextManager[None] = nullcontext()
        if self.drift is not None and config.freeze_queues:
            frozen = self.drift.frozen_queues()
        with frozen:
            batches = self._batches(step)
            record = self.optimization.step(step, self.objective, batches, count=self.micro_batches, log=log)
        shown = {name: record[name] for name in SHOWN if name in record} if record is not None else None
        self.records.advance(finished, shown)
        if record is not None:
            self.records.figures("train", finished, {**record, "step": finished})
        better = self._evaluate(finished) if evaluate and config.evaluate_nfe else False
        if save or better:
            self._save(finished, better)
        return finished

    def _batches(self, step: int) -> Iterator[Tensor]:
        """Yield this rank's rows of each micro-batch of a step, with the noise seeded for it."""
        size = self.config.micro_batch
        for number in range(self.micro_batches):
            rows = self.data.take(size * self.ranks)
            self.generator.manual_seed(mix(self.config.seed, NOISE, step, number))
            yield rows[self.rank * size : (self.rank + 1) * size]

    def _evaluate(self, finished: int) -> bool:
        """Sample and measure the averaged model; return whether it is the best so far."""
        if not self.config.evaluate_nfe:
            return False
        optimization = self.optimization
        sharded = any(hasattr(parameter, "full_tensor") for parameter in optimization.parameters)
        # A sharded network needs all processes at every call, so that all sample everything, in step. Otherwise they
        # share the work, and each calls the bare network, since that of DDP would wait for the others.
        share = (0, 1) if sharded else (self.rank, self.ranks)
        collect = None if sharded or self.ranks == 1 else lambda ids: self.accelerator.reduce(ids, "sum")
        network = optimization.network if sharded else optimization.bare_network
        with optimization.evaluating():
            drawn = [
                (nfe, self.evaluator.sample(network, nfe, share=share, collect=collect))
                for nfe in self.config.evaluate_nfe
            ]
        better = False
        if self.main:
            rows = [{"step": finished, "nfe": nfe, **self.evaluator.measure(ids)} for nfe, ids in drawn]
            if finished == 0:
                self.evaluations.append({"step": 0, "nfe": None, **self.evaluator.real_row()})
                self.records.figures("real_text", 0, self.evaluations[0])
            self.evaluations += rows
            for row in rows:
                self.records.figures("evaluation", finished, row)
            for message in self.evaluator.warnings(rows):
                self.records.warn(finished, f"after {finished} steps, {message}")
            score = self.evaluator.score(rows)
            if finished and score is not None and (self.best is None or score < self.best["score"]):
                self.best, better = {"step": finished, "score": score}, True
        return bool(self._told(better))

    def _save(self, finished: int, better: bool) -> None:
        """Write a checkpoint; where that fails, say so and go on, since the one before is whole."""
        groups = self._groups()
        if not self.main:
            return
        state = {"data": self.data.position(), "evaluations": self.evaluations, "best": self.best}
        try:
            self.folder.save(finished, groups, state, keep=[int(self.best["step"])] if self.best else [])
            if better:
                self.folder.export(groups, self._rows(finished), finished, best=True)
        except OSError as error:
            self.records.warn(
                finished,
                f"the checkpoint of step {finished} could not be written ({error}); training goes on, and an "
                "interruption would go back to the one before.",
            )

    def _resume(self, tell: Callable[[str], object]) -> int:
        """Take up the newest whole checkpoint; return the number of finished steps."""
        found = self.folder.newest(tell) if self.main else None
        place = self._told(str(found[0]) if found else None)
        if place is None:
            return 0
        stored = found[1] if found else self.folder.load(Path(place))
        state = stored.state
        self.folder.check_same_run(state)
        queues = stored.tensors.pop("queues", {})
        if self.drift is not None:
            self.drift.load_state_dict(queues)
        self.optimization.load_state(stored.tensors)
        self.data.restore(state["data"])
        self.evaluations, self.best = state["evaluations"], state["best"]
        return int(state["step"])

    def _finish(self) -> None:
        groups, steps = self._groups(), self.config.steps
        if self.main:
            try:
                self.folder.export(groups, self._rows(steps), steps)
            except OSError as error:
                raise fail(
                    f"the refined model cannot be written to {self.folder.path}: {error}.",
                    "Make room and run the same command again: training is done, and its last checkpoint is kept.",
                ) from None
        self.accelerator.wait_for_everyone()

    def _rows(self, steps: int) -> list[Row]:
        """Return the evaluations up to a step, those of the matched continuation beside them."""
        return [row for row in self.evaluations if row["step"] <= steps] + self.beside

    def _groups(self) -> dict[str, Tensors]:
        """Return all tensors of a checkpoint; every process has to call."""
        groups = self.optimization.state()
        if self.drift is not None:
            groups["queues"] = {name: tensor.cpu().clone() for name, tensor in self.drift.state_dict().items()}
        return groups

    def _anywhere(self, here: bool) -> bool:
        """Return whether something holds on any process."""
        if self.ranks == 1:
            return here
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device), "sum"))

    def _told(self, value: Any) -> Any:
        """Return what the main process has."""
        if self.ranks == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def _data(self, documents: Documents) -> PackedText:
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

    def _objective(self) -> Objective:
        process = cast(Process, RowsOfRank(self.process, self.rank, self.ranks))
        if self.drift is None:
            return Continuation(process, self.generator)
        weight = self.config.base_weight if self.config.objective == "combined" else 0.0
        return Drift(process, self.drift, weight, self.generator)

    def _completed(self, config: RefineConfig, base: DiT) -> RefineConfig:
        """Return the configuration with what the checkpoint decides."""
        if config.window is not None and self.length % config.window:
            raise fail(f"window must divide the length of a sequence, {self.length}.", window=config.window)
        if config.encoder_time and not base.time_conditioned:
            raise fail(
                "encoder_time was given, but the checkpoint is not conditioned on time.",
                "Leave it out.",
                encoder_time=config.encoder_time,
            )
        return config.replace(length=self.length)
