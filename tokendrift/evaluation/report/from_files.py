"""Samples files and checkpoints in, a report out: what the command ``tokendrift evaluate`` does."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokendrift
from tokendrift._checks import check_choice, check_count, check_device, fail
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.evaluator import Evaluation, cut_to_lengths, evaluate
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity
from tokendrift.evaluation.judge import DEFAULT_JUDGE, PRECISIONS
from tokendrift.evaluation.measures import measure
from tokendrift.evaluation.protocols import PROTOCOLS
from tokendrift.evaluation.report.checkpoint_rows import at_entropy_of_each, held_out_nelbo, load_models
from tokendrift.evaluation.report.report import REAL, Matched, Report
from tokendrift.evaluation.report.sources import (
    common_tokenizer,
    labels,
    named,
    read_real,
    read_some_text,
    read_sources,
    real_windows,
    sample_checkpoints,
)
from tokendrift.evaluation.samples import SampleSet, decode


@dataclass(frozen=True)
class EvaluateConfig:
    """What a report depends on, apart from the files.

    Attributes:
        samples: Samples files, ``FILE`` or ``NAME=FILE`` each, as `read_samples` takes them.
        checkpoint: Checkpoints to sample, ``PLACE`` or ``NAME=PLACE`` each.
        nfe: Function evaluations at which each checkpoint is sampled.
        n: Samples of each checkpoint and NFE.
        temperature: Of sampling checkpoints.
        baseline: Name of one of the checkpoints: every set of as many steps is compared with it at equal entropy.
        keep: Folder for the samples of checkpoints; a temporary one by default.
        real: Text that neither denoiser nor judge was trained on: samples of a ``.jsonl`` file, or any other
            file, cut into windows of the samples' length that are spread over it.
        training_text: To find copies.
        tokenizer: The denoisers'; by default that which the samples files or checkpoints name.
        judge: Name or folder of a causal LM.
        judge_tokenizer: Instead of the judge's own.
        revision: Branch, tag or commit of the judge.
        dtype: Of the judge, ``"float32"`` or ``"bfloat16"``.
        protocol: As for `GenerativePerplexity`.
        skip_bad: Leave out lines and samples that cannot be scored, and name them.
        resamples: Redraws of the bootstrap.
        seed: Of sampling checkpoints and of redraws.
        batch_size: Windows of full length the judge reads at once.
        device: Where to sample and to judge.
    """

    samples: tuple[str, ...] = ()
    checkpoint: tuple[str, ...] = ()
    nfe: tuple[int, ...] = ()
    n: int = 256
    temperature: float = 1.0
    baseline: str | None = None
    keep: str | None = None
    real: str = ""
    training_text: str | None = None
    tokenizer: str | None = None
    judge: str = DEFAULT_JUDGE
    judge_tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    protocol: str = "mdlm"
    skip_bad: bool = False
    resamples: int = 1000
    seed: int = 0
    batch_size: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.samples and not self.checkpoint:
            raise fail("there is nothing to evaluate.", "Pass samples files, or checkpoint and nfe.")
        if bool(self.checkpoint) != bool(self.nfe):
            raise fail(
                "checkpoint and nfe belong together: a checkpoint is sampled at each NFE.",
                checkpoint=self.checkpoint,
                nfe=self.nfe,
            )
        names = [name for name, _ in map(named, self.checkpoint)]
        if len(set(names)) < len(names):
            raise fail("two checkpoints have one name.", "Name them: NAME=PLACE.", names=names)
        if self.baseline is not None and self.baseline not in names:
            raise fail("baseline must be the name of a checkpoint.", baseline=self.baseline, names=names)
        for nfe in self.nfe:
            check_count("nfe", nfe, least=1)
        check_count("n", self.n, least=2)
        check_count("seed", self.seed)
        check_choice("dtype", self.dtype, tuple(PRECISIONS))
        check_choice("protocol", self.protocol, PROTOCOLS)
        check_device(self.device)


def evaluate_files(config: EvaluateConfig, *, progress: Callable[[str], object] = lambda stage: None) -> Report:
    """Read or draw the samples, measure them beside real text, and return the report.

    Args:
        config: What to evaluate, and how.
        progress: Called with what is being done.

    Raises:
        TokenDriftError: If a file, checkpoint, tokenizer or the judge cannot be read, or they do not fit together.
    """
    from tokendrift.models.tokenizer import load_tokenizer

    progress("reading")
    sources = read_sources(config.samples, skip_bad=config.skip_bad)
    real = read_real(config.real, skip_bad=config.skip_bad)
    training = None if config.training_text is None else SampleSet(texts=[read_some_text(config.training_text)])
    progress(f"loading the judge {config.judge}")
    judge = GenerativePerplexity(
        config.judge,
        None if config.judge_tokenizer is None else load_tokenizer(config.judge_tokenizer),
        protocol=config.protocol,
        precision=config.dtype,
        revision=config.revision,
        batch_size=config.batch_size,
        device=config.device,
    )
    with tempfile.TemporaryDirectory() as temporary:
        drawn = sample_checkpoints(
            config.checkpoint,
            config.nfe,
            Path(config.keep or temporary),
            progress=progress,
            n=config.n,
            temperature=config.temperature,
            tokenizer=config.tokenizer,
            seed=config.seed,
            device=config.device,
        )
        sources += drawn
    keys = labels(sources)
    if REAL in keys:
        raise fail(f"a set of samples is called {REAL!r}, as real text is.", "Name it otherwise: NAME=FILE.")
    tokenizer = common_tokenizer(sources, config.tokenizer)
    real_set = real_windows(real, sources, tokenizer, judge.judge.tokenizer) if isinstance(real, str) else real
    if tokenizer is None and real_set.texts is not None:
        real_set = dataclasses.replace(real_set, ids=None)  # ids of an unknown vocabulary compare with nothing
    models = dict(load_models(config.checkpoint, config.device))
    # What a checkpoint draws and predicts is read in its own vocabulary, also beside sets whose vocabulary is unknown.
    known = {name: common_tokenizer([s for s in sources if s.model == name], config.tokenizer) for name in models}
    if config.baseline is not None and known[config.baseline] is None:
        raise fail(
            f"no tokenizer is known that decodes what the baseline {config.baseline} draws.",
            "Name it: --tokenizer tokenizer.json, a folder, or a hub name.",
        )
    nelbo: dict[str, Interval] = {}
    for name, (model, process) in models.items():
        progress(f"NELBO of {name}")
        found = held_out_nelbo(model, process, real, known[name], resamples=config.resamples, seed=config.seed)
        if found is not None:
            nelbo |= {key: found for key, source in zip(keys, sources, strict=True) if source.model == name}
    done = 0

    def scored(count: int) -> None:
        nonlocal done
        done += count
        progress(f"judging: {done} samples")

    options: dict[str, Any] = {
        "training": training,
        "resamples": config.resamples,
        "seed": config.seed,
        "skip_bad": config.skip_bad,
        "progress": scored,
    }
    evaluation = evaluate(
        {key: source.samples for key, source in zip(keys, sources, strict=True)},
        judge,
        real=real_set,
        tokenizer=tokenizer,
        nelbo=nelbo,
        **options,
    )
    matched: tuple[Matched, ...] = ()
    if config.baseline is not None:
        vocabulary = evaluation.rows[0].measures.vocabulary
        as_the_sets = options | {"tokenizer": known[config.baseline], "vocabulary": vocabulary}
        matched = at_entropy_of_each(
            evaluation,
            sources,
            config.baseline,
            *models[config.baseline],
            measure=lambda samples: measure(samples, judge, **as_the_sets),
            seed=config.seed,
        )
    texts = {key: _texts(source.samples, tokenizer) for key, source in zip(keys, sources, strict=True)}
    texts[REAL] = _real_texts(evaluation, real_set, judge, tokenizer)
    settings = {"tokendrift": tokendrift.__version__, "torch": torch.__version__, **dataclasses.asdict(config)}
    return Report(evaluation, tuple(sources), texts, settings, matched)


def _texts(samples: SampleSet, tokenizer: Any) -> list[str]:
    return samples.texts if samples.texts is not None else decode(tokenizer, samples.ids or [])


def _real_texts(evaluation: Evaluation, real: SampleSet, judge: GenerativePerplexity, tokenizer: Any) -> list[str]:
    """Return real text cut as it stands in the first row."""
    measures = evaluation.rows[0].measures
    lengths = tuple(sorted(measures.per_sample["length"].tolist(), reverse=True))
    cut = cut_to_lengths(real, lengths, judge, tokenizer, measures.vocabulary, as_text=True)
    return cut.texts or []
