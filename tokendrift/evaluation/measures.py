"""The figures of one set of samples, always together: a Gen.-PPL is never reported alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from tokendrift._checks import check_choice, check_count, fail
from tokendrift.evaluation._resampling import Resampling
from tokendrift.evaluation.bootstrap import Interval, check_resampling, interval_from
from tokendrift.evaluation.figures import FIGURES, LIKELIHOODS, FigureValue, ScoredSamples
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity, PerplexityResult
from tokendrift.evaluation.protocols import log_perplexity
from tokendrift.evaluation.samples import SampleInput, cleaned, id_sequences
from tokendrift.models.tokenizer import decode
from tokendrift.sampling import SampleSet

VOCABULARIES = ("generated", "judge")


@dataclass(frozen=True)
class Measures:
    """The figures of one set of samples. Each is an `Interval`; entropies are in nats.

    Every figure is an attribute as well, such as ``measures.gen_ppl`` or ``measures.self_bleu``; it is None if it was
    not measured. `tokendrift.evaluation.figures` has the table of all figures:

    * ``gen_ppl``: Gen.-PPL.
    * ``bits_per_byte``: NLL under the judge in bits over UTF-8 bytes, if the judge read texts. Unlike Gen.-PPL it does
      not depend on the judge's tokens.
    * ``nats_per_generated_token``: NLL under the judge in nats over tokens as generated, if those are known.
    * ``sample_entropy``: mean entropy of the tokens of a sample.
    * ``unigram_entropy``: entropy of all tokens together.
    * ``distinct_1`` to ``distinct_4``: distinct n-grams over all n-grams of the set.
    * ``repetition_4``: mean share of repeated 4-grams within a sample (seq-rep-4).
    * ``longest_repeat``: mean length of the longest n-gram that a sample repeats, tokens.
    * ``most_frequent_share``: share of the most frequent token.
    * ``duplicate_share``: share of samples that copy another of the set.
    * ``self_bleu``: mean BLEU-4 of a sample against all others; its interval holds the others fixed.
    * ``copied_share``: mean share of a sample's 8-grams that stand in the training text, if one was given.
    * ``length``: mean tokens of a sample.
    * ``nelbo``: held-out NELBO of the denoiser, nats per token, if it was given.

    Attributes:
        figures: The figures that were measured, by name.
        samples: n.
        tokens: Tokens in the vocabulary that the figures are counted in.
        nfe: Forward calls of the denoiser that a sample cost; None for real text.
        flops: Mean floating-point operations (FLOPs) that a sample cost, see `tokendrift.sampling.cost`; None for real
            text and where they are not known.
        kept: Indices of the samples that were measured; `skipped` counts the others.
        vocabulary: What entropy, diversity and repetition are counted in: ``"generated"``, the ids as they came, or
            ``"judge"``, the judge's tokens of the texts.
        shared_tokenizer: Whether the judge reads text in the tokens of the denoiser. If it does not, or the denoiser's
            tokenizer is not known, figures per token of the judge do not compare between denoisers.
        retokenised: Whether the judge read texts in tokens of its own, rather than the ids as they came.
        clean_up_spaces: Whether gaps before punctuation were closed in what the judge read; None if it read ids.
        skipped: Samples left out because they give the judge nothing to predict.
        level: Confidence of the intervals.
        perplexity: The judge's result, with its protocol, precision, judge and revision.
        per_sample: What each sample contributes to the figures that are means over samples, (n,) each.
        replicates: Each figure on resampled samples; that of Gen.-PPL is its logarithm. Sets of one size are
            resampled alike, so that differences of replicates are paired.
        panel: The figures of `LIKELIHOODS` under each further judge.
    """

    figures: Mapping[str, Interval]
    samples: int
    tokens: int
    nfe: int | None
    vocabulary: str
    shared_tokenizer: bool
    retokenised: bool
    clean_up_spaces: bool | None
    skipped: int
    level: float
    perplexity: PerplexityResult
    per_sample: dict[str, Tensor]
    replicates: dict[str, Tensor]
    panel: tuple[Measures, ...] = ()
    flops: float | None = None
    kept: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Any:
        """Return a figure by its name, None if it was not measured."""
        figures = self.__dict__.get("figures", {})  # empty while a copy is being made
        if name in figures or name in FIGURES:
            return figures.get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def log_gen_ppl(self) -> float:
        """Logarithm of Gen.-PPL, finite where Gen.-PPL itself is too large for a float."""
        judged = self.perplexity
        return float(log_perplexity(judged.sample_nll, judged.sample_tokens, judged.protocol))

    @property
    def headline(self) -> str:
        """Name of the figure by which likelihoods compare.

        It is ``"gen_ppl"`` if the judge shares the denoiser's tokenizer or the bytes are not known, else
        ``"bits_per_byte"``.
        """
        return "gen_ppl" if self.shared_tokenizer or "bits_per_byte" not in self.figures else "bits_per_byte"

    @property
    def counted_in(self) -> str:
        """What the figures are counted in, in words."""
        return "the ids as generated" if self.vocabulary == "generated" else "tokens of the judge"

    def falling_lengths(self) -> tuple[int, ...]:
        """Return the length of each sample in tokens, the longest first."""
        return tuple(sorted(self.per_sample["length"].tolist(), reverse=True))

    def intervals(self) -> dict[str, Interval]:
        """Return the figures by name, without those that were not measured."""
        return dict(self.figures)

    def summary(self) -> dict[str, Any]:
        """Return the figures and how they were made, for JSON; what is not finite becomes None."""
        plain: dict[str, Any] = dict.fromkeys(FIGURES)
        for name, interval in self.figures.items():
            plain[name] = {end: x if math.isfinite(x) else None for end, x in interval._asdict().items()}
        for field in fields(self)[1:]:
            if field.name not in {"perplexity", "per_sample", "replicates", "panel", "kept"}:
                plain[field.name] = getattr(self, field.name)
        judged = self.perplexity
        plain |= {name: getattr(judged, name) for name in ("nll", "protocol", "precision", "judge", "revision")}
        if self.panel:
            kept = (*LIKELIHOODS, "shared_tokenizer", "judge", "revision", "precision", "scored_tokens")
            plain["panel"] = [{name: one.summary()[name] for name in kept} for one in self.panel]
        return plain | {"scored_tokens": judged.tokens}

    def to_dict(self) -> dict[str, Any]:
        """Return the `summary` and what each sample contributes to it, for JSON."""
        judged = {"nll": self.perplexity.sample_nll, "scored_tokens": self.perplexity.sample_tokens}
        each = {name: values.tolist() for name, values in (judged | self.per_sample).items()}
        return {**self.summary(), "per_sample": each}


def measure(
    samples: SampleInput,
    judge: GenerativePerplexity,
    *,
    tokenizer: Any = None,
    clean_up_spaces: bool = False,
    vocabulary: str | None = None,
    nfe: int | None = None,
    training: SampleInput | None = None,
    nelbo: Interval | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    skip_bad: bool = False,
    panel: Sequence[GenerativePerplexity] = (),
    progress: Callable[[int], object] | None = None,
) -> Measures:
    """Measure one set of samples: Gen.-PPL, entropies, diversity and repetition, each with its interval.

    Gen.-PPL is that of the texts in the judge's own tokens: the texts that came with the samples, or those that the
    ``tokenizer`` decodes from the ids. If there is neither, the judge reads the ids as they are; denoiser and judge
    must then share one vocabulary.

    Args:
        samples: Ids (n, L) or a list of sequences, texts, or a `SampleSet`; n at least 2.
        judge: A configured evaluator. What it has accumulated does not change, so one evaluator serves many sets.
        tokenizer: The denoiser's tokenizer, to decode ids that came without texts. Default: None.
        clean_up_spaces: Close the gap before punctuation in every text that the judge reads, as `decode` does.
            Default: False.
        vocabulary: What the other figures are counted in, ``"generated"`` or ``"judge"``. Sets compare only within
            one vocabulary. Default: the ids as generated if they are given, else the judge's tokens.
        nfe: Forward calls of the denoiser that a sample cost. Default: that of the `SampleSet`.
        training: Training text, to find copies: ids in that vocabulary, or texts. Default: None.
        nelbo: NELBO of the denoiser, see `nelbo_interval`; it is stored with the figures. Default: None.
        resamples: Redraws of the bootstrap. Default: 1000.
        level: Confidence of the intervals. Default: 0.95.
        seed: Seed of the redraws. Default: 0.
        skip_bad: Leave out samples of fewer than two of the judge's tokens and count them in ``skipped``; otherwise
            such a sample is an error. Default: False.
        panel: Further judges, which read the same texts. Their figures are in ``Measures.panel``. Default: none.
        progress: As for `GenerativePerplexity.update`.

    Raises:
        TokenDriftError: If the samples cannot be scored, are fewer than 2, or a tokenizer is missing.

    >>> import torch
    >>> uniform = lambda ids, attention_mask: torch.zeros(*ids.shape, 10)
    >>> judge = GenerativePerplexity(uniform, protocol="all")
    >>> figures = measure(torch.tensor([[1, 1, 2, 2], [1, 2, 3, 4]]), judge, nfe=4)
    >>> round(figures.gen_ppl.estimate, 4), round(figures.sample_entropy.estimate, 5), figures.tokens
    (10.0, 1.03972, 8)
    """
    check_resampling(level, resamples)
    given = as_sample_set(samples)
    nfe = given.nfe if nfe is None else check_count("nfe", nfe)
    # 1. What the judge reads: texts if there are any, else the ids.
    texts = texts_of(given, tokenizer, clean_up_spaces)
    judges, given = (judge, *panel), replace(given, texts=texts)
    reads = _reads(judges, given)
    # 2. What the other figures are counted in.
    vocabulary = _vocabulary(vocabulary, given)
    counted = reads[0] if vocabulary == "judge" else id_sequences(given.ids or [])[0]
    short = [min(len(ids) for ids in each) < 2 or not len(own) for *each, own in zip(*reads, counted, strict=True)]
    kept = [i for i, bad in enumerate(short) if not (skip_bad and bad)]
    if len(kept) < 2:
        raise fail(f"measures need at least 2 samples, and there are {len(kept)} to score.", "Draw more samples.")
    if training is not None:
        training = training_ids(training, judge.judge.tokenizer if vocabulary == "judge" else tokenizer, vocabulary)
    # 3. Every figure of the table, on the same redraws of the samples for every judge.
    known, resampling, counted = given.only(kept), Resampling(len(kept), resamples, seed), [counted[i] for i in kept]
    of_judges: list[Measures] = []
    for each, read in zip(judges, reads, strict=True):
        judged = each.score([read[i] for i in kept], progress=progress)
        if texts is not None:  # a judge that truncates read no whole sample
            sizes = (known.texts, known.ids) if each.truncate is None else (None, None)
            judged = judged.with_sizes(*sizes)
        values = _values(ScoredSamples(counted, judged, training, resampling), LIKELIHOODS if of_judges else FIGURES)
        of_judges.append(
            Measures(
                figures=_intervals(values, level) | ({} if nelbo is None or of_judges else {"nelbo": nelbo}),
                samples=len(kept),
                tokens=sum(map(len, counted)),
                nfe=nfe,
                flops=given.flops,
                vocabulary=vocabulary,
                shared_tokenizer=texts is None or each.judge.shares_tokenizer(tokenizer),
                retokenised=texts is not None,
                clean_up_spaces=clean_up_spaces if texts is not None else None,
                skipped=len(short) - len(kept),
                kept=tuple(kept),
                level=level,
                perplexity=judged,
                per_sample={name: value.per_sample for name, value in values.items() if value.per_sample is not None},
                replicates={name: value.replicates for name, value in values.items()},
            )
        )
    return replace(of_judges[0], panel=tuple(of_judges[1:]))


def _reads(judges: Sequence[GenerativePerplexity], given: SampleSet) -> list[list[Tensor]]:
    """Return the ids that each judge reads of the samples."""
    if len(judges) > 1 and given.texts is None:
        raise fail("several judges read texts, and ids came without a tokenizer.", "Pass tokenizer=..., or texts.")
    if any(each.drop_remainder for each in judges):
        raise fail("drop_remainder leaves samples out that the other figures count.", "Build the judge without it.")
    return [id_sequences(given, None, each.judge.tokenizer)[0] for each in judges]


def texts_of(given: SampleSet, tokenizer: Any, clean_up_spaces: bool = False) -> list[str] | None:
    """Return the texts that came with the samples, or else those that the tokenizer decodes; None without either."""
    texts = given.texts if given.texts is not None or tokenizer is None else decode(tokenizer, given.ids or [])
    return [cleaned(text) for text in texts] if texts is not None and clean_up_spaces else texts


def _values(scored: ScoredSamples, names: Iterable[str]) -> dict[str, FigureValue]:
    """Return the figures of these names that can be computed."""
    computed = ((name, FIGURES[name].compute) for name in names)
    return {name: value for name, compute in computed if compute is not None and (value := compute(scored))}


def _intervals(values: Mapping[str, FigureValue], level: float) -> dict[str, Interval]:
    figures = {name: interval_from(value.estimate, value.replicates, level) for name, value in values.items()}
    return figures | {"gen_ppl": figures["gen_ppl"].exp()}


def as_sample_set(samples: SampleInput) -> SampleSet:
    """Return samples of any accepted form as a `SampleSet`."""
    if isinstance(samples, SampleSet):
        return samples
    if isinstance(samples, Sequence) and samples and all(isinstance(sample, str) for sample in samples):
        return SampleSet(texts=[str(sample) for sample in samples])
    return SampleSet(ids=[ids.tolist() for ids in id_sequences(samples)[0]])


def training_ids(training: SampleInput, tokenizer: Any, vocabulary: str) -> list[Tensor]:
    """Return the ids of training text; texts need the tokenizer of the vocabulary that figures are counted in."""
    if isinstance(training, SampleSet):
        own = training.ids if vocabulary == "generated" else None
        training = training.scored() if own is None else own
    if tokenizer is None and not isinstance(training, Tensor) and any(isinstance(text, str) for text in training):
        raise fail("training is text, but there is no tokenizer to encode it.", "Pass tokenizer=..., or training ids.")
    return [ids for ids in id_sequences(training, None, tokenizer)[0] if len(ids)]


def _vocabulary(requested: str | None, given: SampleSet) -> str:
    """Return the vocabulary to count in. Ids that nothing decodes are never taken for the judge's tokens."""
    if requested is None:
        return "generated" if given.ids is not None else "judge"
    check_choice("vocabulary", requested, VOCABULARIES)
    if requested == "generated" and given.ids is None:
        raise fail(
            "vocabulary='generated' needs the ids as generated, but only texts were given.",
            "Pass the ids together with the texts, or vocabulary='judge' for all sets.",
        )
    if requested == "judge" and given.texts is None:
        raise fail(
            "vocabulary='judge' counts tokens of the judge, but ids were given and there is no tokenizer to decode "
            "them.",
            "Pass tokenizer=..., which is the judge's own if both have one vocabulary, or pass the texts.",
        )
    return requested
