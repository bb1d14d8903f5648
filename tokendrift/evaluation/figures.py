"""The figures of a set of samples: one table with the name of each, how it is computed, and how it is written.

`measure` computes every figure of the table, and everything that shows figures reads the table: the printed table of
`tokendrift.evaluation.evaluate`, the report in the terminal, as JSON, CSV and HTML, the model card, and the demo. To
add a figure, add one line to `FIGURES`, or call `register_figure` in a program of your own:

    register_figure(Figure("even_share", "even ids", "share of even ids", 3, per_sample(share_of_even_ids)))

Only Gen.-PPL is compared as a ratio: its replicates are logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.evaluation._ngrams import rows_of
from tokendrift.evaluation._resampling import Resampling
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.diversity import (
    distinct_n,
    duplicate_share,
    most_frequent_share,
    sample_entropy,
    unigram_entropy,
)
from tokendrift.evaluation.generative_perplexity import PerplexityResult
from tokendrift.evaluation.overlap import copied_share, self_bleu
from tokendrift.evaluation.protocols import log_perplexity
from tokendrift.evaluation.repetition import longest_repeat, sample_repetition


@dataclass(frozen=True)
class ScoredSamples:
    """A set of samples that a judge has scored: what a figure is computed from.

    Attributes:
        ids: Ids of each sample in the vocabulary that the figures are counted in, n tensors int64 (L,).
        perplexity: The judge's result for the same samples.
        training: Training text in the same vocabulary, one tensor for each document; None if none was given.
        resampling: The redraws of the samples, the same for every figure.
    """

    ids: Sequence[Tensor]
    perplexity: PerplexityResult
    training: Sequence[Tensor] | None
    resampling: Resampling

    @cached_property
    def rows(self) -> Tensor:
        """The ids as a rectangle int64 (n, L), short rows filled up with -1."""
        return rows_of(self.ids)[0]

    @cached_property
    def unigram_replicates(self) -> tuple[Tensor, Tensor]:
        """Unigram entropy and share of the most frequent token on each redraw, (R,) each."""
        return self.resampling.unigrams(self.rows)


class FigureValue(NamedTuple):
    """A figure of one set of samples.

    Attributes:
        estimate: The figure on all samples.
        replicates: The figure on redrawn samples, float64 (R,).
        per_sample: What each sample contributes, (n,); None for a figure of the whole set.
    """

    estimate: float
    replicates: Tensor
    per_sample: Tensor | None = None


ComputeFigure: TypeAlias = Callable[[ScoredSamples], FigureValue | None]
"""Computes a figure of a set of samples; None where the set lacks what the figure needs."""


@dataclass(frozen=True)
class Figure:
    """A figure: its names, how it is computed, and how it is written.

    Attributes:
        name: Name in `Measures`, JSON and CSV.
        heading: Heading of its column in a narrow table.
        title: What it is called in a sentence, a plot or a model card.
        digits: Digits after the decimal point.
        compute: Function that computes it; None for a figure that is passed to `measure`, such as the NELBO.
        unit: Unit, such as ``"nats"``; empty for a share or a count. Default: empty.
        main: Whether it is shown in tables that have room for few figures only. Default: False.
    """

    name: str
    heading: str
    title: str
    digits: int
    compute: ComputeFigure | None
    unit: str = ""
    main: bool = False

    @property
    def label(self) -> str:
        """Title and unit, as beside the axis of a plot: ``"sample entropy (nats)"``."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def cell(self, figures: Mapping[str, Interval]) -> tuple[str, str]:
        """Return this figure out of several, and the ends of its interval, as texts; empty where it was not measured.

        Args:
            figures: Intervals by name, those of `Measures.figures` for one.
        """
        found = figures.get(self.name)
        if found is None or not math.isfinite(found.estimate):
            return "", ""
        spec = f".{self.digits}f"
        return f"{found.estimate:{spec}}", found.ends(spec)


def per_sample(statistic: Callable[[Sequence[Tensor]], Tensor]) -> ComputeFigure:
    """Return what computes the mean of a statistic of single samples.

    Args:
        statistic: Maps the ids of n samples to one value for each, (n,).
    """

    def compute(samples: ScoredSamples) -> FigureValue:
        return _mean(samples, statistic(samples.ids))

    return compute


def register_figure(figure: Figure) -> None:
    """Add a figure to the table, so that it is measured and shown with all others.

    Raises:
        TokenDriftError: If there is a figure of that name.
    """
    check_count("digits", figure.digits)
    if figure.name in FIGURES:
        raise fail(f"there is already a figure named {figure.name!r}.", "Choose another name.")
    FIGURES[figure.name] = figure


def main_figures(*sets: Mapping[str, object]) -> list[Figure]:
    """Return the figures that are shown where there is room for few, and that were measured in one of the sets.

    Args:
        *sets: Figures of each set by name, such as `Measures.figures`.
    """
    return [figure for name, figure in FIGURES.items() if figure.main and any(name in measured for measured in sets)]


def _mean(samples: ScoredSamples, values: Tensor) -> FigureValue:
    return FigureValue(float(values.double().mean()), samples.resampling.mean(values), values)


def _centred(estimate: float, replicates: Tensor) -> FigureValue:
    """Return a figure whose level depends on how many samples differ, its replicates set back to the estimate."""
    return FigureValue(estimate, replicates - replicates.nanmean() + estimate)


def _log_gen_ppl(samples: ScoredSamples) -> FigureValue:
    judged = samples.perplexity
    contributions = judged.sample_nll, judged.sample_tokens
    replicates = samples.resampling.log_perplexity(*contributions, judged.protocol)
    return FigureValue(float(log_perplexity(*contributions, judged.protocol)), replicates)


def _bits_per_byte(samples: ScoredSamples) -> FigureValue | None:
    return _ratio(samples, samples.perplexity.sample_nll / math.log(2), samples.perplexity.sample_bytes)


def _nats_per_token(samples: ScoredSamples) -> FigureValue | None:
    return _ratio(samples, samples.perplexity.sample_nll, samples.perplexity.sample_generated)


def _ratio(samples: ScoredSamples, numerators: Tensor, denominators: Tensor | None) -> FigureValue | None:
    """Return the ratio of two sums over samples; None if the second is not known."""
    if denominators is None:
        return None
    estimate = float(numerators.sum()) / float(denominators.sum())
    return FigureValue(estimate, samples.resampling.ratio(numerators, denominators))


def _unigram_entropy(samples: ScoredSamples) -> FigureValue:
    return _centred(unigram_entropy(samples.ids), samples.unigram_replicates[0])


def _most_frequent_share(samples: ScoredSamples) -> FigureValue:
    return _centred(most_frequent_share(samples.ids), samples.unigram_replicates[1])


def _duplicate_share(samples: ScoredSamples) -> FigureValue:
    return _centred(duplicate_share(samples.ids), samples.resampling.duplicates(samples.rows))


def _distinct(n: int) -> ComputeFigure:
    def compute(samples: ScoredSamples) -> FigureValue:
        estimate = distinct_n(samples.ids, n) if samples.rows.shape[1] >= n else math.nan
        return _centred(estimate, samples.resampling.distinct(samples.rows, n))

    return compute


def _copied_share(samples: ScoredSamples) -> FigureValue | None:
    return None if samples.training is None else _mean(samples, copied_share(samples.ids, samples.training))


def _length(ids: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(sequence) for sequence in ids])


FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure("gen_ppl", "Gen.-PPL", "Gen.-PPL", 1, _log_gen_ppl, main=True),
        Figure("bits_per_byte", "bits/byte", "bits per byte", 3, _bits_per_byte, main=True),
        Figure("nats_per_generated_token", "nats/token", "NLL per generated token", 3, _nats_per_token, "nats"),
        Figure("sample_entropy", "H sample", "sample entropy", 3, per_sample(sample_entropy), "nats", main=True),
        Figure("unigram_entropy", "H unigram", "unigram entropy", 3, _unigram_entropy, "nats", main=True),
        Figure("distinct_1", "distinct-1", "distinct tokens", 3, _distinct(1)),
        Figure("distinct_2", "distinct-2", "distinct 2-grams", 3, _distinct(2)),
        Figure("distinct_3", "distinct-3", "distinct 3-grams", 3, _distinct(3), main=True),
        Figure("distinct_4", "distinct-4", "distinct 4-grams", 3, _distinct(4)),
        Figure("repetition_4", "seq-rep-4", "repeated 4-grams", 3, per_sample(sample_repetition), main=True),
        Figure("longest_repeat", "longest repeat", "longest repeat", 1, per_sample(longest_repeat), "tokens"),
        Figure("most_frequent_share", "most frequent", "share of the most frequent token", 3, _most_frequent_share),
        Figure("duplicate_share", "duplicates", "share of duplicates", 3, _duplicate_share),
        Figure("self_bleu", "self-BLEU", "self-BLEU", 3, per_sample(self_bleu)),
        Figure("copied_share", "copied", "share of copied 8-grams", 3, _copied_share),
        Figure("length", "length", "length", 1, per_sample(_length), "tokens"),
        Figure("energy_distance", "energy distance", "energy distance to real text in character 3-grams", 4, None),
        Figure("energy_distance_z", "energy z", "the same over its spread between real texts", 1, None),
        Figure("gradient_moment", "gradient moment", "gradient moment to real text", 3, None, main=True),
        Figure("gradient_moment_z", "gradient z", "the same over its spread between real texts", 1, None, main=True),
        Figure("nelbo", "NELBO", "held-out NELBO", 3, None, "nats per token"),
    )
}
"""The figures by name, in the order in which they are shown."""

LIKELIHOODS = ("gen_ppl", "bits_per_byte", "nats_per_generated_token")
"""The figures that depend on the judge."""
