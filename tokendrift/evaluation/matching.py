"""Two models at equal entropy: a comparison that a lower sampling temperature cannot win.

Lowering the temperature lowers Gen.-PPL and entropy together and needs no training. The baseline is therefore sampled
at the temperature that gives it the other model's entropy, and the ratios of Gen.-PPL and of bits per byte are taken
there. Compare at both kinds of entropy: a lower temperature lowers the entropy of the whole set long before that of a
single sample. Equal entropy is necessary for a comparison, but it does not make two sets equally good or bad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from tokendrift._checks import check_choice, check_count, check_positive, fail
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.comparison import Comparison, check_alike, compare
from tokendrift.evaluation.figures import FIGURES
from tokendrift.evaluation.guard import SAME_SIZE
from tokendrift.evaluation.measures import Measures
from tokendrift.evaluation.samples import SampleInput
from tokendrift.sampling import SamplingSetting

KINDS = ("sample", "unigram")
TOLERANCE = 0.02  # nats; entropies that differ by less count as equal
ALLOWANCE = 0.05  # nats; the same if the interval of the difference contains 0
TEMPERATURES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1)

DrawSamples: TypeAlias = Callable[[SamplingSetting, int], SampleInput]
"""Draws n samples at a setting, always the same for the same arguments. A `SampleSet` also says its measured NFE."""
MeasureSamples: TypeAlias = Callable[[SampleInput], Measures]
"""Measures a set: ``lambda samples: measure(samples, judge, tokenizer=tokenizer)``."""


class MatchedEntropy(NamedTuple):
    """A model compared with a baseline that is sampled at the temperature which gives it the same entropy.

    Attributes:
        comparison: Every figure of the model against the baseline's.
        kind: Entropy that was matched, ``"sample"`` or ``"unigram"``.
        temperature: Sampling temperature of the baseline.
        entropy_difference: The model's entropy minus the baseline's, nats: the mismatch that remains.
        model: Figures of the model.
        baseline: Figures of the baseline at that temperature.
        real: Figures of real text.
        at_end: Whether the temperature is an end of the grid, with the model's entropy beyond it.
    """

    comparison: Comparison
    kind: str
    temperature: float
    entropy_difference: Interval
    model: Measures
    baseline: Measures
    real: Measures
    at_end: bool = False

    @property
    def ratio(self) -> Interval:
        """The model's figure over the baseline's: below 1 the model's text is likelier at the same entropy.

        The figure is the headline of the comparison: Gen.-PPL, or bits per byte if the judge has another tokenizer.
        """
        return self.comparison.ratio

    @property
    def matched(self) -> bool:
        """Whether the entropies are equal, without which the ratio has no meaning.

        They count as equal if they differ by at most `TOLERANCE`. If the interval of the difference contains 0, a
        difference of up to `ALLOWANCE` is accepted as well, unless the temperature is an end of its grid: a better one
        may lie beyond it.
        """
        left = abs(self.entropy_difference.estimate)
        by_chance = not (self.at_end or self.entropy_difference.excludes(0.0))
        return left <= TOLERANCE or (by_chance and left <= ALLOWANCE)

    def verdict(self) -> str:
        """Return ``"better"`` or ``"worse"`` if the interval does not contain 1, else ``"not distinguishable"``.

        If the entropies could not be matched, nothing is claimed, and the verdict is ``"not matched"``.
        """
        if not self.matched:
            return "not matched"
        if not self.ratio.excludes(1.0):
            return "not distinguishable"
        return "better" if self.ratio.estimate < 1 else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and texts for JSON."""
        found = self.comparison
        plain: dict[str, Any] = {name: getattr(self, name) for name in ("kind", "temperature", "at_end")}
        plain |= {"headline": found.headline, "ratio": self.ratio._asdict()}
        plain |= {"gen_ppl_ratio": found.gen_ppl_ratio._asdict()}
        if found.bits_per_byte_ratio is not None:
            plain["bits_per_byte_ratio"] = found.bits_per_byte_ratio._asdict()
        plain["entropy_difference"] = self.entropy_difference._asdict()
        sets = {name: getattr(self, name).summary() for name in ("model", "baseline", "real")}
        return {**plain, **sets, "matched": self.matched, "verdict": self.verdict()}

    def __str__(self) -> str:
        model, baseline, real, headline = self.model, self.baseline, self.real, self.comparison.headline
        other = "bits_per_byte" if headline == "gen_ppl" else "gen_ppl"
        second = getattr(self.comparison, f"{other}_ratio")
        beside = "" if second is None else f" ({FIGURES[other].title} ratio {second:.3f})"
        return (
            f"{FIGURES[headline].title} ratio at equal {self.kind} entropy {self.ratio:.3f}, {self.verdict()}{beside}: "
            f"{_in_words(model)} against {_in_words(baseline)} at temperature {self.temperature:.2f}; "
            f"real text {_in_words(real)}; entropy differs by "
            f"{self.entropy_difference.estimate:+.3f} nats; {model.samples} samples, {model.perplexity.precision}, "
            f"protocol {model.perplexity.protocol}"
        )


def at_matched_entropy(
    model: Measures,
    baseline: DrawSamples,
    measure: MeasureSamples,
    *,
    real: Measures,
    steps: int,
    count: int | None = None,
    kind: str = "sample",
    temperatures: Sequence[float] = TEMPERATURES,
    curve: Sequence[tuple[float, float]] | None = None,
) -> MatchedEntropy:
    """Compare a model with a baseline at the temperature that gives the baseline the model's entropy.

    A model cannot win this comparison by a lower sampling temperature.

    Args:
        model: Figures of the model, sampled as it is meant to be used.
        baseline: Draws samples from the baseline.
        measure: Measures a set of samples, with the options that the model was measured with.
        real: Figures of real text, reported beside the two.
        steps: Steps of the baseline's sampler, the same number as the model's.
        count: Samples of the baseline. Default: as many as the model has, which makes the bootstrap paired.
        kind: Entropy to match, ``"sample"`` or ``"unigram"``. Default: ``"sample"``.
        temperatures: Grid of temperatures, between which the baseline's entropy is interpolated. An entropy beyond
            both ends of the grid cannot be matched. Default: `TEMPERATURES`.
        curve: Pairs (temperature, entropy) of the baseline for sets of this size, if they were measured before; the
            grid is then not sampled. Default: None.

    Raises:
        TokenDriftError: For an unknown kind, an empty grid, sets not measured alike, or another count at equal unigram
            entropy.
    """
    check_choice("kind", kind, KINDS)
    count = model.samples if count is None else check_count("count", count, least=2)
    check_one_size(kind, model.samples, count)
    if curve is None:
        grid = [check_positive("temperatures", t) for t in temperatures]
        curve = [(t, entropy(measure(baseline(SamplingSetting(steps, t), count)), kind).estimate) for t in grid]
    target = entropy(model, kind).estimate
    temperature = temperature_at(curve, target)
    at_end = any(temperature == end and target != reached for end, reached in (min(curve), max(curve)))
    matched = measure(baseline(SamplingSetting(steps, temperature), count))
    return matched_entropy(model, matched, real, kind=kind, temperature=temperature, at_end=at_end)


def matched_entropy(
    model: Measures, baseline: Measures, real: Measures, *, kind: str, temperature: float, at_end: bool = False
) -> MatchedEntropy:
    """Return the comparison of a model with a baseline already sampled at the matching temperature.

    Args:
        model: Figures of the model.
        baseline: Figures of the baseline at ``temperature``.
        real: Figures of real text.
        kind: Entropy that was matched, ``"sample"`` or ``"unigram"``.
        temperature: Sampling temperature of the baseline.
        at_end: Whether it is an end of the grid, with the model's entropy beyond it. Default: False.
    """
    check_alike(model, real)
    check_one_size(kind, model.samples, baseline.samples)
    found = compare(model, baseline)
    difference = found.differences[entropy_name(kind)]
    return MatchedEntropy(found, kind, temperature, difference, model, baseline, real, at_end)


def temperature_at(curve: Sequence[tuple[float, float]], entropy: float) -> float:
    """Return the temperature at which a curve of (temperature, entropy) reaches an entropy.

    Between the points of the curve the temperature is interpolated linearly. For an entropy outside the curve, the
    temperature of the nearest end is returned.

    >>> temperature_at([(1.0, 3.0), (0.5, 2.0), (0.8, 2.8)], 2.9)
    0.9
    """
    points = sorted(curve)
    if not points:
        raise fail("the curve of temperatures and entropies is empty.", "Sample the baseline at some temperatures.")
    if entropy >= points[-1][1]:
        return points[-1][0]
    for (cold, low), (warm, high) in reversed(list(pairwise(points))):
        if low <= entropy <= high:
            return cold if high == low else cold + (warm - cold) * (entropy - low) / (high - low)
    return points[0][0]


def check_one_size(kind: str, samples: int, count: int) -> None:
    """Require two sets of one size at equal unigram entropy, which grows with the number of tokens."""
    if kind == "unigram" and abs(samples - count) > SAME_SIZE * samples:
        raise fail(
            f"the sets have {samples} and {count} samples, and the entropy of all tokens depends on their number.",
            "Compare sets of one size, or compare at equal sample entropy.",
        )


def entropy(measures: Measures, kind: str) -> Interval:
    """Return the mean entropy of a sample, or that of all tokens together, in nats."""
    return measures.figures[entropy_name(kind)]


def entropy_name(kind: str) -> str:
    """Return the name of the figure for a kind of entropy, ``"sample"`` or ``"unigram"``."""
    check_choice("kind", kind, KINDS)
    return f"{kind}_entropy"


def _in_words(measures: Measures) -> str:
    """Return Gen.-PPL with the figures that always stand beside it."""
    nfe = "" if measures.nfe is None else f", {measures.nfe} NFE"
    coded = "" if measures.bits_per_byte is None else f", {measures.bits_per_byte.estimate:.3f} bits per byte"
    return (
        f"Gen.-PPL {measures.gen_ppl.estimate:.1f}{coded} (entropy {measures.sample_entropy.estimate:.3f} in a sample, "
        f"{measures.unigram_entropy.estimate:.3f} over all{nfe})"
    )
