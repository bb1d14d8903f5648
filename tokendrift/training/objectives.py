"""Training objectives: what one batch of clean ids costs a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokendrift._checks import fail
from tokendrift.diffusion import GaussianCurriculum, Process, network_log_score, score_entropy
from tokendrift.lift import LinearLogits
from tokendrift.loss import Diagnostics, MirrorTeacherLoss, TokenDriftLoss

Network = Callable[..., Any]  # a denoiser; for other objectives whatever they can call


class StepLoss(NamedTuple):
    """The loss of one batch, and detached scalars worth a curve."""

    loss: Tensor
    logs: dict[str, Tensor]


class Objective(Protocol):
    """Maps a model and clean ids (B, L) to a loss; ``log`` asks for diagnostics."""

    def __call__(self, model: Network, x0: Tensor, /, *, log: bool = False) -> StepLoss:
        """Return the loss of one batch."""
        ...


@dataclass
class Continuation:
    """The backbone's own objective: the mean NELBO per token, nats.

    Attributes:
        process: Corruption and NELBO.
        generator: Source of times and noise.
    """

    process: Process
    generator: torch.Generator | None = None

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        corrupted = self.process.corrupt(x0, generator=self.generator)
        logits = corrupted.denoise(model)
        loss = self.process.nelbo(logits, x0, corrupted.x_t, corrupted.t).mean()
        return StepLoss(loss, {"nelbo": loss.detach()})


@dataclass
class CurriculumContinuation:
    """DUO's own training: `Continuation` with the process that the curriculum names for the step.

    Attributes:
        curriculum: Which process when.
        generator: Source of times and noise.
        step: Calls so far; set it to resume.
    """

    curriculum: GaussianCurriculum
    generator: torch.Generator | None = None
    step: int = 0

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        found = Continuation(self.curriculum.at(self.step), self.generator)(model, x0, log=log)
        self.step += 1
        return found


@dataclass
class Denoising:
    """Cross-entropy of x0 at the predicted positions, nats, without the weight of the bound.

    With masks this is the NELBO reweighted by t: it leaves the plateau on which a small model predicts
    unigrams far sooner than the bound itself.

    Attributes:
        process: Corruption.
        generator: Source of times and noise.
    """

    process: Process
    generator: torch.Generator | None = None

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        corrupted = self.process.corrupt(x0, generator=self.generator)
        logits = corrupted.denoise(model)
        nll = self.process.nll(logits, x0, corrupted.x_t)
        loss = nll.sum() / corrupted.predicted.sum().clamp_min(1)
        return StepLoss(loss, {"cross_entropy": loss.detach()})


@dataclass
class ScoreEntropy:
    """SEDD's objective: the mean denoising score entropy per token, nats. The model is the score network itself.

    Attributes:
        process: Corruption and rates.
        generator: Source of times and noise.
    """

    process: Process
    generator: torch.Generator | None = None

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        corrupted = self.process.corrupt(x0, generator=self.generator)
        output = corrupted.denoise(model)
        log_s = network_log_score(self.process, output, corrupted.x_t, corrupted.sigma)
        loss = score_entropy(self.process, log_s, x0, corrupted.x_t, corrupted.t).mean()
        return StepLoss(loss, {"score_entropy": loss.detach()})


@dataclass
class Drift:
    """A drifting loss alone, or with a share of the backbone's own objective.

    Attributes:
        process: Corruption and NELBO.
        drift: The drifting loss, or a mirror teacher.
        base_weight: Weight of the NELBO beside it; 0 as in the paper.
        generator: Source of times and noise.
        hold_logits: Whether the network gives logits (B, L, V). If not, it is handed the loss as its ``head``, see
            `DiT.forward`: the same loss and gradients up to rounding, without the two largest tensors of the step.

    Raises:
        TokenDriftError: If logits that are not held are needed: by the NELBO, by a mirror teacher, or by the
            straight-through lift.
    """

    process: Process
    drift: TokenDriftLoss | MirrorTeacherLoss
    base_weight: float = 0.0
    generator: torch.Generator | None = field(default=None)
    hold_logits: bool = True

    def __post_init__(self) -> None:
        if self.hold_logits:
            return
        if self.base_weight:
            reader = f"base_weight={self.base_weight}"
        elif isinstance(self.drift, MirrorTeacherLoss):
            reader = "a mirror teacher"
        elif self.drift.lift != "soft":
            reader = f"lift={self.drift.lift!r}"
        else:
            return
        raise fail(f"hold_logits is False, but {reader} needs the logits.", "Leave hold_logits at True.")

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        corrupted = self.process.corrupt(x0, generator=self.generator)

        def drifted(logits: Tensor | LinearLogits) -> StepLoss:
            where = {"noisy_ids": corrupted.x_t, "predicted": corrupted.predicted}
            if not log:
                return StepLoss(self.drift(logits, x0, **where), {})
            loss, diagnostics = self.drift(logits, x0, **where, return_diagnostics=True)
            return StepLoss(loss, diagnostic_logs(diagnostics, getattr(self.drift.field, "temperatures", ())))

        if not self.hold_logits:
            loss, logs = model(corrupted.x_t, corrupted.sigma, head=drifted)
            return StepLoss(loss, {**logs, "drift": loss.detach()})
        logits = corrupted.denoise(model)
        loss, logs = drifted(logits)
        logs["drift"] = loss.detach()
        if self.base_weight:
            nelbo = self.process.nelbo(logits, x0, corrupted.x_t, corrupted.t).mean()
            logs["nelbo"] = nelbo.detach()
            loss = loss + self.base_weight * nelbo
        return StepLoss(loss, logs)


def diagnostic_logs(diagnostics: Diagnostics, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """Return the diagnostics as scalars: ``token_entropy``, ``queue``, ``raw_drift_rms`` (the mean over temperatures),
    and of each temperature ``raw_drift_rms/0.02`` and the like.
    """
    entropy = diagnostics.token_entropy
    logs = {"token_entropy": entropy, "queue": entropy.new_tensor(float(diagnostics.queue_generated))}
    if diagnostics.field is not None:
        of_field = diagnostics.field
        logs["raw_drift_rms"] = of_field.rms.mean()
        for number, tau in enumerate(temperatures):
            logs[f"raw_drift_rms/{tau:g}"] = of_field.rms[number]
            logs[f"positive_mass/{tau:g}"] = of_field.positive_mass[number]
            logs[f"effective_references/{tau:g}"] = of_field.effective_references[number]
            logs[f"pair_weight/{tau:g}"] = of_field.pair_weight[number]
    return logs
