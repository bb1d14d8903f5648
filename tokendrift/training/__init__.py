"""Training: the backbone's own objective, drift, and one loop for both."""

from tokendrift.training.loop import LoopConfig, train, windows
from tokendrift.training.objectives import (
    Continuation,
    CurriculumContinuation,
    Denoising,
    Drift,
    Objective,
    ScoreEntropy,
    StepLoss,
    validation_nelbo,
)

__all__ = [
    "Continuation",
    "CurriculumContinuation",
    "Denoising",
    "Drift",
    "LoopConfig",
    "Objective",
    "ScoreEntropy",
    "StepLoss",
    "train",
    "validation_nelbo",
    "windows",
]
