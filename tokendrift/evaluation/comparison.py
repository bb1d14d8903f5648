"""Two sets of samples side by side: what differs beyond chance, and in which direction."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tokendrift._checks import fail
from tokendrift.evaluation.bootstrap import Interval, interval_from
from tokendrift.evaluation.measures import Measures

MUST_AGREE = ("vocabulary", "level", "retokenised", "clean_up_spaces")


class Comparison(NamedTuple):
    """How a set of samples differs from another.

    Attributes:
        gen_ppl_ratio: Gen.-PPL of a over that of b.
        differences: a minus b in every other figure that both have.
        paired: Whether sample i of a and of b were redrawn together, which needs sets of one size.
    """

    gen_ppl_ratio: Interval
    differences: dict[str, Interval]
    paired: bool

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
        found |= {name: (value, name) for name, value in self.differences.items()}
        rows = {key: {**value._asdict(), "verdict": self.verdict(name)} for key, (value, name) in found.items()}
        return {**rows, "paired": self.paired}


def compare(a: Measures, b: Measures) -> Comparison:
    """Compare two sets of samples figure by figure, with bootstrap intervals.

    Sets of one size are redrawn together, sample i with sample i: that keeps what they share (the same prompt, the
    same seed) out of the interval, and costs nothing where they share nothing.

    Raises:
        TokenDriftError: If the two were not measured alike (judge, protocol, precision, vocabulary, resamples).
    """
    check_alike(a, b)
    logs = a.replicates["gen_ppl"] - b.replicates["gen_ppl"]
    ratio = (
        torch.tensor(interval_from(a.log_gen_ppl - b.log_gen_ppl, logs, a.level), dtype=torch.float64).exp().tolist()
    )
    theirs = b.intervals()
    differences = {
        name: interval_from(value.estimate - theirs[name].estimate, a.replicates[name] - b.replicates[name], a.level)
        for name, value in a.intervals().items()
        if name != "gen_ppl" and name in theirs and name in a.replicates
    }
    return Comparison(Interval(*ratio), differences, a.samples == b.samples)


def check_alike(a: Measures, b: Measures) -> None:
    """Require two sets measured in one way, without which their figures do not compare."""
    for name in ("protocol", "precision", "judge", "revision"):
        ours, theirs = getattr(a.perplexity, name), getattr(b.perplexity, name)
        if ours != theirs:
            raise _differ(name, ours, theirs)
    for name in MUST_AGREE:
        if getattr(a, name) != getattr(b, name):
            raise _differ(name, getattr(a, name), getattr(b, name))
    if len(a.replicates["gen_ppl"]) != len(b.replicates["gen_ppl"]):
        raise _differ("resamples", len(a.replicates["gen_ppl"]), len(b.replicates["gen_ppl"]))


def _differ(name: str, ours: object, theirs: object) -> Exception:
    return fail(
        f"the two sets were not measured alike: {name} is {ours!r} for one and {theirs!r} for the other.",
        "Measure both with the same judge and the same options.",
    )
