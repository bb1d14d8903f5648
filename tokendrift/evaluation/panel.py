"""Several judges on the same samples: what each says of two sets, and whether they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokendrift.evaluation.bootstrap import Interval, interval_from
from tokendrift.evaluation.comparison import check_alike, log_ratio
from tokendrift.evaluation.measures import Measures


@dataclass(frozen=True)
class PanelComparison:
    """The bits per byte of a set, a, over those of another, b, under each of several judges.

    Attributes:
        judges: Names of the judges.
        logs: For each judge the logarithm of the ratio, and the same on every redraw, (R,).
        level: Confidence of the intervals.
    """

    judges: tuple[str, ...]
    logs: tuple[tuple[float, Tensor], ...]
    level: float

    @property
    def ratios(self) -> tuple[Interval, ...]:
        """The ratio under each judge."""
        return tuple(interval_from(*logs, self.level).exp() for logs in self.logs)

    @property
    def alone(self) -> str | None:
        """The judge that alone finds fewer bits per byte in a, beyond the intervals of all others; None if none does.

        Every other judge must see no gain, and must differ from this one by more than chance: the redraws of the
        samples are the same for all judges, so that the difference between two judges is paired.
        """
        gains = [i for i, ratio in enumerate(self.ratios) if ratio.high < 1]
        if len(gains) != 1 or len(self.judges) < 2:
            return None
        (one,) = gains
        for i, (estimate, replicates) in enumerate(self.logs):
            apart = estimate - self.logs[one][0], replicates - self.logs[one][1]
            if i != one and not interval_from(*apart, self.level).low > 0:
                return None
        return self.judges[one]

    def agreement(self, a: str, b: str) -> str:
        """Return a sentence on whether the judges agree, and on how far their ratios are apart.

        Args:
            a: Name of the first set.
            b: Name of the second set.
        """
        ratios, estimates = self.ratios, [ratio.estimate for ratio in self.ratios]
        shown = ", ".join(f"{ratio:.3f} by {judge}" for ratio, judge in zip(ratios, self.judges, strict=True))
        signs = {(ratio.estimate > 1) if ratio.excludes(1.0) else None for ratio in ratios}
        if len(signs) > 1:
            said = f"do not agree on bits per byte: {a} against"
        else:
            (higher,) = signs
            how = (
                "does not differ beyond chance from" if higher is None else f"has {'more' if higher else 'fewer'} than"
            )
            said = f"agree on bits per byte: {a} {how}"
        return f"The judges {said} {b}, {shown}; {max(estimates) - min(estimates):.3f} apart at most."

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and texts for JSON."""
        ratios = {judge: ratio._asdict() for judge, ratio in zip(self.judges, self.ratios, strict=True)}
        return {"bits_per_byte_ratio": ratios, "gain_seen_by_one_judge_alone": self.alone}


def compare_panels(a: Measures, b: Measures) -> PanelComparison:
    """Compare two sets under every judge that scored them.

    Raises:
        TokenDriftError: If the sets were not scored by the same judges with the same options.
    """
    check_alike(a, b)
    pairs = list(zip((a, *a.panel), (b, *b.panel), strict=True))
    logs = tuple(log_ratio(x, y, "bits_per_byte") for x, y in pairs)
    return PanelComparison(tuple(x.perplexity.judge for x, _ in pairs), logs, a.level)
