"""The mirror teachers of TokenDrift: drifting in the space of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tokendrift._checks import check_scale
from tokendrift.features import PooledFeatures
from tokendrift.loss import MirrorTeacherLoss
from tokendrift.training.objectives.drift import EncoderObjectiveConfig


@dataclass(frozen=True)
class MirrorKLConfig(EncoderObjectiveConfig):
    """Settings of the objective ``mirror-kl``: the mirror teacher whose distance is the Kullback-Leibler divergence.

    Attributes:
        mirror_step: Step size eta of the mirror teacher.
    """

    description: ClassVar[str] = "the KL mirror teacher of TokenDrift (arXiv 2605.19470)"
    distance: ClassVar[Literal["kl", "mse"]] = "kl"
    mirror_step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("mirror_step", self.mirror_step, symbol="eta")

    def loss(self, features: PooledFeatures, **options: Any) -> MirrorTeacherLoss:
        options = options | {"distance": self.distance, "step_size": self.mirror_step}
        return MirrorTeacherLoss(features.embedding, features, **options)


@dataclass(frozen=True)
class MirrorMSEConfig(MirrorKLConfig):
    """Settings of the objective ``mirror-mse``: the mirror teacher with the mean squared error of logits.

    Attributes:
        mirror_step: Step size eta of the mirror teacher.
    """

    description: ClassVar[str] = "the MSE mirror teacher of TokenDrift (arXiv 2605.19470)"
    distance: ClassVar[Literal["kl", "mse"]] = "mse"
