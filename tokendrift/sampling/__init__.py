"""Samplers with measured function evaluations."""

from tokendrift.sampling.ancestral import Samples, sample
from tokendrift.sampling.categorical import draw

__all__ = ["Samples", "draw", "sample"]
