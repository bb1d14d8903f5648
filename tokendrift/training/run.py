"""One run of `refine`: what it is put together from, its steps, evaluations and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tokendrift._checks import fail
from tokendrift._objective import DriftObjective
from tokendrift.diffusion import Process
from tokendrift.errors import TokenDriftError
from tokendrift.files import weight_digest
from tokendrift.loss import TokenDriftLoss
from tokendrift.models import DiT
from tokendrift.models.checkpoints import build, read_checkpoint
from tokendrift.models.tokenizer import text_tokenizer
from tokendrift.pairs import PairDriftLoss
from tokendrift.training.checkpointing import Stored
from tokendrift.training.config import RefineConfig
from tokendrift.training.few_step import FewStep, Row, judge_name
from tokendrift.training.objectives import Continuation, Drift, Objective
from tokendrift.training.optimization import Optimization, Tensors
from tokendrift.training.packing import PackedText, mix
from tokendrift.training.parts import drifting_loss, termination, text_source
from tokendrift.training.ranks import RowsOfRank, anywhere, told
from tokendrift.training.records import Records
from tokendrift.training.run_folder import RunFolder
from tokendrift.training.text import Documents, TextFiles
from tokendrift.training.trajectories import OwnTrajectories

NOISE, DROPOUT, ORDER, SAMPLES = range(4)  # what random numbers are for; each has a stream of its own
SHOWN = ("drift", "nelbo", "token_entropy", "raw_drift_rms", "total_variation")
COUNTED = 64  # sequences whose pairs are counted at a time

Best = dict[str, float]  # step and score of the best evaluation


class Run:
    """One refinement, from its configuration to its folder; `refine` says what the arguments are.

    Args:
        config: What to do.
        documents: A source of text, in place of the configured one.
        judge: A judge, in place of the configured one.
        accelerator: Devices and processes.
        beside: Rows of the matched continuation.
    """

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
        source = documents or text_source(config)
        self.data = self._data(source)
        real = self._data(source).take(config.evaluate_samples)
        judge = judge if judge is not None else config.judge

        model = DiT(base.config if config.dropout is None else dataclasses.replace(base.config, dropout=config.dropout))
        model.load_state_dict(base.state_dict())
        self.folder = RunFolder(
            config,
            together=config.micro_batch * self.ranks,
            base=weight_digest(base),
            model=model.config,
            process=self.process,
            tokenizer=self.tokenizer,
            # Of any source the first sequence is known, of files more.
            text=[real[0].tolist(), source.identity() if isinstance(source, TextFiles) else None],
            judge=judge_name(judge),
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
            judge=judge,
            batch=config.evaluate_batch,
            seed=mix(config.seed, SAMPLES),
            device=accelerator.device,
            tolerance=config.entropy_tolerance,
        )
        self.evaluations: list[Row] = []
        self.way = self.evaluator.way
        self.best: Best | None = None

    def run(self, progress: bool, on_step: Callable[[int], object] | None) -> list[Row]:
        """Train from where the folder stands to the end; return the evaluations, on the main process alone."""
        config, messages = self.config, list[str]()
        stored = self._newest(messages.append)
        finished = 0 if stored is None else int(stored.state["step"])
        if self.main:
            self.folder.open()
        options: dict[str, Any] = {"tensorboard": config.tensorboard, "wandb": config.wandb}
        options |= {"config": dataclasses.asdict(config), "main": self.main, "progress": progress}
        with Records(self.folder.path, finished, config.steps, **options) as records:
            self.records = records
            for message in messages:
                records.warn(finished, message)
            if stored is None:
                self._count_pairs()
                self._evaluate(0)
            else:
                self._resume(stored)
            with termination() as asked:
                while finished < config.steps:
                    finished = self._step(finished)
                    if on_step is not None:
                        on_step(finished)
                    if finished < config.steps and anywhere(self.accelerator, asked()):
                        self._save(finished)
                        raise KeyboardInterrupt
            self._finish()
        return [*self.evaluations, *self.beside] if self.main else []

    def _count_pairs(self) -> None:
        """Count the pairs of real text ahead: the first batches alone lack most of those that text has."""
        if not isinstance(self.drift, PairDriftLoss) or not self.config.pair_sequences:
            return
        text = self._data(self.data.documents).take(self.config.pair_sequences)
        for part in text.split(COUNTED):
            mine = (torch.arange(len(part)) % self.ranks == self.rank)[:, None].expand_as(part)
            self.drift.observe(part.to(self.accelerator.device), attention_mask=mine.to(self.accelerator.device))

    def _step(self, step: int) -> int:
        """Take a step with all that is due after it; return the number of finished steps."""
        config, finished = self.config, step + 1
        last = finished == config.steps
        evaluate = last or (config.evaluate_every > 0 and finished % config.evaluate_every == 0)
        save = last or finished % config.checkpoint_every == 0
        log = save or step == 0 or finished % config.log_every == 0  # before saving: a diverged state is not kept
        torch.manual_seed(mix(config.seed, DROPOUT, step, self.rank))
        frozen: AbstractContextManager[None] = nullcontext()
        if config.freeze_queues and isinstance(self.drift, DriftObjective):
            frozen = self.drift.frozen_queues()
        with frozen:
            batches = self._batches(step)
            record = self.optimization.step(step, self.objective, batches, count=self.micro_batches, log=log)
        shown = {name: record[name] for name in SHOWN if name in record} if record is not None else None
        self.records.advance(finished, shown)
        if record is not None:
            self.records.figures("train", finished, {**record, "step": finished})
        better = self._evaluate(finished) if evaluate else None
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

    def _evaluate(self, finished: int) -> Best | None:
        """Sample and measure the averaged model; return its step and score if it is the best so far."""
        if not self.config.evaluate_nfe:
            return None
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
        better: Best | None = None
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
                better = {"step": finished, "score": score}
        found: Best | None = told(self.accelerator, better)
        return found

    def _save(self, finished: int, better: Best | None = None) -> None:
        """Write a checkpoint; where that fails, say so and go on, since the one before is whole."""
        groups = self._groups()
        if not self.main:
            return
        best = better or self.best
        state = {"data": self.data.position(), "evaluations": self.evaluations, "way": self.way, "best": best}
        try:
            self.folder.save(finished, groups, state, keep=[int(best["step"])] if best else [])
        except OSError as error:
            self.records.warn(
                finished,
                f"the checkpoint of step {finished} could not be written ({error}); training goes on, and an "
                "interruption would go back to the one before.",
            )
            return
        self.best = best  # not before: the checkpoint of the old best is kept until that of the new one is whole
        if better:
            self._export_best(finished, groups)

    def _export_best(self, step: int, groups: Mapping[str, Tensors]) -> None:
        """Write the best model; where that fails, say so: its checkpoint is kept, and the next start tries again."""
        try:
            self.folder.export(groups, self._rows(step), step, best=True)
        except OSError as error:
            self.records.warn(step, f"the best model, of step {step}, could not be written ({error}).")

    def _newest(self, tell: Callable[[str], object]) -> Stored | None:
        """Read the newest whole checkpoint, which has to be of this run; None without any."""
        found = self.folder.newest(tell) if self.main else None
        place = told(self.accelerator, str(found[0]) if found else None)
        if place is None:
            return None
        stored = found[1] if found else self.folder.load(Path(place))
        self.folder.check_same_run(stored.state)
        return stored

    def _resume(self, stored: Stored) -> None:
        """Go on from a checkpoint; where evaluations are made in another way now, begin them anew."""
        state = stored.state
        finished, before = int(state["step"]), state.get("way", self.way)
        anew = before != self.way and bool(self.config.evaluate_nfe)
        if anew:
            self.records.warn(
                finished,
                f"evaluations were made with {before} and are with {self.way} from here on: what was measured before "
                "stays in log.jsonl alone, and the best checkpoint is chosen among later ones.",
            )
            self._evaluate(0)  # the model before, whose weights are still in place
        queues = stored.tensors.pop("queues", {})
        if self.drift is not None:
            self.drift.load_state_dict(queues)
        self.optimization.load_state(stored.tensors)
        self.data.restore(state["data"])
        if anew:
            self._save(finished, self._evaluate(finished))
        elif self.main:
            self.evaluations, self.best, self.way = state["evaluations"], state["best"], before
            self._restore_best()

    def _restore_best(self) -> None:
        """Write the best model from its checkpoint: a kill may have come between the two."""
        if self.best is None:
            return
        step = int(self.best["step"])
        try:
            groups = self.folder.load_step(step).tensors
        except (TokenDriftError, OSError) as error:
            self.records.warn(step, f"the best model, of step {step}, stays as it was written: {error}")
        else:
            self._export_best(step, groups)

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
        weight = self.config.weight_of_base()
        if isinstance(self.drift, PairDriftLoss):
            options: dict[str, Any] = {"generator": self.generator, "share": (self.rank, self.ranks)}
            return OwnTrajectories(process, self.drift, self.config.chains, weight, **options)
        # The lift alone reads the logits: they need not exist.
        lean = isinstance(self.drift, TokenDriftLoss) and not weight
        return Drift(process, self.drift, weight, self.generator, hold_logits=not lean)

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
