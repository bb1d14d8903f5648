"""The guard: figures of a set of samples which show that a low Gen.-PPL comes from dull or copied text.

A judge prefers dull text, and other figures show in which respect a text is dull. For each of these, values either
above or below that of real text are suspicious. A figure is flagged if it lies on the suspicious side by more than
`DEVIATIONS` standard errors of the difference and by more than a margin. Both sets are resampled, so that the variation
of real text counts as well. The margin prevents that a negligible difference is flagged only because there are many
samples:

| figure | suspicious | margin | what it indicates |
|---|---|---|---|
| ``gen_ppl`` | below real text | none | more predictable than human text; commented on even without a flag |
| ``bits_per_byte`` | below | none | the same, in place of ``gen_ppl`` if the judge has another tokenizer |
| ``sample_entropy`` | below | 2 % | few different tokens within a sample |
| ``unigram_entropy`` | below | 2 % | frequent words only; low temperature |
| ``distinct_1`` to ``distinct_4`` | below | 10 % | few words or phrases over the whole set |
| ``repetition_4`` | above | 0.02 | phrases repeated within a sample |
| ``longest_repeat`` | above | 25 % | long passages repeated within a sample |
| ``most_frequent_share`` | above | 25 % | one token makes up much of the text |
| ``duplicate_share`` | above | 0.02 | several samples are identical |
| ``self_bleu`` | above | 0.05 | samples share many phrases with each other |
| ``copied_share`` | above | 0.1 | passages copied from the training text |

With 3.5 standard errors, one-sided, 13 figures of real text beside real text give a flag in about 3 of 1,000 cases,
for sets large enough that the figures are nearly normal (a hundred samples and more).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tokendrift.evaluation.comparison import check_alike
from tokendrift.evaluation.figures import LIKELIHOODS
from tokendrift.evaluation.measures import Measures

DEVIATIONS = 3.5
SAME_SIZE = 0.05  # relative difference up to which two sets count as equal in size


class GuardRule(NamedTuple):
    """When the guard flags a figure.

    Attributes:
        figure: Name of the figure.
        side: Side of real text's figure on which it is suspicious: -1 below, 1 above.
        margin: Difference that is of no consequence.
        relative: Whether the margin is a share of real text's figure.
        whole_set: Whether the figure depends on the number of samples.
        meaning: What a flag indicates.
    """

    figure: str
    side: int
    margin: float
    relative: bool
    whole_set: bool
    meaning: str


RULES = (
    GuardRule("gen_ppl", -1, 0.0, True, False, "likelier under the judge than human text, so more predictable"),
    GuardRule("bits_per_byte", -1, 0.0, True, False, "likelier under the judge than human text, so more predictable"),
    GuardRule("sample_entropy", -1, 0.02, True, False, "few different tokens within a sample"),
    GuardRule("unigram_entropy", -1, 0.02, True, True, "frequent tokens preferred, as at a low temperature"),
    *(
        GuardRule(f"distinct_{n}", -1, 0.1, True, True, f"few different {n}-grams over the whole set")
        for n in (1, 2, 3, 4)
    ),
    GuardRule("repetition_4", 1, 0.02, False, False, "phrases repeated within a sample"),
    GuardRule("longest_repeat", 1, 0.25, True, False, "long passages repeated within a sample"),
    GuardRule("most_frequent_share", 1, 0.25, True, True, "one token makes up much of the text"),
    GuardRule("duplicate_share", 1, 0.02, False, True, "several samples are identical"),
    GuardRule("self_bleu", 1, 0.05, False, True, "samples share many phrases with each other"),
    GuardRule("copied_share", 1, 0.1, False, False, "passages copied from the training text"),
)  # fmt: skip


class Finding(NamedTuple):
    """What the guard found for one figure.

    Attributes:
        figure: Name of the figure; ``"samples"`` or ``"length"`` if the sets differ in size.
        level: ``"flag"`` or ``"comment"``.
        value: The figure of the samples.
        real: The figure of real text.
        threshold: The value beyond which the figure is flagged.
        meaning: What the finding indicates.
    """

    figure: str
    level: str
    value: float
    real: float
    threshold: float
    meaning: str

    def __str__(self) -> str:
        side = "below" if self.value < self.real else "above"
        if self.figure in {"samples", "length"}:
            return f"{self.figure} {self.value:.4g} against {self.real:.4g} of real text: {self.meaning}"
        beyond = f"{side} {self.threshold:.4g}" if self.level == "flag" else f"{side} real text within its variation"
        return f"{self.figure} {self.value:.4g} is {beyond} (real text {self.real:.4g}): {self.meaning}"


class Verdict(NamedTuple):
    """What the guard found for a set of samples.

    Attributes:
        findings: Flags and comments, in the order of `RULES`.
        unchecked: Figures that could not be checked, because they were not measured for both sets, because the sets
            differ in size, or because their variation is not known, as with a single redraw.
    """

    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the flagged figures."""
        return tuple(finding.figure for finding in self.findings if finding.level == "flag")

    @property
    def passed(self) -> bool:
        """Whether nothing was flagged."""
        return not self.flags

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and texts for JSON."""
        findings = [{**finding._asdict(), "sentence": str(finding)} for finding in self.findings]
        return {"passed": self.passed, "findings": findings, "unchecked": list(self.unchecked)}


def check_samples(generated: Measures, real: Measures, *, deviations: float = DEVIATIONS) -> Verdict:
    """Look for figures which show that a low Gen.-PPL comes from dull or copied text.

    Args:
        generated: Figures of the samples.
        real: Figures of real text that neither denoiser nor judge was trained on: as many samples of the same length,
            measured with the same options.
        deviations: Standard errors of the difference beyond which a figure is flagged. Default: 3.5.

    Raises:
        TokenDriftError: If the two were not measured with the same options.
    """
    check_alike(generated, real)
    findings, unchecked = list(_sizes(generated, real)), []
    same_number = abs(generated.samples - real.samples) <= SAME_SIZE * real.samples
    values, expected = generated.intervals(), real.intervals()
    for rule in RULES:
        name = rule.figure
        if name in LIKELIHOODS and name != generated.headline:
            continue  # a figure per token of a judge with another tokenizer does not compare, and one of them is enough
        if name not in values or name not in expected or (rule.whole_set and not same_number):
            unchecked.append(name)
            continue
        value, level = values[name].estimate, expected[name].estimate
        apart = generated.replicates[name] - real.replicates[name]
        apart = apart[~apart.isnan()]  # a figure may be undefined on some redraws
        error = float(apart.std()) if len(apart) > 1 else math.nan
        if not math.isfinite(value + level + error):
            unchecked.append(name)
            continue
        # The threshold lies on the suspicious side of real text's figure, beyond chance and beyond the margin.
        if name == "gen_ppl":  # compared as a ratio: its replicates are logarithms
            threshold = level * math.exp(rule.side * deviations * error)
        else:
            allowed = max(deviations * error, rule.margin * (level if rule.relative else 1))
            threshold = level + rule.side * allowed
        if rule.side * (value - threshold) > 0:
            findings.append(Finding(name, "flag", value, level, threshold, rule.meaning))
        elif name in LIKELIHOODS and value < level:
            findings.append(Finding(name, "comment", value, level, threshold, rule.meaning))
    return Verdict(tuple(findings), tuple(unchecked))


def _sizes(generated: Measures, real: Measures) -> list[Finding]:
    """Return a comment for each way in which the two sets differ in size."""
    unchecked = "figures of the whole set depend on this number and were not checked"
    sizes = (
        ("samples", float(generated.samples), float(real.samples), unchecked),
        ("length", generated.length.estimate, real.length.estimate, "entropy and repetition depend on the length"),
    )
    return [
        Finding(name, "comment", value, level, math.nan, meaning)
        for name, value, level, meaning in sizes
        if abs(value - level) > SAME_SIZE * level
    ]
