"""Training: objectives, one optimiser step for all of them, and `refine`, which can be interrupted at any time."""

import sys

from tokendrift.models.tokenizer import TextTokenizer, text_tokenizer
from tokendrift.training.card import evaluation_table
from tokendrift.training.config import PRESETS, RefineConfig, make_config, parse_settings
from tokendrift.training.objectives import OBJECTIVES
from tokendrift.training.objectives.consistency_distillation import (
    ConsistencyDistillation,
    ConsistencyDistillationConfig,
)
from tokendrift.training.objectives.continuation import Continuation, CurriculumContinuation, Denoising, ScoreEntropy
from tokendrift.training.objectives.drift import CombinedConfig, Drift, DriftConfig
from tokendrift.training.objectives.matching_config import MatchingConfig
from tokendrift.training.objectives.matching_objective import DistributionMatching
from tokendrift.training.objectives.objective import (
    Objective,
    ObjectiveConfig,
    ObjectiveSetup,
    StatefulObjective,
    StepLoss,
)
from tokendrift.training.objectives.own_chains import OwnChains, chain_positions
from tokendrift.training.objectives.rounds import RoundDistillation, RoundsConfig, divergence
from tokendrift.training.objectives.self_distillation import SelfDistillation, SelfDistillationConfig
from tokendrift.training.objectives.trajectories import OwnTrajectories, PairsConfig
from tokendrift.training.optimization import LoopConfig, Optimization, train, windows
from tokendrift.training.packing import PackedText
from tokendrift.training.records import read_log
from tokendrift.training.refinement import Refined, refine
from tokendrift.training.text import DatasetRows, Documents, Piece, TextFiles

# The name that the module had in earlier versions.
sys.modules["tokendrift.training.tokenizer"] = sys.modules["tokendrift.models.tokenizer"]

__all__ = [
    "OBJECTIVES",
    "PRESETS",
    "CombinedConfig",
    "ConsistencyDistillation",
    "ConsistencyDistillationConfig",
    "Continuation",
    "CurriculumContinuation",
    "DatasetRows",
    "Denoising",
    "DistributionMatching",
    "Documents",
    "Drift",
    "DriftConfig",
    "LoopConfig",
    "MatchingConfig",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSetup",
    "Optimization",
    "OwnChains",
    "OwnTrajectories",
    "PackedText",
    "PairsConfig",
    "Piece",
    "RefineConfig",
    "Refined",
    "RoundDistillation",
    "RoundsConfig",
    "ScoreEntropy",
    "SelfDistillation",
    "SelfDistillationConfig",
    "StatefulObjective",
    "StepLoss",
    "TextFiles",
    "TextTokenizer",
    "chain_positions",
    "divergence",
    "evaluation_table",
    "make_config",
    "parse_settings",
    "read_log",
    "refine",
    "text_tokenizer",
    "train",
    "windows",
]
