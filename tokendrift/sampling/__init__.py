"""Samplers with measured function evaluations: one loop, and samplers that give it the distribution of each step."""

from tokendrift.sampling.ancestral import Analytic, Ancestral
from tokendrift.sampling.categorical import Drawn, draw
from tokendrift.sampling.chain import Chain, Sampler
from tokendrift.sampling.first_hitting import FirstHitting
from tokendrift.sampling.loop import Samples, sample
from tokendrift.sampling.named import SAMPLERS, named_sampler
from tokendrift.sampling.psi import Psi, psi_step, remasking_kappa
from tokendrift.sampling.remdm import ReMDM, remdm_loop
from tokendrift.sampling.sample_set import BadLine, SampleSet, SamplingSetting, denoiser_samples
from tokendrift.sampling.shaping import Shaping

__all__ = [
    "SAMPLERS",
    "Analytic",
    "Ancestral",
    "BadLine",
    "Chain",
    "Drawn",
    "FirstHitting",
    "Psi",
    "ReMDM",
    "SampleSet",
    "Sampler",
    "Samples",
    "SamplingSetting",
    "Shaping",
    "denoiser_samples",
    "draw",
    "named_sampler",
    "psi_step",
    "remasking_kappa",
    "remdm_loop",
    "sample",
]
