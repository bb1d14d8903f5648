"""Objectives of training, one file each, and the table by which `refine` finds them.

A new objective is a frozen dataclass that derives from `ObjectiveConfig`, and a line in `OBJECTIVES`.
"""

from tokendrift.training.objectives.continuation import (
    Continuation,
    ContinuationConfig,
    CurriculumContinuation,
    Denoising,
    ScoreEntropy,
)
from tokendrift.training.objectives.drift import CombinedConfig, Drift, DriftConfig
from tokendrift.training.objectives.mirror import MirrorKLConfig, MirrorMSEConfig
from tokendrift.training.objectives.objective import (
    Objective,
    ObjectiveConfig,
    ObjectiveSetup,
    StatefulObjective,
    StepLoss,
    corrupt_rows,
)
from tokendrift.training.objectives.trajectories import OwnTrajectories, PairsConfig, chain_positions

__all__ = [
    "OBJECTIVES",
    "CombinedConfig",
    "Continuation",
    "ContinuationConfig",
    "CurriculumContinuation",
    "Denoising",
    "Drift",
    "DriftConfig",
    "MirrorKLConfig",
    "MirrorMSEConfig",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSetup",
    "OwnTrajectories",
    "PairsConfig",
    "ScoreEntropy",
    "StatefulObjective",
    "StepLoss",
    "chain_positions",
    "corrupt_rows",
]

# Name in settings, TOML files and on the command line -> settings of the objective. Add one to register it.
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "drift": DriftConfig,
    "continuation": ContinuationConfig,
    "combined": CombinedConfig,
    "pairs": PairsConfig,
    "mirror-kl": MirrorKLConfig,
    "mirror-mse": MirrorMSEConfig,
}
