"""Corruption processes: masked (MDLM) and uniform-state (DUO), behind one protocol."""

from tokendrift.diffusion.curriculum import GaussianCurriculum
from tokendrift.diffusion.gaussian import ArgmaxNoise, GaussianDuality, GaussianUniformDiffusion, SoftCorruption
from tokendrift.diffusion.masked import MaskedDiffusion
from tokendrift.diffusion.process import Corruption, Denoiser, Mixture, Process
from tokendrift.diffusion.schedules import Cosine, DuoCosine, Geometric, Linear, LogLinear, Schedule, sample_times
from tokendrift.diffusion.score import (
    ScoreDenoiser,
    log_probs_from_score,
    log_score,
    network_log_score,
    score_entropy,
    score_posterior,
)
from tokendrift.diffusion.uniform import UniformDiffusion

__all__ = [
    "ArgmaxNoise",
    "Corruption",
    "Cosine",
    "Denoiser",
    "DuoCosine",
    "GaussianCurriculum",
    "GaussianDuality",
    "GaussianUniformDiffusion",
    "Geometric",
    "Linear",
    "LogLinear",
    "MaskedDiffusion",
    "Mixture",
    "Process",
    "Schedule",
    "ScoreDenoiser",
    "SoftCorruption",
    "UniformDiffusion",
    "log_probs_from_score",
    "log_score",
    "network_log_score",
    "sample_times",
    "score_entropy",
    "score_posterior",
]
