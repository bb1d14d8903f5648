"""Training: objectives, one optimiser step for all of them, and `refine`, which survives being killed."""

from tokendrift.models.tokenizer import TextTokenizer, text_tokenizer
from tokendrift.training.card import evaluation_table
from tokendrift.training.config import RefineConfig
from tokendrift.training.objectives import (
    Continuation,
    CurriculumContinuation,
    Denoising,
    Drift,
    Objective,
    ScoreEntropy,
    StepLoss,
)
from tokendrift.training.optimization import LoopConfig, Optimization, train, windows
from tokendrift.training.packing import PackedText
from tokendrift.training.records import read_log
from tokendrift.training.refinement import Refined, refine
from tokendrift.training.settings import PRESETS, make_config, parse_settings
from tokendrift.training.text import DatasetRows, Documents, Piece, TextFiles
from tokendrift.training.trajectories import OwnTrajectories, places

__all__ = [
    "PRESETS",
    "Continuation",
    "CurriculumContinuation",
    "DatasetRows",
    "Denoising",
    "Documents",
    "Drift",
    "LoopConfig",
    "Objective",
    "Optimization",
    "OwnTrajectories",
    "PackedText",
    "Piece",
    "RefineConfig",
    "Refined",
    "ScoreEntropy",
    "StepLoss",
    "TextFiles",
    "TextTokenizer",
    "evaluation_table",
    "make_config",
    "parse_settings",
    "places",
    "read_log",
    "refine",
    "text_tokenizer",
    "train",
    "windows",
]
