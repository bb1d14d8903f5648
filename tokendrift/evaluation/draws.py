"""What a sweep asks of a model: samples at a setting, the same ones each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from tokendrift._checks import check_count
from tokendrift.diffusion.process import Denoiser, Process
from tokendrift.evaluation.measures import Measures
from tokendrift.evaluation.nelbo import LOGITS
from tokendrift.evaluation.samples import SampleInput, SampleSet
from tokendrift.modes import evaluation_mode
from tokendrift.sampling import sample


class Setting(NamedTuple):
    """How a model is sampled.

    Attributes:
        steps: Steps of the sampler.
        temperature: Divides the logits.
        top_p: Nucleus; 1 keeps every token.
    """

    steps: int
    temperature: float = 1.0
    top_p: float = 1.0


DrawSamples: TypeAlias = Callable[[Setting, int], SampleInput]
"""Draws n samples at a setting, always the same for the same arguments; a `SampleSet` also says its measured NFE."""
MeasureSamples: TypeAlias = Callable[[SampleInput], Measures]
"""Measures a set: ``lambda samples: measure(samples, judge, tokenizer=tokenizer)``."""


def denoiser_samples(
    denoiser: Denoiser, process: Process, length: int, *, batch_size: int | None = None, seed: int = 0, **options: Any
) -> DrawSamples:
    """Return a function that draws from a denoiser, for `sweep` and `at_matched_entropy`.

    Row i has the random numbers of (seed, i) at every setting and for every model, which makes comparisons paired.
    NFE is the most forward calls that a row took part in, as in a samples file.

    Args:
        denoiser: Maps ids (B, L) and sigma (B,) to logits (B, L, V); a module is put into evaluation mode and back.
        process: `MaskedDiffusion` or `UniformDiffusion`.
        length: L.
        batch_size: Sequences a forward call; by default 64, or as many as have `LOGITS` logits together.
        seed: Of the run.
        **options: Further options of `tokendrift.sampling.sample`, such as ``sampler`` or ``noise_removal``.
    """
    rows = max(1, min(64, LOGITS // (length * process.vocab_size))) if batch_size is None else batch_size

    def draw(setting: Setting, count: int) -> SampleSet:
        ids: list[list[int]] = []
        nfe = 0
        for first in range(0, check_count("count", count, least=1), rows):
            with evaluation_mode(denoiser):
                found = sample(
                    denoiser,
                    process,
                    (min(rows, count - first), length),
                    steps=setting.steps,
                    temperature=setting.temperature,
                    top_p=setting.top_p,
                    seed=seed,
                    first_row=first,
                    **options,
                )
            ids += found.ids.tolist()
            nfe = max(nfe, int(found.row_nfe.max()))
        return SampleSet(ids=ids, nfe=nfe, metadata=setting._asdict())

    return draw
