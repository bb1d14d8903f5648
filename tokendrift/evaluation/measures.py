"""The figures of one set of samples, always together: Gen.-PPL never stands alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tokendrift._checks import check_choice, check_count, fail
from tokendrift.evaluation._ngrams import rows_of
from tokendrift.evaluation._resampling import Resampling
from tokendrift.evaluation.bootstrap import Interval, check_resampling, interval_from
from tokendrift.evaluation.diversity import (
    distinct_n,
    duplicate_share,
    most_frequent_share,
    sample_entropy,
    unigram_entropy,
)
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity, PerplexityResult
from tokendrift.evaluation.overlap import copied_share, self_bleu
from tokendrift.evaluation.protocols import log_perplexity
from tokendrift.evaluation.repetition import longest_repeat, sample_repetition
from tokendrift.evaluation.samples import Samples, SampleSet, cleaned, decode, id_sequences

ORDERS = (1, 2, 3, 4)
VOCABULARIES = ("generated", "judge")


@dataclass(frozen=True)
class Measures:
    """What is known about one set of samples. Every figure is an `Interval`; entropies are in nats.

    Attributes:
        gen_ppl: Gen.-PPL.
        sample_entropy: Mean entropy of the tokens of a sample.
        unigram_entropy: Entropy of all tokens together.
        distinct_1: Distinct tokens over all tokens of the set.
        distinct_2: The same of 2-grams.
        distinct_3: The same of 3-grams.
        distinct_4: The same of 4-grams.
        repetition_4: Mean share of repeated 4-grams within a sample (seq-rep-4).
        longest_repeat: Mean length of the longest n-gram that a sample repeats.
        most_frequent_share: Share of the most frequent token.
        duplicate_share: Share of samples that copy another of the set.
        self_bleu: Mean BLEU-4 of a sample against all others; its interval holds the others fixed.
        length: Mean tokens of a sample.
        copied_share: Mean share of a sample's 8-grams that stand in the training text; None if none was given.
        nelbo: Held-out NELBO of the denoiser, nats per token; None if it was not given.
        samples: n.
        tokens: Tokens in the vocabulary that the figures are counted in.
        nfe: Forward calls of the denoiser that a sample cost; None for real text.
        vocabulary: What entropy, diversity and repetition are counted in: ``"generated"``, the ids as they came, or
            ``"judge"``, the judge's tokens of the texts.
        retokenised: Whether the judge read texts in tokens of its own, rather than the ids as they came.
        clean_up_spaces: Whether gaps before punctuation were closed in what the judge read; None if it read ids.
        skipped: Samples left out because they give the judge nothing to predict.
        level: Confidence of the intervals.
        perplexity: The judge's result, with its protocol, precision, judge and revision.
        per_sample: What each sample contributes, (n,) each: ``sample_entropy``, ``repetition_4``,
            ``longest_repeat``, ``self_bleu``, ``length``, and ``copied_share`` where it was measured.
        replicates: Each figure on resampled samples; that of Gen.-PPL is its logarithm. Sets of one size are
            resampled alike, so that differences of replicates are paired.
    """

    gen_ppl: Interval
    sample_entropy: Interval
    unigram_entropy: Interval
    distinct_1: Interval
    distinct_2: Interval
    distinct_3: Interval
    distinct_4: Interval
    repetition_4: Interval
    longest_repeat: Interval
    most_frequent_share: Interval
    duplicate_share: Interval
    self_bleu: Interval
    length: Interval
    copied_share: Interval | None
    nelbo: Interval | None
    samples: int
    tokens: int
    nfe: int | None
    vocabulary: str
    retokenised: bool
    clean_up_spaces: bool | None
    skipped: int
    level: float
    perplexity: PerplexityResult
    per_sample: dict[str, Tensor]
    replicates: dict[str, Tensor]

    @property
    def log_gen_ppl(self) -> float:
        """Logarithm of Gen.-PPL, finite where Gen.-PPL itself is too large for a float."""
        judged = self.perplexity
        return float(log_perplexity(judged.sample_nll, judged.sample_tokens, judged.protocol))

    def intervals(self) -> dict[str, Interval]:
        """Return the figures by name, without those that were not measured."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if isinstance(value, Interval)}

    def summary(self) -> dict[str, Any]:
        """Return the figures and how they were made, for JSON; what is not finite becomes None."""
        plain: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Interval):
                plain[field.name] = {k: v if math.isfinite(v) else None for k, v in value._asdict().items()}
            elif isinstance(value, PerplexityResult):
                plain |= {name: getattr(value, name) for name in ("nll", "protocol", "precision", "judge", "revision")}
                plain["scored_tokens"] = value.tokens
            elif field.name not in {"per_sample", "replicates"}:
                plain[field.name] = value
        return plain

    def to_dict(self) -> dict[str, Any]:
        """Return the `summary` and what each sample contributes to it, for JSON."""
        judged = {"nll": self.perplexity.sample_nll, "scored_tokens": self.perplexity.sample_tokens}
        each = {name: values.tolist() for name, values in (judged | self.per_sample).items()}
        return {**self.summary(), "per_sample": each}


def measure(
    samples: Samples,
    judge: GenerativePerplexity,
    *,
    tokenizer: Any = None,
    clean_up_spaces: bool = False,
    vocabulary: str | None = None,
    nfe: int | None = None,
    training: Samples | None = None,
    nelbo: Interval | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Measures:
    """Measure one set of samples: Gen.-PPL, entropies, diversity, repetition, with intervals.

    Gen.-PPL is that of the texts in the judge's own tokens: those that came, or what the ``tokenizer`` makes of the
    ids; or of the ids as they are where neither is known, and denoiser and judge share one vocabulary.

    Args:
        samples: Ids (n, L) or a list of sequences, texts, or a `SampleSet`; n at least 2.
        judge: A configured evaluator; what it has accumulated is left alone, so one serves many sets.
        tokenizer: The denoiser's, to decode ids where there are no texts.
        clean_up_spaces: As for `decode`, for texts that came as for those decoded here.
        vocabulary: What the other figures are counted in, ``"generated"`` or ``"judge"``; by default the ids as
            generated where they are known. Compare sets in one vocabulary only.
        nfe: Forward calls that a sample cost; by default that of the `SampleSet`.
        training: Training text, to find copies: ids in that vocabulary, or texts.
        nelbo: Of the denoiser, see `nelbo_interval`; kept beside the figures.
        resamples: Redraws of the bootstrap.
        level: Confidence of the intervals.
        seed: Seed of the redraws.
        skip_bad: Leave out samples of fewer than two of the judge's tokens, and count them in ``skipped``;
            otherwise they are an error.
        progress: As for `GenerativePerplexity.update`.

    Raises:
        TokenDriftError: If the samples cannot be scored, are fewer than 2, or a tokenizer is missing.

    >>> uniform = lambda ids, attention_mask: torch.zeros(*ids.shape, 10)
    >>> judge = GenerativePerplexity(uniform, protocol="all")
    >>> figures = measure(torch.tensor([[1, 1, 2, 2], [1, 2, 3, 4]]), judge, nfe=4)
    >>> round(figures.gen_ppl.estimate, 4), round(figures.sample_entropy.estimate, 5), figures.tokens
    (10.0, 1.03972, 8)
    """
    check_resampling(level, resamples)
    given = as_sample_set(samples)
    nfe = given.nfe if nfe is None else check_count("nfe", nfe)
    texts = given.texts
    if texts is None and tokenizer is not None:
        texts = decode(tokenizer, given.ids or [])
    if texts is not None and clean_up_spaces:
        texts = [cleaned(text) for text in texts]
    read = id_sequences(texts if texts is not None else given.scored(), None, judge.judge.tokenizer)[0]
    vocabulary = _vocabulary(vocabulary, given, texts)
    own = read if vocabulary == "judge" else id_sequences(given.ids or [])[0]
    kept = [i for i, ids in enumerate(read) if len(ids) > 1 and len(own[i]) > 0] if skip_bad else range(len(read))
    if len(kept) < 2:
        raise fail(f"measures need at least 2 samples, and there are {len(kept)} to score.", "Draw more samples.")
    judged = judge.score([read[i] for i in kept], progress=progress)
    own = [own[i] for i in kept]
    own_tokenizer = judge.judge.tokenizer if vocabulary == "judge" else tokenizer
    per_sample = {
        "sample_entropy": sample_entropy(own),
        "repetition_4": sample_repetition(own, 4),
        "longest_repeat": longest_repeat(own),
        "self_bleu": self_bleu(own),
        "length": torch.tensor([len(ids) for ids in own]),
    }
    if training is not None:
        per_sample["copied_share"] = copied_share(own, training_ids(training, own_tokenizer))
    figures, replicates = _with_intervals(own, judged, per_sample, Resampling(len(own), resamples, seed), level)
    return Measures(
        copied_share=figures.pop("copied_share", None),
        **figures,
        nelbo=nelbo,
        samples=len(own),
        tokens=sum(map(len, own)),
        nfe=nfe,
        vocabulary=vocabulary,
        retokenised=texts is not None,
        clean_up_spaces=clean_up_spaces if texts is not None else None,
        skipped=len(read) - len(own),
        level=level,
        perplexity=judged,
        per_sample=per_sample,
        replicates=replicates,
    )


def as_sample_set(samples: Samples) -> SampleSet:
    """Return samples of any accepted form with their ids or texts named as such."""
    if isinstance(samples, SampleSet):
        return samples
    if isinstance(samples, Sequence) and samples and all(isinstance(sample, str) for sample in samples):
        return SampleSet(texts=[str(sample) for sample in samples])
    return SampleSet(ids=[ids.tolist() for ids in id_sequences(samples)[0]])


def training_ids(training: Samples, tokenizer: Any) -> list[Tensor]:
    """Return training text in ids; texts need the tokenizer of the vocabulary that figures are counted in."""
    if isinstance(training, SampleSet):
        training = training.ids if training.ids is not None else training.scored()
    if tokenizer is None and not isinstance(training, Tensor) and any(isinstance(text, str) for text in training):
        raise fail("training is text, and there is no tokenizer for it.", "Pass tokenizer=..., or training ids.")
    return [ids for ids in id_sequences(training, None, tokenizer)[0] if len(ids)]


def _vocabulary(asked: str | None, given: SampleSet, texts: list[str] | None) -> str:
    """Return what to count in; ids that nothing decodes are not the judge's merely because it was asked for."""
    if asked is None:
        return "generated" if given.ids is not None else "judge"
    check_choice("vocabulary", asked, VOCABULARIES)
    if asked == "generated" and given.ids is None:
        raise fail(
            "vocabulary='generated' needs the ids as generated, and only texts came.",
            "Pass ids beside the texts, or vocabulary='judge' for all sets.",
        )
    if asked == "judge" and texts is None:
        raise fail(
            "vocabulary='judge' counts the judge's tokens of texts, and ids came that no tokenizer decodes.",
            "Pass tokenizer=..., the judge's own where it shares the denoiser's vocabulary, or the texts.",
        )
    return asked


def _with_intervals(
    ids: Sequence[Tensor], judged: PerplexityResult, per_sample: dict[str, Tensor], draws: Resampling, level: float
) -> tuple[dict[str, Interval], dict[str, Tensor]]:
    """Return every figure with its interval, and its resampled values."""
    rows, _ = rows_of(ids)
    entropies, shares = draws.unigrams(rows)
    corpus = {
        "unigram_entropy": (unigram_entropy(ids), entropies),
        "most_frequent_share": (most_frequent_share(ids), shares),
        "duplicate_share": (duplicate_share(ids), draws.duplicates(rows)),
    }
    for n in ORDERS:
        some = rows.shape[1] >= n
        corpus[f"distinct_{n}"] = (distinct_n(ids, n) if some else math.nan, draws.distinct(rows, n))
    replicates = {name: values - values.mean() + estimate for name, (estimate, values) in corpus.items()}
    figures = {name: interval_from(estimate, replicates[name], level) for name, (estimate, _) in corpus.items()}
    for name, values in per_sample.items():
        replicates[name] = draws.mean(values)
        figures[name] = interval_from(float(values.double().mean()), replicates[name], level)
    logs = draws.log_perplexity(judged.sample_nll, judged.sample_tokens, judged.protocol)
    estimate = float(log_perplexity(judged.sample_nll, judged.sample_tokens, judged.protocol))
    bounds = torch.tensor(interval_from(estimate, logs, level), dtype=torch.float64).exp().tolist()
    return {"gen_ppl": Interval(*bounds), **figures}, {"gen_ppl": logs, **replicates}
