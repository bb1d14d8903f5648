"""The part of the report that needs checkpoints: their samples, held-out NELBO, and Gen.-PPL at equal entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import fail
from tokendrift.diffusion import Process
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.diversity import sample_entropy, unigram_entropy
from tokendrift.evaluation.evaluator import Evaluation
from tokendrift.evaluation.matching import (
    KINDS,
    TEMPERATURES,
    DrawSamples,
    MeasureSamples,
    at_matched_entropy,
    entropy,
)
from tokendrift.evaluation.nelbo import nelbo_interval
from tokendrift.evaluation.report.evaluation_report import MatchedSet
from tokendrift.evaluation.report.sources import NamedSamples, common_tokenizer, evenly_spaced_windows, split_name
from tokendrift.evaluation.sample_reader import read_samples
from tokendrift.evaluation.samples import SampleInput
from tokendrift.models import LoadedDenoiser, checkpoint_fields, load_denoiser
from tokendrift.models.tokenizer import encode
from tokendrift.sampling import SampleSet, SamplingSetting
from tokendrift.sampling.to_file import SampleConfig, sample_to_file

MOST_WINDOWS = 512  # of real text, for the NELBO


def sample_checkpoints(
    checkpoints: Sequence[str],
    nfes: Sequence[int],
    folder: Path,
    config: SampleConfig,
    *,
    progress: Callable[[str], object] = lambda stage: None,
) -> Iterator[NamedSamples]:
    """Sample each checkpoint at each number of function evaluations into a file, and yield the sets.

    A file of an earlier run with the same settings is used again, and sampling resumes if it is incomplete.

    Args:
        checkpoints: ``PATH`` or ``NAME=PATH`` of each checkpoint.
        nfes: Numbers of function evaluations, one set for each.
        folder: Folder of the files.
        config: The other options of sampling; its checkpoint and steps are replaced.
        progress: Called with what is being sampled. Default: a function that does nothing.

    Raises:
        TokenDriftError: As for `tokendrift.sampling.to_file.sample_to_file`, or if a file cannot be written.
    """
    for name, checkpoint in map(split_name, checkpoints):
        for nfe in nfes:
            progress(f"sampling {name} at {nfe} NFE")
            path = folder / f"{name.replace('/', '-')}-{nfe}.jsonl"
            sample_to_file(replace(config, checkpoint=checkpoint, steps=nfe), path)
            yield NamedSamples(name, read_samples(path), checkpoint)


class DenoiserWithTokenizer(NamedTuple):
    """A checkpoint that was loaded.

    Attributes:
        model: The denoiser.
        process: Its diffusion process.
        tokenizer: The tokenizer of its samples, None if it is not known.
    """

    model: LoadedDenoiser
    process: Process
    tokenizer: Any


def load_denoisers(
    checkpoints: Sequence[str],
    sources: Sequence[NamedSamples],
    tokenizer: str | None,
    *,
    device: str,
    fields: Sequence[str] = (),
) -> dict[str, DenoiserWithTokenizer]:
    """Return the denoiser of each checkpoint, ``PATH`` or ``NAME=PATH``, by name.

    Each has the tokenizer of its own sets, which is known even if other sets have an unknown vocabulary. ``fields`` are
    the entries ``KEY=VALUE`` of `SampleConfig.checkpoint_config`.
    """
    found = {}
    for name, path in map(split_name, checkpoints):
        own = common_tokenizer([source for source in sources if source.model == name], tokenizer)
        found[name] = DenoiserWithTokenizer(*load_denoiser(path, config=checkpoint_fields(fields), device=device), own)
    return found


def held_out_nelbo(
    denoiser: DenoiserWithTokenizer, real: SampleSet | str, *, resamples: int, seed: int
) -> Interval | None:
    """Return the NELBO on real text, nats per token; None if there are no two windows of the model's length.

    Args:
        denoiser: Denoiser with its process, and its tokenizer for texts.
        real: Samples, which are cut to the model's length, or a text, which is cut into windows.
        resamples: Redraws of the bootstrap.
        seed: Random seed of the noise and of the bootstrap.

    Raises:
        TokenDriftError: If real text has ids outside the model's vocabulary.
    """
    model, process, tokenizer = denoiser
    length = model.config.model_length
    if isinstance(real, str):
        text = [] if tokenizer is None else encode(tokenizer, [real])[0]
        rows = evenly_spaced_windows(text, length, MOST_WINDOWS)
    else:
        ids = real.ids if real.ids is not None or tokenizer is None else encode(tokenizer, real.texts or [])
        rows = [row[:length] for row in ids or [] if len(row) >= length][:MOST_WINDOWS]
    if len(rows) < 2:
        return None
    batch = torch.tensor(rows, device=next(model.parameters()).device)
    if int(batch.max()) >= process.vocab_size:
        raise fail(
            f"real text has id {int(batch.max())}, and the denoiser's vocabulary V has {process.vocab_size} entries.",
            "Pass the tokenizer that the denoiser was trained with (--tokenizer).",
        )
    return nelbo_interval(model, process, batch, resamples=resamples, seed=seed)


def match_entropies(
    evaluation: Evaluation,
    sources: Sequence[NamedSamples],
    baseline: str,
    draw: DrawSamples,
    measure: MeasureSamples,
    counted: Callable[[SampleInput], list[Tensor]],
) -> tuple[MatchedSet, ...]:
    """Compare every set with a baseline sampled at the temperature that gives the baseline the set's entropy.

    A set is compared if the baseline was sampled with the same number of steps, once for each kind of entropy. Steps
    are compared rather than measured NFE, which is lower for rows that needed fewer calls than there were steps.

    Args:
        evaluation: Figures of the sets.
        sources: The sets, in the order of its rows.
        baseline: Name of the baseline.
        draw: Draws samples from the baseline.
        measure: Measures a set of samples as the sets were measured.
        counted: Returns the ids of a set in which its entropies are counted. The sets of the grid of temperatures need
            no judge, and may hold samples that are too short for one.
    """
    sampled_steps = {source.steps for source in sources if source.model == baseline}
    compared = [
        (row, source.steps)
        for row, source in zip(evaluation.rows, sources, strict=True)
        if source.model != baseline and source.steps is not None and source.steps in sampled_steps
    ]
    curves: dict[tuple[int, int], list[tuple[float, list[float]]]] = {}
    found = []
    for row, steps in compared:
        count = row.measures.samples
        # 1. Both entropies of the baseline over temperature, once for sets of one size, as far down as any set is.
        if (steps, count) not in curves:
            alike = [other.measures for other, n in compared if (n, other.measures.samples) == (steps, count)]
            lowest = [min(entropy(measures, kind).estimate for measures in alike) for kind in KINDS]
            curves[steps, count] = []
            for temperature in TEMPERATURES:
                ids = [row for row in counted(draw(SamplingSetting(steps, temperature), count)) if len(row)]
                entropies = [float(sample_entropy(ids).mean()), unigram_entropy(ids)]  # in the order of KINDS
                curves[steps, count].append((temperature, entropies))
                if all(reached <= target for reached, target in zip(entropies, lowest, strict=True)):
                    break
        # 2. The ratio of Gen.-PPL where the baseline has the set's entropy.
        for i, kind in enumerate(KINDS):
            curve = [(t, entropies[i]) for t, entropies in curves[steps, count]]
            matched = at_matched_entropy(
                row.measures, draw, measure, real=row.real, steps=steps, kind=kind, curve=curve
            )
            found.append(MatchedSet(row.name, baseline, matched))
    return tuple(found)
