"""The figures of one set of samples, always together: Gen.-PPL never stands alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from tokendrift._checks import check_count
from tokendrift.evaluation.bootstrap import Interval, bootstrap_interval, perplexity_interval
from tokendrift.evaluation.diversity import (
    Ids,
    distinct_n,
    duplicate_share,
    most_frequent_share,
    sample_entropy,
    sample_repetition,
    unigram_entropy,
)
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity, PerplexityResult


@dataclass(frozen=True)
class Measures:
    """What is known about one set of samples.

    Attributes:
        gen_ppl: Gen.-PPL with its bootstrap interval over samples.
        sample_entropy: Mean entropy of the tokens of a sample, nats, with its interval.
        unigram_entropy: Entropy of all tokens together, nats.
        distinct_3: Distinct 3-grams over all 3-grams of the set.
        repetition_4: Mean share of repeated 4-grams within a sample (seq-rep-4), with its interval.
        most_frequent_share: Share of the most frequent token.
        duplicate_share: Share of samples that copy another.
        samples: n.
        tokens: Generated tokens.
        nfe: Forward calls of the denoiser a sample cost; None for real text.
        level: Confidence of the intervals.
        perplexity: The judge's result: counted tokens, protocol, precision, and what each sample added, so that
            two sets can be compared by `perplexity_ratio_interval`.
    """

    gen_ppl: Interval
    sample_entropy: Interval
    unigram_entropy: float
    distinct_3: float
    repetition_4: Interval
    most_frequent_share: float
    duplicate_share: float
    samples: int
    tokens: int
    nfe: int | None
    level: float
    perplexity: PerplexityResult

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and texts for JSON: intervals as dictionaries, no per-sample values."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "perplexity"}
        plain = {name: value._asdict() if isinstance(value, Interval) else value for name, value in plain.items()}
        judged = self.perplexity
        return {
            **plain,
            "nll": judged.nll,
            "scored_tokens": judged.tokens,
            "protocol": judged.protocol,
            "precision": judged.precision,
        }


def measure(
    ids: Ids,
    judge: GenerativePerplexity,
    *,
    decode: Callable[[list[list[int]]], Sequence[str]] | None = None,
    nfe: int | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Measures:
    """Measure one set of samples: Gen.-PPL, entropies, diversity and repetition, with intervals.

    Entropy, diversity and repetition are those of the ids as generated; Gen.-PPL is that of their text in the
    judge's own tokens, or of the ids themselves where ``decode`` is left out.

    Args:
        ids: Generated ids (n, L), or a list of sequences; n at least 2.
        judge: A configured evaluator; what it has accumulated is left alone, so one serves many sets.
        decode: Maps n lists of ids to n texts (``tokenizer.decode_batch`` with special tokens kept). None if judge
            and denoiser share their vocabulary.
        nfe: Forward calls a sample cost, kept beside the figures.
        resamples: Bootstrap resamples.
        level: Confidence of the intervals.
        seed: Seed of the bootstrap.
        progress: As for `GenerativePerplexity.update`.

    Raises:
        TokenDriftError: If the samples cannot be scored, or are fewer than 2.

    >>> import torch
    >>> uniform = lambda ids, attention_mask: torch.zeros(*ids.shape, 10)
    >>> judge = GenerativePerplexity(uniform, protocol="all")
    >>> figures = measure(torch.tensor([[1, 1, 2, 2], [1, 2, 3, 4]]), judge, nfe=4)
    >>> round(figures.gen_ppl.estimate, 4), round(figures.sample_entropy.estimate, 5), figures.tokens
    (10.0, 1.03972, 8)
    """
    if nfe is not None:
        check_count("nfe", nfe)
    entropy, repeated = sample_entropy(ids), sample_repetition(ids, 4)
    samples = ids if decode is None else list(decode(_lists(ids)))
    judged = judge.score(samples, progress=progress)

    def mean(values: Tensor) -> Interval:
        return bootstrap_interval(lambda x: x.mean(dim=-1), values, resamples=resamples, level=level, seed=seed)

    return Measures(
        gen_ppl=perplexity_interval(judged, resamples=resamples, level=level, seed=seed),
        sample_entropy=mean(entropy),
        unigram_entropy=unigram_entropy(ids),
        distinct_3=distinct_n(ids, 3),
        repetition_4=mean(repeated),
        most_frequent_share=most_frequent_share(ids),
        duplicate_share=duplicate_share(ids),
        samples=len(ids),
        tokens=sum(map(len, ids)),
        nfe=nfe,
        level=level,
        perplexity=judged,
    )


def _lists(ids: Ids) -> list[list[int]]:
    if isinstance(ids, Tensor):
        return [list(map(int, row)) for row in ids.tolist()]
    return [list(map(int, sequence)) for sequence in ids]
