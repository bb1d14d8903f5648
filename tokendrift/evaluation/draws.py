"""Names that `tokendrift.sampling` has now, and the types of what a sweep is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tokendrift.evaluation.measures import Measures
from tokendrift.evaluation.samples import Samples
from tokendrift.sampling.sample_set import SamplingSetting, denoiser_samples

Setting = SamplingSetting
DrawSamples: TypeAlias = Callable[[SamplingSetting, int], Samples]
"""Draws n samples at a setting, always the same for the same arguments; a `SampleSet` also says its measured NFE."""
MeasureSamples: TypeAlias = Callable[[Samples], Measures]
"""Measures a set: ``lambda samples: measure(samples, judge, tokenizer=tokenizer)``."""

__all__ = ["DrawSamples", "MeasureSamples", "Setting", "denoiser_samples"]
