"""From samples files and checkpoints to a report: what the command ``tokendrift evaluate`` does."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokendrift
from tokendrift._checks import check_choice, check_count, check_positive, fail
from tokendrift.devices import resolve_device
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.evaluator import cut_to_lengths, evaluate
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity
from tokendrift.evaluation.judge import DEFAULT_JUDGE, PRECISIONS
from tokendrift.evaluation.measures import Measures, as_sample_set, measure, texts_of
from tokendrift.evaluation.protocols import PROTOCOLS
from tokendrift.evaluation.report.evaluation_report import EvaluationReport, MatchedSet
from tokendrift.evaluation.report.from_checkpoints import (
    held_out_nelbo,
    load_denoisers,
    match_entropies,
    sample_checkpoints,
)
from tokendrift.evaluation.report.sources import (
    REAL,
    NamedSamples,
    common_tokenizer,
    read_controls,
    read_real,
    read_sources,
    real_windows,
    split_name,
    unique_names,
    warn_of_unknown_ids,
)
from tokendrift.evaluation.samples import SampleInput, id_sequences
from tokendrift.models.tokenizer import decode, load_tokenizer
from tokendrift.sampling import SampleSet, denoiser_samples
from tokendrift.sampling.to_file import SampleConfig
from tokendrift.text_files import read_documents


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of `evaluate_files`. The descriptions are also the help texts of the command.

    Attributes:
        samples: Samples files, FILE or NAME=FILE each: JSON, such as that of tokendrift sample, or UTF-8 text whose
            paragraphs are the samples. Default: none.
        checkpoint: Checkpoints to sample, PATH or NAME=PATH each; repeatable. Default: none.
        nfe: Numbers of function evaluations at which each checkpoint is sampled; repeatable. Default: none.
        n: Number of samples of each checkpoint at each number of function evaluations. Default: 1024.
        temperature: Sampling temperature of the checkpoints. Default: 1.
        baseline: Name of a checkpoint with which every set with the same number of steps is compared at equal entropy.
            Default: none.
        keep: Folder in which the samples of checkpoints are kept and reused. Default: a temporary folder.
        checkpoint_config: Field of the configuration of every checkpoint to add or replace, as KEY=VALUE, such as
            mask_id=103; repeatable. trust_remote_code=true permits running the code that is part of a model of
            transformers.
        real: Real text that neither denoiser nor judge was trained on: a samples file, or any other UTF-8 file, which
            is cut into windows as long as the longest sample.
        controls: Measure sets made from real text alone beside the samples, such as unigram draws, to show what each
            figure can be deceived by. Default: no.
        training_text: UTF-8 file of training text, in which copied passages are looked for. Default: none.
        tokenizer: Tokenizer of the denoisers: a tokenizer.json, a folder or a hub id. Default: the one that the samples
            files or checkpoints state.
        judge: Causal language model that scores the samples: hub id, folder, .gguf file, or package:NAME for the only
            GGUF file of an installed package; repeatable. The table uses the first judge, and the figures of the
            others are shown beside it. Default: gpt2-large.
        judge_tokenizer: Tokenizer of the first judge: a tokenizer.json, a folder or a hub id. Default: the judge's own.
        revision: Branch, tag or commit of the first judge. Default: the main branch.
        dtype: Precision of the judges: float32 or bfloat16. Default: float32.
        protocol: Protocol of Gen.-PPL: mdlm, sedd, sdtt, bd3 or all. Default: mdlm.
        gradient_moment: Measure the gradient moment of each set under the first judge: the squared distance, in (nats
            per token)^2, between the mean gradients of the judge's loss on the samples and on real text, with its
            z-score. It takes a forward and a backward pass of the judge for each sample, one at a time. A judge does
            not see what is wrong with text that it has generated itself. Default: no.
        skip_bad: Leave out lines and samples that cannot be read or scored, and report their number. Default: raise an
            error.
        lines: Whether each line of a samples file of plain text is a sample, instead of each paragraph. Default: no.
        resamples: Number of bootstrap resamples for the intervals. Default: 1000.
        seed: Random seed of sampling and of the bootstrap. Default: 0.
        batch_size: Number of windows of full length in a forward call of the judge. Default: 8.
        device: Device for the checkpoints and the judge, such as cpu or cuda:0; auto takes
            cuda if it is available, else cpu. Default: auto.

    Raises:
        TokenDriftError: If an option is out of range, or options that belong together are not all given.
    """

    samples: tuple[str, ...] = ()
    checkpoint: tuple[str, ...] = ()
    nfe: tuple[int, ...] = ()
    n: int = 1024
    temperature: float = 1.0
    baseline: str | None = None
    keep: str | None = None
    checkpoint_config: tuple[str, ...] = ()
    real: str = ""
    controls: bool = False
    training_text: str | None = None
    tokenizer: str | None = None
    judge: tuple[str, ...] = (DEFAULT_JUDGE,)
    judge_tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    protocol: str = "mdlm"
    gradient_moment: bool = False
    skip_bad: bool = False
    lines: bool = False
    resamples: int = 1000
    seed: int = 0
    batch_size: int = 8
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("samples", "checkpoint"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "nfe", tuple(dict.fromkeys(self.nfe)))  # one that is given twice is sampled once
        if not self.samples and not self.checkpoint:
            raise fail("there is nothing to evaluate.", "Pass samples files, or checkpoint and nfe.")
        if bool(self.checkpoint) != bool(self.nfe):
            raise fail(
                "checkpoint and nfe belong together: a checkpoint is sampled at each NFE.",
                checkpoint=self.checkpoint,
                nfe=self.nfe,
            )
        if not self.checkpoint and (self.keep is not None or self.temperature != 1):
            given = {"keep": self.keep, "temperature": self.temperature}
            raise fail("keep and temperature are for samples of checkpoints.", "Pass checkpoint and nfe.", **given)
        names = [name for name, _ in map(split_name, self.checkpoint)]
        if len(set(names)) < len(names):
            raise fail("two checkpoints have the same name.", "Give them different names: NAME=PATH.", names=names)
        if self.baseline is not None and self.baseline not in names:
            raise fail("baseline must be the name of a checkpoint.", baseline=self.baseline, names=names)
        if isinstance(self.judge, str):  # one judge
            object.__setattr__(self, "judge", (self.judge,))
        if not self.judge or len(set(self.judge)) < len(self.judge):
            raise fail("judge must name one or several different judges.", judge=self.judge)
        for nfe in self.nfe:
            check_count("nfe", nfe, least=1, most=10**6)
        check_count("n", self.n, least=2, most=10**7)
        check_count("resamples", self.resamples, least=1, most=10**6)
        check_count("batch_size", self.batch_size, least=1, most=10**6)
        check_positive("temperature", self.temperature)
        check_count("seed", self.seed)
        check_choice("dtype", self.dtype, tuple(PRECISIONS))
        check_choice("protocol", self.protocol, PROTOCOLS)
        object.__setattr__(self, "device", str(resolve_device(self.device, needs_float64=True)))


def evaluate_files(
    config: EvaluateConfig, *, progress: Callable[[str], object] = lambda stage: None
) -> EvaluationReport:
    """Read or draw the samples, measure them beside real text, and return the report.

    Args:
        config: What to evaluate, and how.
        progress: Called with a description of each stage. Default: a function that does nothing.

    Raises:
        TokenDriftError: If a file, checkpoint, tokenizer or the judge cannot be read, or they do not fit together.
    """
    # 1. Read the files, then load the judge, which may be large, and sample the checkpoints.
    progress("reading")
    sources = read_sources(config.samples, skip_bad=config.skip_bad, lines=config.lines)
    unique_names(sources)  # before all work; the sets of checkpoints join them below
    real = read_real(config.real, skip_bad=config.skip_bad)
    training = None if config.training_text is None else SampleSet(texts=read_documents(config.training_text))
    judge, *panel = _load_judges(config, progress)
    sources += _sample_checkpoints(config, progress)
    # 2. Find the tokenizer that all sets share, and cut real text in its tokens.
    tokenizer = common_tokenizer(sources, config.tokenizer)
    warn_of_unknown_ids(sources, tokenizer)
    real_set = real_windows(real, sources, tokenizer, judge.judge.tokenizer) if isinstance(real, str) else real
    if tokenizer is None and real_set.texts is not None:
        real_set = dataclasses.replace(real_set, ids=None)  # ids of an unknown vocabulary compare with nothing
    if config.controls:
        sources += read_controls(real, real_set, tokenizer, judge.judge.tokenizer, seed=config.seed)
    names = unique_names(sources)
    # 3. Measure the checkpoints, then every set beside real text.
    denoisers = load_denoisers(
        config.checkpoint, sources, config.tokenizer, device=config.device, fields=config.checkpoint_config
    )
    if config.baseline is not None and denoisers[config.baseline].tokenizer is None:
        raise fail(
            f"no tokenizer is known for the samples of the baseline {config.baseline}.",
            "Pass --tokenizer: a tokenizer.json, a folder, or a hub id.",
        )
    bounds: dict[str, Interval | None] = {}
    for model, denoiser in denoisers.items():
        progress(f"NELBO of {model}")
        bounds[model] = held_out_nelbo(denoiser, real, resamples=config.resamples, seed=config.seed)
    nelbo = {name: bounds.get(source.model) for name, source in zip(names, sources, strict=True)}
    sets = {name: source.samples for name, source in zip(names, sources, strict=True)}
    options: dict[str, Any] = {"training": training, "resamples": config.resamples, "seed": config.seed}
    options |= {"skip_bad": config.skip_bad, "progress": _count_samples(progress)}
    evaluation = evaluate(
        sets, judge, real=real_set, tokenizer=tokenizer, nelbo=nelbo, panel=panel,
        gradient_moment=config.gradient_moment, **options,
    )  # fmt: skip
    # 4. Compare every set with the baseline at equal entropy.
    matched: tuple[MatchedSet, ...] = ()
    if config.baseline is not None:
        baseline = denoisers[config.baseline]
        options |= {"tokenizer": baseline.tokenizer, "vocabulary": evaluation.rows[0].measures.vocabulary}
        draw = denoiser_samples(baseline.model, baseline.process, baseline.model.config.model_length, seed=config.seed)
        measured = partial(measure, judge=judge, panel=panel, **options)

        def counted(samples: SampleInput) -> list[torch.Tensor]:
            ids = as_sample_set(samples).ids or []
            if options["vocabulary"] == "generated":
                return id_sequences(ids)[0]
            return id_sequences(decode(baseline.tokenizer, ids), None, judge.judge.tokenizer)[0]

        matched = match_entropies(evaluation, sources, config.baseline, draw, measured, counted)
    # 5. The report, with the texts that its page shows.
    texts = {name: texts_of(samples, tokenizer) or [] for name, samples in sets.items()}
    texts[REAL] = _real_texts(evaluation.rows[0].measures, real_set, judge, tokenizer)
    settings = {"tokendrift": tokendrift.__version__, "torch": torch.__version__, **dataclasses.asdict(config)}
    settings |= {"judge": config.judge[0], "panel": tuple(config.judge[1:])}
    return EvaluationReport(evaluation, tuple(sources), texts, settings, matched)


def _load_judges(config: EvaluateConfig, progress: Callable[[str], object]) -> list[GenerativePerplexity]:
    tokenizer = None if config.judge_tokenizer is None else load_tokenizer(config.judge_tokenizer)
    found: list[GenerativePerplexity] = []
    for name in config.judge:
        progress(f"loading the judge {name}")
        own: dict[str, Any] = {} if found else {"tokenizer": tokenizer, "revision": config.revision}
        own |= {"protocol": config.protocol, "precision": config.dtype, "batch_size": config.batch_size}
        found.append(GenerativePerplexity(name, device=config.device, **own))
    return found


def _sample_checkpoints(config: EvaluateConfig, progress: Callable[[str], object]) -> list[NamedSamples]:
    names = ("n", "temperature", "tokenizer", "seed", "device", "checkpoint_config")
    options = {name: getattr(config, name) for name in names}
    sampling = SampleConfig("", steps=1, **options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.keep or temporary)
        return list(sample_checkpoints(config.checkpoint, config.nfe, folder, sampling, progress=progress))


def _count_samples(progress: Callable[[str], object]) -> Callable[[int], object]:
    """Return what reports how many samples the judge has scored so far, given those of each forward call."""
    total = 0

    def report(count: int) -> None:
        nonlocal total
        total += count
        progress(f"judging: {total} samples")

    return report


def _real_texts(first: Measures, real: SampleSet, judge: GenerativePerplexity, tokenizer: Any) -> list[str]:
    """Return the texts of real text, cut to the lengths of the first set."""
    own = tokenizer if first.vocabulary == "generated" else judge.judge.tokenizer
    return cut_to_lengths(real, first.falling_lengths(), own, first.vocabulary, as_text=True).texts or []
