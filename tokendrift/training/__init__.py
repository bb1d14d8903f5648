"""Training: objectives, one optimiser step for all of them, and `refine`, which survives being killed."""

from tokendrift.models.tokenizer import TextTokenizer, text_tokenizer
from tokendrift.training.card import evaluation_table
from tokendrift.training.config import PRESETS, RefineConfig, make_config, parse_settings
from tokendrift.training.objectives import (
    OBJECTIVES,
    CombinedConfig,
    Continuation,
    ContinuationConfig,
    CurriculumContinuation,
    Denoising,
    Drift,
    DriftConfig,
    MirrorKLConfig,
    MirrorMSEConfig,
    Objective,
    ObjectiveConfig,
    ObjectiveSetup,
    OwnTrajectories,
    PairsConfig,
    ScoreEntropy,
    StatefulObjective,
    StepLoss,
    chain_positions,
)
from tokendrift.training.optimization import LoopConfig, Optimization, train, windows
from tokendrift.training.packing import PackedText
from tokendrift.training.records import read_log
from tokendrift.training.refinement import Refined, refine
from tokendrift.training.text import DatasetRows, Documents, Piece, TextFiles

__all__ = [
    "OBJECTIVES",
    "PRESETS",
    "CombinedConfig",
    "Continuation",
    "ContinuationConfig",
    "CurriculumContinuation",
    "DatasetRows",
    "Denoising",
    "Documents",
    "Drift",
    "DriftConfig",
    "LoopConfig",
    "MirrorKLConfig",
    "MirrorMSEConfig",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSetup",
    "Optimization",
    "OwnTrajectories",
    "PackedText",
    "PairsConfig",
    "Piece",
    "RefineConfig",
    "Refined",
    "ScoreEntropy",
    "StatefulObjective",
    "StepLoss",
    "TextFiles",
    "TextTokenizer",
    "chain_positions",
    "evaluation_table",
    "make_config",
    "parse_settings",
    "read_log",
    "refine",
    "text_tokenizer",
    "train",
    "windows",
]
