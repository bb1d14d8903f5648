"""What the study compares: one named setting an arm; an ablation is a single change to the paper's setting or ours."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tokendrift import DriftField, MirrorTeacherLoss, PairDriftLoss, PooledFeatures, TokenDriftLoss
from tokendrift.diffusion import Process
from tokendrift.models import DiT
from tokendrift.training import (
    ConsistencyDistillation,
    ConsistencyDistillationConfig,
    Continuation,
    DistributionMatching,
    Drift,
    MatchingConfig,
    Objective,
    OwnTrajectories,
    SelfDistillation,
    SelfDistillationConfig,
    chain_positions,
)
from tokendrift.variants import ExtendedDriftField

Loss: TypeAlias = Literal[
    "none", "continuation", "drift", "mirror-kl", "mirror-mse", "pairs", "matching", "distillation"
]
PAPER_FIELD = DriftField(temperatures=(0.02, 0.05, 0.2))
MIRROR_STEP = 1000.0  # eta of the mirror teachers, not given by the paper: here a teacher is about 0.1 nats away


@dataclass(frozen=True)
class Arm:
    """One way of training a base further.

    Attributes:
        name: How the tables call it.
        group: The question it belongs to.
        loss: The backbone's own objective alone, the drifting loss, a mirror teacher, the drift of token pairs,
            distribution matching, the published distillation of the process, or nothing for the base as it is.
        base_weight: Weight of the backbone's objective beside the drift.
        lift: ``"soft"`` or ``"straight_through"``.
        window: Positions pooled into one feature; None pools the sequence.
        encoder_time: Diffusion time that a time-conditioned frozen encoder is told; 0 is clean.
        queue: Capacity of each queue, in features.
        exclude_pair: Hide an anchor's own clean text.
        field: The drift field.
        chains: Train on the model's own chains of these lengths; empty for corrupted real text.
        corrupted: Take corrupted real text at the times of the chains in place of the chains themselves.
        stratified: Keep a law of generated pairs for each place of the chains.
        rate: Factor on the instrument's learning rate.
        length: Factor on the number of steps.
    """

    name: str
    group: str
    loss: Loss = "drift"
    base_weight: float = 0.0
    lift: Literal["soft", "straight_through"] = "soft"
    window: int | None = None
    encoder_time: float = 0.0
    queue: int = 1024
    exclude_pair: bool = False
    field: DriftField = PAPER_FIELD
    chains: tuple[int, ...] = ()
    corrupted: bool = False
    stratified: bool = True
    rate: float = 1.0
    length: float = 1.0

    @property
    def slug(self) -> str:
        """The name as a part of a folder's name."""
        return "-".join(re.findall(r"[a-z0-9.]+", self.name.lower()))

    def key(self) -> dict[str, Any]:
        """Return everything that a result depends on: what differs from the paper's setting."""
        plain = {field.name: field.default for field in fields(self)}
        return {
            name: asdict(value) if isinstance(value, DriftField) else value
            for name, value in vars(self).items()
            if name not in ("name", "group") and value != plain[name]
        }


BASE = Arm("base, not trained further", "main", loss="none", length=0.0)
PAPER = Arm("TokenDrift, the paper's setting", "main")
CONTINUATION = Arm("continuation", "main", loss="continuation")
PAIRS = Arm("pairs on own chains", "main", loss="pairs", base_weight=0.1, chains=(2, 4), rate=2.0)
MATCHING = Arm("distribution matching", "main", loss="matching", base_weight=0.1, rate=5 / 3)  # the rate of the preset
DISTILLATION = Arm("SDTT (masked) or DCD (uniform-state)", "main", loss="distillation")
ROUNDS: dict[str, Any] = {"teacher_steps": 64, "round_steps": 240}  # five rounds, the last with 4 steps
MAIN = (CONTINUATION, PAPER, PAIRS, MATCHING, DISTILLATION)
LONGER = replace(PAIRS, name="pairs, no base loss, twice the steps", base_weight=0.0, length=2.0)


def _field(**options: Any) -> DriftField:
    return replace(PAPER.field, **options)


def _extended(**options: Any) -> ExtendedDriftField:
    return ExtendedDriftField(**({"temperatures": PAPER_FIELD.temperatures} | options))


def _variant(name: str, group: str, **changes: Any) -> Arm:
    return replace(PAPER, name=name, group=group, **changes)


PAPER_ABLATIONS = (
    _variant("hard tokens, straight-through", "lift", lift="straight_through"),
    _variant("mirror-KL", "loss", loss="mirror-kl"),
    _variant("mirror-KL + base loss", "loss", loss="mirror-kl", base_weight=1.0),
    _variant("mirror-MSE", "loss", loss="mirror-mse"),
    _variant("mirror-MSE + base loss", "loss", loss="mirror-mse", base_weight=1.0),
    _variant("feature loss + base loss", "loss", base_weight=1.0),
    _variant("queue 4", "queue", queue=4),
    _variant("queue 64", "queue", queue=64),
    _variant("attraction : repulsion = 1 : 0", "balance", field=_field(repulsion=0.0)),
    _variant("attraction : repulsion = 2 : 1", "balance", field=_field(attraction=2.0)),
    _variant("attraction : repulsion = 0 : 1", "balance", field=_field(attraction=0.0)),
    _variant("attraction : repulsion = 1 : 2", "balance", field=_field(repulsion=2.0)),
)
OUR_ABLATIONS = (
    replace(CONTINUATION, name="continuation, twice the rate", group="cost", rate=2.0),
    replace(CONTINUATION, name="continuation, three times the steps", group="cost", length=3.0),
    _variant("TokenDrift, twice the rate", "cost", rate=2.0),
    replace(PAIRS, name="pairs, half the rate", group="cost", rate=1.0),
    _variant("own clean text hidden", "pair", exclude_pair=True),
    _variant("separate", "normalisation", field=_field(normalization="separate")),
    _variant("two-sided", "normalisation", field=_field(normalization="two_sided")),
    _variant("Sinkhorn", "normalisation", field=_extended(normalization="sinkhorn")),
    _variant("no RMS normalisation", "normalisation", field=_field(rms_normalize=False)),
    _variant("Laplace", "kernel", field=_field(kernel="laplace")),
    _variant("sharp Laplace", "kernel", field=_extended(kernel="sharp_laplace")),
    _variant("noise floor subtracted", "noise floor", field=_extended(subtract_noise=True)),
    _variant("tau 0.02", "temperatures", field=_field(temperatures=(0.02,))),
    _variant("tau 0.2", "temperatures", field=_field(temperatures=(0.2,))),
    _variant("tau 0.2, 0.5, 2", "temperatures", field=_field(temperatures=(0.2, 0.5, 2.0))),
    _variant(
        "tau relative to the mean distance",
        "temperatures",
        field=_extended(temperatures=(0.1, 0.3, 1.0), feature_scaling=True),
    ),
    _variant("combined, weight 0.1", "combined", base_weight=0.1),
    _variant("combined, weight 0.3", "combined", base_weight=0.3),
    _variant("own chains", "inputs", chains=(2, 4)),
    replace(PAIRS, name="pairs, corrupted real text", group="pairs", corrupted=True),
    replace(PAIRS, name="pairs, no base loss", group="pairs", base_weight=0.0),
    replace(PAIRS, name="pairs, one law for all noise levels", group="pairs", stratified=False),
    _variant("windows of 2", "features", window=2, queue=2048),
    _variant("encoder told t = 0.5", "features", encoder_time=0.5),
)


def matching_config(arm: Arm, process: Process) -> MatchingConfig:
    """Return the settings of distribution matching, with the defaults of its process."""
    return MatchingConfig(base_weight=arm.base_weight).for_process(process)


def objective(arm: Arm, base: DiT, process: Process, seed: int, text: Tensor) -> Objective:
    """Return what the arm minimises, with a frozen copy of the base as encoder.

    Args:
        arm: The setting.
        base: What is trained further.
        process: Its process.
        seed: Of times and noise.
        text: Real text (n, L) that laws of pairs are counted from.
    """
    generator = torch.Generator().manual_seed(10 + seed)
    teacher = copy.deepcopy(base).eval().requires_grad_(False)
    if arm.loss in ("none", "continuation"):
        return Continuation(process, generator)
    if arm.loss == "matching":
        config = matching_config(arm, process)
        law = _observed(PairDriftLoss(process.vocab_size, mask_id=process.mask_id), text)
        options = {"config": config, "pair_loss": law, "generator": generator}
        return DistributionMatching(process, teacher, micro_batches=None, **options)
    if arm.loss == "distillation":
        if process.mask_id is None:
            consistency = ConsistencyDistillationConfig(**ROUNDS)
            return ConsistencyDistillation(process, teacher, consistency, generator=generator)
        settings = SelfDistillationConfig(**ROUNDS, fewest_steps=4, inner_times="released")
        return SelfDistillation(process, teacher, settings, generator=generator)
    if arm.loss == "pairs":
        strata = len(chain_positions(process, arm.chains)) if arm.stratified else 1
        pairs = _observed(PairDriftLoss(process.vocab_size, strata=strata, mask_id=process.mask_id), text)
        return OwnTrajectories(process, pairs, arm.chains, arm.base_weight, not arm.corrupted, generator)
    level = process.sigma(torch.tensor(arm.encoder_time)).item() if arm.encoder_time and base.time_conditioned else 0.0
    features = PooledFeatures(base, window=arm.window, sigma=level)
    options: dict[str, Any] = {
        "field": arm.field,
        "queue_size": arm.queue,
        "exclude_paired_positive": arm.exclude_pair,
        "mask_id": process.mask_id,
    }
    loss: TokenDriftLoss | MirrorTeacherLoss
    if arm.loss == "drift":
        loss = TokenDriftLoss(features.embedding, features, lift=arm.lift, **options)
    else:
        distance: Any = arm.loss.removeprefix("mirror-")
        loss = MirrorTeacherLoss(features.embedding, features, distance=distance, step_size=MIRROR_STEP, **options)
    if arm.chains and isinstance(loss, TokenDriftLoss):
        return OwnTrajectories(process, loss, arm.chains, arm.base_weight, generator=generator)
    return Drift(process, loss, arm.base_weight, generator)


def _observed(pairs: PairDriftLoss, text: Tensor) -> PairDriftLoss:
    """Return a loss of pairs that has counted real text."""
    for part in text.split(512):
        pairs.observe(part)
    return pairs


def warmup(steps: int) -> int:
    """Return the warm-up steps of a run."""
    return min(50, math.ceil(steps / 10))
