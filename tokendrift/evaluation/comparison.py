"""Two sets of samples side by side: what differs beyond chance, and in which direction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from tokendrift._checks import fail
from tokendrift.evaluation.bootstrap import Interval, interval_from
from tokendrift.evaluation.measures import Measures

MUST_AGREE = ("vocabulary", "level", "retokenised", "clean_up_spaces")


class Comparison(NamedTuple):
    """How a set of samples, a, differs from another, b.

    Attributes:
        gen_ppl_ratio: Gen.-PPL of a over that of b.
        differences: a minus b in every other figure that was measured for both.
        paired: Whether sample i of a and of b were redrawn together, which needs sets of the same size.
        bits_per_byte_ratio: Bits per byte of a over those of b; None if they were not measured for both.
        headline: Figure by which the likelihoods compare: ``"gen_ppl"`` if the judge shares the tokenizer of both
            denoisers or the bytes are not known, else ``"bits_per_byte"``.
    """

    gen_ppl_ratio: Interval
    differences: dict[str, Interval]
    paired: bool
    bits_per_byte_ratio: Interval | None = None
    headline: str = "gen_ppl"

    @property
    def ratio(self) -> Interval:
        """The ratio of the headline figure."""
        if self.headline == "gen_ppl" or self.bits_per_byte_ratio is None:
            return self.gen_ppl_ratio
        return self.bits_per_byte_ratio

    def verdict(self, name: str = "gen_ppl") -> str:
        """Return ``"lower"``, ``"higher"``, or ``"not distinguishable"`` where the interval holds no difference."""
        found = self.gen_ppl_ratio if name == "gen_ppl" else self.differences[name]
        none = 1.0 if name == "gen_ppl" else 0.0
        if not found.excludes(none):
            return "not distinguishable"
        return "lower" if found.estimate < none else "higher"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and texts for JSON, a verdict with each figure."""
        found = {"gen_ppl_ratio": (self.gen_ppl_ratio, "gen_ppl")}
        if self.bits_per_byte_ratio is not None:
            found["bits_per_byte_ratio"] = (self.bits_per_byte_ratio, "bits_per_byte")
        found |= {name: (value, name) for name, value in self.differences.items()}
        rows = {key: {**value._asdict(), "verdict": self.verdict(name)} for key, (value, name) in found.items()}
        return {**rows, "paired": self.paired, "headline": self.headline}


def compare(a: Measures, b: Measures) -> Comparison:
    """Compare two sets of samples figure by figure, with bootstrap intervals.

    If the sets have the same size, sample i of one is redrawn together with sample i of the other. Variation that the
    two share, such as that of a prompt or a seed, then does not widen the interval.

    Raises:
        TokenDriftError: If the two were not measured alike (judge, protocol, precision, vocabulary, resamples).
    """
    check_alike(a, b)
    headline = "gen_ppl" if a.headline == b.headline == "gen_ppl" else "bits_per_byte"
    known = "bits_per_byte" in a.figures and "bits_per_byte" in b.figures
    bits_per_byte = ratio_interval(log_ratio(a, b, "bits_per_byte"), a.level) if known else None
    theirs = b.intervals()
    differences = {
        name: interval_from(value.estimate - theirs[name].estimate, a.replicates[name] - b.replicates[name], a.level)
        for name, value in a.intervals().items()
        if name != "gen_ppl" and name in theirs and name in a.replicates
    }
    ratio = ratio_interval(log_ratio(a, b, "gen_ppl"), a.level)
    return Comparison(
        ratio, differences, a.samples == b.samples, bits_per_byte, headline if bits_per_byte else "gen_ppl"
    )


def log_ratio(a: Measures, b: Measures, name: str) -> tuple[float, Tensor]:
    """Return the logarithm of the ratio of a figure of two sets, and the same on every redraw, (R,).

    Args:
        a: Figures of the numerator.
        b: Figures of the denominator.
        name: ``"gen_ppl"`` or ``"bits_per_byte"``.
    """
    (ours, redrawn), (theirs, redrawn_too) = log_figure(a, name), log_figure(b, name)
    return ours - theirs, redrawn - redrawn_too


def log_figure(measures: Measures, name: str) -> tuple[float, Tensor]:
    """Return the logarithm of a figure, and the same on every redraw, (R,)."""
    if name == "gen_ppl":  # its replicates are logarithms already
        return measures.log_gen_ppl, measures.replicates[name]
    return math.log(measures.figures[name].estimate), measures.replicates[name].log()


def ratio_interval(logs: tuple[float, Tensor], level: float) -> Interval:
    """Return the interval of a ratio from its logarithm and the logarithms on every redraw."""
    return interval_from(*logs, level).exp()


def check_alike(a: Measures, b: Measures) -> None:
    """Require that two sets were measured with the same options, without which their figures do not compare."""
    for name, ours in _options(a).items():
        theirs = _options(b)[name]
        if ours != theirs:
            raise fail(
                f"the two sets were not measured in the same way: {name} is {ours!r} for one and {theirs!r} for the "
                "other.",
                "Measure both with the same judge and the same options.",
            )


def _options(measures: Measures) -> dict[str, object]:
    judged = {name: getattr(measures.perplexity, name) for name in ("protocol", "precision", "judge", "revision")}
    own = {name: getattr(measures, name) for name in MUST_AGREE}
    judges = [one.perplexity.judge for one in measures.panel]
    return {**judged, **own, "panel": judges, "resamples": len(measures.replicates["gen_ppl"])}
