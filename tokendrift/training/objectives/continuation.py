"""The backbones' own objectives: the likelihood bound, cross-entropy, score entropy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokendrift.diffusion import Corruption, GaussianCurriculum, Process, network_log_score, score_entropy
from tokendrift.training.objectives.objective import (
    Network,
    ObjectiveConfig,
    ObjectiveSetup,
    StatefulObjective,
    StepLoss,
    corrupt_rows,
)


@dataclass
class CorruptionObjective(StatefulObjective, ABC):
    """Base of objectives that call the network once on corrupted text.

    Attributes:
        process: The corruption process.
        generator: Source of times and noise; PyTorch's global generator by default.
        share: Rank of this process and the number of processes, see `corrupt_rows`.
    """

    process: Process
    generator: torch.Generator | None = None
    share: tuple[int, int] = (0, 1)
    figure: ClassVar[str]  # name of the loss in the log

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        corrupted = corrupt_rows(self.process, x0, generator=self.generator, share=self.share)
        loss = self.loss(corrupted.denoise(model), x0, corrupted)
        return StepLoss(loss, {self.figure: loss.detach()})

    @abstractmethod
    def loss(self, output: Tensor, x0: Tensor, corrupted: Corruption) -> Tensor:
        """Return the loss of the network's output (B, L, V), nats per token."""


@dataclass
class Continuation(CorruptionObjective):
    """The backbone's own objective: the mean NELBO per token, in nats. The attributes are those of `Denoising`."""

    figure = "nelbo"

    def loss(self, output: Tensor, x0: Tensor, corrupted: Corruption) -> Tensor:
        return self.process.nelbo(output, x0, corrupted.x_t, corrupted.t).mean()


@dataclass
class Denoising(CorruptionObjective):
    """Cross-entropy of x0 at the predicted positions, in nats per position, without the weight of the bound.

    The prediction is that given all of x_t, `Process.completion_logits`: a uniform-state model that is trained with
    this loss has the same minimiser as with the bound. For masked diffusion this is the NELBO reweighted by t. A small
    model leaves the plateau on which it predicts unigrams far sooner with it than with the bound itself.

    Attributes:
        process: The corruption process.
        generator: Source of times and noise; PyTorch's global generator by default.
        share: Rank of this process and the number of processes, which then draw the noise that one process would.
    """

    figure = "cross_entropy"

    def loss(self, output: Tensor, x0: Tensor, corrupted: Corruption) -> Tensor:
        logits = self.process.completion_logits(output, corrupted.x_t, corrupted.t)
        return self.process.nll(logits, x0, corrupted.x_t).sum() / corrupted.predicted.sum().clamp_min(1)


@dataclass
class ScoreEntropy(CorruptionObjective):
    """SEDD's objective: the mean denoising score entropy per token, in nats.

    The network is the score network itself. The attributes are those of `Denoising`.
    """

    figure = "score_entropy"

    def loss(self, output: Tensor, x0: Tensor, corrupted: Corruption) -> Tensor:
        log_s = network_log_score(self.process, output, corrupted.x_t, corrupted.sigma)
        return score_entropy(self.process, log_s, x0, corrupted.x_t, corrupted.t).mean()


@dataclass
class CurriculumContinuation(StatefulObjective):
    """DUO's own training: `Continuation` with the process that the curriculum gives for the step.

    Attributes:
        curriculum: Gives the process of each step.
        generator: Source of times and noise; PyTorch's global generator by default.
        step: Number of optimiser steps so far. Outside of `step_context`, each call that trains counts as one. It is
            part of ``state_dict``.
    """

    curriculum: GaussianCurriculum
    generator: torch.Generator | None = None
    step: int = 0
    _within = False  # a step, whose micro-batches have one process

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        found = Continuation(self.curriculum.at(self.step), self.generator)(model, x0, log=log)
        self.step += torch.is_grad_enabled() and not self._within  # an evaluation does not move the curriculum
        return found

    @contextmanager
    def step_context(self) -> Iterator[None]:
        self._within = True
        try:
            yield
        finally:
            self._within = False
        self.step += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.step = int(state["step"])


@dataclass(frozen=True)
class ContinuationConfig(ObjectiveConfig):
    """Settings of the objective ``continuation``: the backbone's own training, without options."""

    description: ClassVar[str] = "its own denoising objective"

    def build(self, setup: ObjectiveSetup) -> Continuation:
        return Continuation(setup.process, setup.generator, setup.share)
