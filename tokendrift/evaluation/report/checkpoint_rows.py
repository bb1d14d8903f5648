"""What a report can say of checkpoints beyond their samples: held-out NELBO, and Gen.-PPL at equal entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tokendrift._checks import fail
from tokendrift.diffusion import Process
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.draws import MeasureSamples, Setting, denoiser_samples
from tokendrift.evaluation.evaluator import Evaluation
from tokendrift.evaluation.matching import KINDS, TEMPERATURES, at_matched_entropy, entropy
from tokendrift.evaluation.nelbo import nelbo_interval
from tokendrift.evaluation.report.report import Matched
from tokendrift.evaluation.report.sources import Source, named, windows
from tokendrift.evaluation.samples import SampleSet, tokenize
from tokendrift.models import DiT, load_denoiser

MOST_WINDOWS = 512  # of real text, for the NELBO


def load_models(checkpoints: Sequence[str], device: str) -> Iterator[tuple[str, tuple[DiT, Process]]]:
    """Yield name, model and process of each checkpoint, ``PLACE`` or ``NAME=PLACE``."""
    for name, place in map(named, checkpoints):
        yield name, load_denoiser(place, device=device)


def held_out_nelbo(
    model: DiT, process: Process, real: SampleSet | str, tokenizer: object, *, resamples: int, seed: int
) -> Interval | None:
    """Return the NELBO on real text, nats per token; None where there are no two windows of the model's length.

    Args:
        model: Denoiser.
        process: Its process.
        real: Samples, cut to the model's length, or a text, cut into windows.
        tokenizer: Of the denoiser, for texts.
        resamples: Of the bootstrap.
        seed: Of noise and bootstrap.

    Raises:
        TokenDriftError: If real text has ids outside the model's vocabulary.
    """
    length = model.config.model_length
    if isinstance(real, str):
        rows = windows(tokenize(tokenizer, [real])[0], length, MOST_WINDOWS) if tokenizer is not None else []
    else:
        known = real.ids if real.ids is not None or tokenizer is None else tokenize(tokenizer, real.texts or [])
        rows = [ids[:length] for ids in known or [] if len(ids) >= length]
    if len(rows) < 2:
        return None
    ids = torch.tensor(rows[:MOST_WINDOWS], device=next(model.parameters()).device)
    if int(ids.max()) >= process.vocab_size:
        raise fail(
            f"real text has id {int(ids.max())}, and the denoiser's vocabulary V has {process.vocab_size} entries.",
            "Name the tokenizer that the denoiser was trained with (--tokenizer).",
        )
    return nelbo_interval(model, process, ids, resamples=resamples, seed=seed)


def at_entropy_of_each(
    evaluation: Evaluation,
    sources: Sequence[Source],
    baseline: str,
    model: DiT,
    process: Process,
    *,
    measure: MeasureSamples,
    seed: int,
) -> tuple[Matched, ...]:
    """Compare every set with a baseline sampled at the temperature that gives the baseline the set's entropy.

    Sets are compared at the steps at which the baseline was sampled, for both kinds of entropy: their NFE is measured,
    and lower where a row needed fewer calls than there were steps.

    Args:
        evaluation: The figures of the sets.
        sources: The sets, in the order of its rows.
        baseline: Name of the checkpoint.
        model: Its denoiser.
        process: Its process.
        measure: Measures samples as the sets were measured.
        seed: Of sampling.
    """
    pairs = list(zip(evaluation.rows, sources, strict=True))
    sampled = {source.steps for source in sources if source.model == baseline}
    draw = denoiser_samples(model, process, model.config.model_length, seed=seed)
    curves: dict[tuple[int, int], dict[float, list[float]]] = {}
    found = []
    for row, source in pairs:
        steps, count = source.steps, row.measures.samples
        if source.model == baseline or steps is None or steps not in sampled:
            continue
        if (steps, count) not in curves:
            drawn = {t: measure(draw(Setting(steps, t), count)) for t in TEMPERATURES}
            curves[steps, count] = {t: [entropy(m, kind).estimate for kind in KINDS] for t, m in drawn.items()}
        for i, kind in enumerate(KINDS):
            curve = [(t, entropies[i]) for t, entropies in curves[steps, count].items()]
            matched = at_matched_entropy(
                row.measures, draw, measure, real=row.real, steps=steps, kind=kind, curve=curve
            )
            found.append(Matched(row.name, baseline, matched))
    return tuple(found)
