"""Objectives of training, one file each, and the table by which `refine` finds them.

A new objective is a frozen dataclass that derives from `ObjectiveConfig`, and a line in `OBJECTIVES`.
"""

from tokendrift.training.objectives.consistency_distillation import ConsistencyDistillationConfig
from tokendrift.training.objectives.continuation import ContinuationConfig
from tokendrift.training.objectives.drift import CombinedConfig, DriftConfig
from tokendrift.training.objectives.matching_config import MatchingConfig
from tokendrift.training.objectives.mirror import MirrorKLConfig, MirrorMSEConfig
from tokendrift.training.objectives.objective import ObjectiveConfig
from tokendrift.training.objectives.self_distillation import SelfDistillationConfig
from tokendrift.training.objectives.trajectories import PairsConfig

# Name in settings, TOML files and on the command line -> settings of the objective. Add one to register it.
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "drift": DriftConfig,
    "continuation": ContinuationConfig,
    "combined": CombinedConfig,
    "pairs": PairsConfig,
    "matching": MatchingConfig,
    "mirror-kl": MirrorKLConfig,
    "mirror-mse": MirrorMSEConfig,
    "sdtt": SelfDistillationConfig,
    "dcd": ConsistencyDistillationConfig,
}
