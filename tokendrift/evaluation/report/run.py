"""Samples files and checkpoints in, a report out: what the command ``tokendrift evaluate`` does."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokendrift
from tokendrift._checks import check_choice, check_count, fail
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.evaluator import Evaluation, cut_to_lengths, evaluate
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity
from tokendrift.evaluation.judge import DEFAULT_JUDGE, PRECISIONS
from tokendrift.evaluation.nelbo import nelbo_interval
from tokendrift.evaluation.protocols import PROTOCOLS
from tokendrift.evaluation.report.report import REAL, Report
from tokendrift.evaluation.report.sources import (
    Source,
    common_tokenizer,
    labels,
    named,
    read_real,
    read_sources,
    read_text,
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
        for nfe in self.nfe:
            check_count("nfe", nfe, least=1)
        check_count("n", self.n, least=2)
        check_count("seed", self.seed)
        check_choice("dtype", self.dtype, tuple(PRECISIONS))
        check_choice("protocol", self.protocol, PROTOCOLS)


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
    training = None if config.training_text is None else SampleSet(texts=[read_text(config.training_text)])
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
    tokenizer = common_tokenizer(sources, config.tokenizer)
    real_set = real_windows(real, sources, tokenizer, judge.judge.tokenizer) if isinstance(real, str) else real
    nelbo = _nelbo(config, sources, keys, real_set, progress)
    done = 0

    def scored(count: int) -> None:
        nonlocal done
        done += count
        progress(f"judging: {done} samples")

    evaluation = evaluate(
        {key: source.samples for key, source in zip(keys, sources, strict=True)},
        judge,
        real=real_set,
        tokenizer=tokenizer,
        training=training,
        nelbo=nelbo,
        resamples=config.resamples,
        seed=config.seed,
        skip_bad=config.skip_bad,
        progress=scored,
    )
    texts = {key: _texts(source.samples, tokenizer) for key, source in zip(keys, sources, strict=True)}
    texts[REAL] = _real_texts(evaluation, real_set, judge, tokenizer)
    settings = {"tokendrift": tokendrift.__version__, "torch": torch.__version__, **dataclasses.asdict(config)}
    return Report(evaluation, tuple(sources), texts, settings)


def _nelbo(
    config: EvaluateConfig,
    sources: Sequence[Source],
    keys: Sequence[str],
    real: SampleSet,
    progress: Callable[[str], object],
) -> dict[str, Interval]:
    """Return the NELBO of the checkpoints on real text, where it has ids of the denoiser as long as its samples."""
    from tokendrift.models import load_denoiser

    found = {}
    for name, place in map(named, config.checkpoint):
        progress(f"NELBO of {name}")
        model, process = load_denoiser(place, device=config.device)
        length = model.config.model_length
        rows = [ids[:length] for ids in real.ids or [] if len(ids) >= length]
        if len(rows) < 2:
            continue
        ids = torch.tensor(rows, device=config.device)
        value = nelbo_interval(model, process, ids, resamples=config.resamples, seed=config.seed)
        for key, source in zip(keys, sources, strict=True):
            if source.origin == place:
                found[key] = value
    return found


def _texts(samples: SampleSet, tokenizer: Any) -> list[str]:
    return samples.texts if samples.texts is not None else decode(tokenizer, samples.ids or [])


def _real_texts(evaluation: Evaluation, real: SampleSet, judge: GenerativePerplexity, tokenizer: Any) -> list[str]:
    """Return real text cut as it stands in the first row."""
    measures = evaluation.rows[0].measures
    lengths = tuple(sorted(measures.per_sample["length"].tolist(), reverse=True))
    cut = cut_to_lengths(real, lengths, judge, tokenizer, measures.vocabulary, as_text=True)
    return cut.texts or []
