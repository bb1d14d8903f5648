"""The drifting loss of TokenDrift on corrupted text: alone, or beside the backbone's own objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tokendrift._checks import (
    check_count,
    check_fraction,
    check_positive,
    check_scale,
    check_takes,
    check_temperatures,
    fail,
)
from tokendrift.diffusion import Process
from tokendrift.features import PooledFeatures
from tokendrift.lift import LinearLogits
from tokendrift.loss import Diagnostics, MirrorTeacherLoss, TokenDriftLoss
from tokendrift.models import DiT
from tokendrift.training.objectives.objective import (
    Network,
    ObjectiveConfig,
    ObjectiveSetup,
    StatefulObjective,
    StepLoss,
    corrupt_rows,
)
from tokendrift.variants import build_field


@dataclass
class Drift(StatefulObjective):
    """A drifting loss alone, or with the backbone's own objective beside it.

    Attributes:
        process: Corruption and NELBO.
        drift: The drifting loss, or a mirror teacher.
        base_weight: Weight of the NELBO beside it; 0, the default, is the paper's.
        generator: Source of times and noise; PyTorch's global generator by default.
        hold_logits: Whether the network returns logits (B, L, V). If False, it is passed the loss as its ``head``, see
            `DiT.forward`: loss and gradients are the same up to rounding, without the two largest tensors of the step.
        share: Rank of this process and the number of processes, which then draw the noise that one process would.
        freeze_queues: Whether all micro-batches of a step see the same queues, see `TokenDriftLoss`.

    Raises:
        TokenDriftError: If ``hold_logits`` is False and something needs the logits: the NELBO, a mirror teacher, or the
            straight-through lift.
    """

    process: Process
    drift: TokenDriftLoss | MirrorTeacherLoss
    base_weight: float = 0.0
    generator: torch.Generator | None = None
    hold_logits: bool = True
    share: tuple[int, int] = (0, 1)
    freeze_queues: bool = False

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

    @property
    def module(self) -> nn.Module:
        return self.drift

    def step_context(self) -> AbstractContextManager[None]:
        return self.drift.frozen_queues() if self.freeze_queues else nullcontext()

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        corrupted = corrupt_rows(self.process, x0, generator=self.generator, share=self.share)

        def drifted(logits: Tensor | LinearLogits) -> StepLoss:
            where = {"noisy_ids": corrupted.x_t, "predicted": corrupted.predicted}
            if not log:
                return StepLoss(self.drift(logits, x0, **where), {})
            loss, diagnostics = self.drift(logits, x0, **where, return_diagnostics=True)
            return StepLoss(loss, diagnostic_logs(diagnostics, getattr(self.drift.field, "temperatures", ())))

        # Without logits: the network calls the loss with its hidden states and its output layer.
        if not self.hold_logits:
            with check_takes("head", "Leave hold_logits at True, or pass a denoiser that takes head, as DiT does."):
                loss, logs = model(corrupted.x_t, corrupted.sigma, head=drifted)
            return StepLoss(loss, {**logs, "drift": loss.detach()})
        # With logits: the drifting loss, and the NELBO where it has a weight.
        logits = corrupted.denoise(model)
        loss, logs = drifted(logits)
        logs["drift"] = loss.detach()
        if self.base_weight:
            nelbo = self.process.nelbo(logits, x0, corrupted.x_t, corrupted.t).mean()
            logs["nelbo"] = nelbo.detach()
            loss = loss + self.base_weight * nelbo
        return StepLoss(loss, logs)


def diagnostic_logs(diagnostics: Diagnostics, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """Return the diagnostics as scalars by name.

    They are ``token_entropy`` (nats), ``queue`` (features held), ``raw_drift_rms`` (the mean over temperatures), and
    for each temperature ``raw_drift_rms/0.02``, ``positive_mass/0.02`` and so on.
    """
    entropy = diagnostics.token_entropy
    logs = {"token_entropy": entropy, "queue": entropy.new_full((), diagnostics.queue_generated)}
    if diagnostics.field is not None:
        of_field = diagnostics.field
        logs["raw_drift_rms"] = of_field.rms.mean()
        for number, tau in enumerate(temperatures):
            logs[f"raw_drift_rms/{tau:g}"] = of_field.rms[number]
            for name in ("positive_mass", "effective_references", "pair_weight"):
                logs[f"{name}/{tau:g}"] = getattr(of_field, name)[number]
    return logs


@dataclass(frozen=True)
class EncoderObjectiveConfig(ObjectiveConfig):
    """Base of the objectives that compare features of a frozen copy of the checkpoint in a drift field.

    Attributes:
        temperatures: Temperatures tau of the drift field.
        queue_size: Number of features in each of the two queues.
        normalization: How the drift field normalises its kernel weights: ``"joint"`` (the paper's), ``"separate"``,
            ``"two_sided"`` or ``"sinkhorn"``, see `tokendrift.variants`.
        kernel: Kernel of the drift field: ``"gaussian"`` (the paper's), ``"laplace"`` or ``"sharp_laplace"``.
        exclude_paired_positive: Whether to hide from each generated sequence the real sequence that it was made from.
        window: Number of positions pooled into one feature; must divide the length of a sequence. Default: the whole
            sequence, as in the paper.
        encoder_time: Diffusion time in [0, 1) that is given to a time-conditioned encoder; 0 is clean text.
        freeze_queues: Whether all micro-batches of a step see the same queues. By default each micro-batch enters the
            queues at once, as in the paper.
    """

    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)
    queue_size: int = 1024
    normalization: Literal["joint", "separate", "two_sided", "sinkhorn"] = "joint"
    kernel: Literal["gaussian", "laplace", "sharp_laplace"] = "gaussian"
    exclude_paired_positive: bool = False
    window: int | None = None
    encoder_time: float = 0.0
    freeze_queues: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperatures(self.temperatures, symbol="tau")
        check_count("queue_size", self.queue_size, most=10**8)
        if self.window is not None:
            check_count("window", self.window, least=1)
        check_fraction("encoder_time", self.encoder_time, ": a diffusion time, 0 is clean")

    @abstractmethod
    def loss(self, features: PooledFeatures, **options: Any) -> TokenDriftLoss | MirrorTeacherLoss:
        """Return the loss on features of the frozen encoder; the options are those that both losses share."""

    def nelbo_weight(self) -> float:
        """Return the weight of the backbone's own objective beside the loss."""
        return 0.0

    def drifting_loss(self, setup: ObjectiveSetup) -> TokenDriftLoss | MirrorTeacherLoss:
        """Return the loss on features of a frozen copy of the checkpoint.

        Raises:
            TokenDriftError: If the settings do not fit the checkpoint or the length.
        """
        # 1. The settings must fit the checkpoint.
        if self.window is not None and setup.length % self.window:
            raise fail(f"window must divide the length of a sequence, {setup.length}.", window=self.window)
        if self.encoder_time and not setup.base.time_conditioned:
            raise fail(
                "encoder_time was given, but the checkpoint is not conditioned on time.",
                "Leave it out.",
                encoder_time=self.encoder_time,
            )
        # 2. The frozen encoder is a copy of the checkpoint, at the noise level of encoder_time.
        sigma = setup.process.sigma(torch.tensor(self.encoder_time)).item() if self.encoder_time else 0.0
        return self.loss(
            PooledFeatures(setup.base, window=self.window, sigma=sigma),
            field=build_field(self.temperatures, kernel=self.kernel, normalization=self.normalization),
            queue_size=self.queue_size,
            mask_id=setup.process.mask_id,
            exclude_paired_positive=self.exclude_paired_positive,
        )

    def build(self, setup: ObjectiveSetup) -> StatefulObjective:
        loss = self.drifting_loss(setup)
        # Where the lift alone reads the logits, they need not exist.
        weight = self.nelbo_weight()
        hold = bool(weight) or not isinstance(loss, TokenDriftLoss) or not isinstance(setup.base, DiT)
        common = {"share": setup.share, "freeze_queues": self.freeze_queues}
        return Drift(setup.process, loss, weight, setup.generator, hold_logits=hold, **common)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DriftConfig(EncoderObjectiveConfig):
    """Settings of the objective ``drift``: the drifting loss alone, as in the paper.

    Attributes:
        drift_scale: Factor alpha on the drift.
    """

    description: ClassVar[str] = "the drifting loss of TokenDrift (arXiv 2605.19470) alone, without the denoising loss"
    drift_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("drift_scale", self.drift_scale, symbol="alpha")

    def loss(self, features: PooledFeatures, **options: Any) -> TokenDriftLoss:
        return TokenDriftLoss(features.embedding, features, drift_scale=self.drift_scale, **options)


@dataclass(frozen=True)
class CombinedConfig(DriftConfig):
    """Settings of the objective ``combined``: the drifting loss and the backbone's own objective.

    Attributes:
        base_weight: Weight of the NELBO beside the drifting loss, above 0.
    """

    description: ClassVar[str] = "the drifting loss of TokenDrift (arXiv 2605.19470) beside its own denoising objective"
    base_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("base_weight", self.base_weight)

    def nelbo_weight(self) -> float:
        return self.base_weight
