"""The report of an evaluation: a table and sentences for the terminal, and every number for JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.comparison import Comparison
from tokendrift.evaluation.evaluator import EvaluatedSet, Evaluation
from tokendrift.evaluation.figures import FIGURES, LIKELIHOODS, main_figures
from tokendrift.evaluation.guard import SAME_SIZE
from tokendrift.evaluation.matching import MatchedEntropy
from tokendrift.evaluation.measures import Measures
from tokendrift.evaluation.panel import PanelComparison, compare_panels
from tokendrift.evaluation.report.cards import judge_notes
from tokendrift.evaluation.report.sources import REAL, NamedSamples
from tokendrift.plain_text import spreadsheet_cell

if TYPE_CHECKING:
    from rich.table import Table

ENTROPIES = ("sample_entropy", "unigram_entropy")
ENDS = ("", "_low", "_high")
PER_TOKEN = (
    "The judge is not known to share a tokenizer with the denoisers, so Gen.-PPL, which is per token of the judge, "
    "does not compare between them: compare bits per byte."
)


class MatchedSet(NamedTuple):
    """A set compared with the baseline at equal entropy.

    Attributes:
        name: Name of the set.
        baseline: Name of the baseline.
        found: The comparison.
    """

    name: str
    baseline: str
    found: MatchedEntropy


@dataclass(frozen=True)
class EvaluationReport:
    """Sets of samples beside real text, and the texts themselves.

    Attributes:
        evaluation: The figures; its rows are in the order of the sources.
        sources: The sets of samples.
        texts: Texts by row, real text last under ``"real text"``.
        settings: How the figures were made.
        matched: Sets compared with the baseline at equal entropy; empty if no baseline was named.
    """

    evaluation: Evaluation
    sources: tuple[NamedSamples, ...]
    texts: Mapping[str, list[str]]
    settings: Mapping[str, Any]
    matched: tuple[MatchedSet, ...] = ()

    @property
    def level(self) -> str:
        """The confidence of the intervals in words."""
        return f"{100 * self.evaluation.rows[0].measures.level:g}%"

    @property
    def panel(self) -> tuple[str, ...]:
        """Names of the judges beside the first."""
        return tuple(one.perplexity.judge for one in self.evaluation.rows[0].measures.panel)

    @property
    def headline(self) -> str:
        """Name of the figure by which likelihoods compare: ``"gen_ppl"`` or ``"bits_per_byte"``."""
        known = {row.measures.headline for row in self.evaluation.rows}
        return "bits_per_byte" if "bits_per_byte" in known else "gen_ppl"

    def verdict(self) -> str:
        """Return the result in one sentence, with its figure and interval.

        It is about the sets of the fewest function evaluations: against the baseline at equal sample entropy if there
        is a baseline, else against real text.
        """
        matched = [one for one in self.matched if one.found.kind == "sample"]
        rows = [self.evaluation[one.name] for one in matched] or self._rows_without_controls()
        fewest = min((row.measures.nfe for row in rows if row.measures.nfe is not None), default=None)
        parts = []
        for i, row in enumerate(rows):
            if row.measures.nfe != fewest:
                continue
            name, baseline = self.model(row.name), matched[i].baseline if matched else REAL
            found = matched[i].found.comparison if matched else row.comparison
            if matched and not matched[i].found.matched:
                parts.append(
                    f"no temperature gives {baseline} the sample entropy of {name}, so nothing is claimed of {name}"
                )
                continue
            said = f"{name} has {found.ratio.estimate:.2f} times the {FIGURES[found.headline].title} of {baseline} "
            said += f"({found.ratio.ends('.2f')})"
            if not found.ratio.excludes(1.0):
                said += ", which is no difference beyond chance"
            if flags := row.verdict.flags:
                titles = [FIGURES[flag].title for flag in flags]
                said += f", and the guard flags {' and '.join(titles) if len(flags) < 3 else f'{len(flags)} figures'}"
            parts.append(said)
        at = "" if fewest is None else f"At {fewest} NFE"
        at += ((" and" if at else "At") + " equal sample entropy") if matched else ""
        sentence = f"{at}, {'; '.join(parts)}" if at else "; ".join(parts)
        if matched:
            return f"{sentence}."
        named = self.settings.get("baseline") is not None
        why = "no other set has as many steps as the baseline, so" if named else "without a baseline,"
        return f"{sentence}; {why} nothing is compared at equal entropy."

    def entries(self) -> Iterator[tuple[str, Measures, EvaluatedSet | None]]:
        """Yield name, figures and set of every line of the table: the sets, then real text.

        Real text was cut to each set. Cuts whose number of samples and mean length differ by less than `SAME_SIZE` are
        shown once, as the first of them; the JSON has them all.
        """
        for row in self.evaluation.rows:
            yield row.name, row.measures, row
        seen: list[Measures] = []
        for row in self.evaluation.rows:
            if not any(_same_size(row.real, one) for one in seen):
                seen.append(row.real)
                yield (REAL if len(seen) == 1 else f"{REAL}, cut as {row.name}"), row.real, None

    def model(self, name: str) -> str:
        """Return the name of the model of a set; for real text the name itself."""
        pairs = zip(self.evaluation.rows, self.sources, strict=True)
        return {row.name: source.model for row, source in pairs}.get(name, name)

    def table(self) -> Table:
        """Return the `rich` table for the terminal: every Gen.-PPL with its entropies, NFE, n, precision, real text."""
        from rich.box import HORIZONTALS
        from rich.table import Table
        from rich.text import Text

        view = Table(title="Samples beside real text", caption=Text(self.caption()), box=HORIZONTALS, show_lines=True)
        view.add_column("", overflow="fold", min_width=9)
        for heading in ("NFE\nGFLOPs" if any(m.flops for _, m, _ in self.entries()) else "NFE", "n", "precision"):
            view.add_column(heading, justify="right", no_wrap=True)
        figures = main_figures(*(measures.figures for _, measures, _ in self.entries()))
        for judge in self.panel:
            view.add_column(Text(f"bits/byte, {short_name(judge)}"), justify="right", min_width=8)
        for figure in figures:  # an interval may break into two lines where the terminal is narrow
            view.add_column(figure.heading, justify="right", min_width=8)
        view.add_column("guard", no_wrap=True)
        for name, measures, row in self.entries():
            cells = ("\n".join(figure.cell(measures.figures)) for figure in figures)
            view.add_row(
                Text(self.model(name)),
                "\n".join(cost_cell(measures)),
                str(measures.samples),
                measures.perplexity.precision,
                *("\n".join(FIGURES["bits_per_byte"].cell(one.figures)) for one in measures.panel),
                *cells,
                "" if row is None else guard_summary(row),
                style="italic" if row is None else None,
            )
        return view

    def caption(self) -> str:
        """Return how the figures were made."""
        measures = self.evaluation.rows[0].measures
        judged = measures.perplexity
        revision = "" if judged.revision is None else f" at {judged.revision}"
        note = "" if self.headline == "gen_ppl" else f" {PER_TOKEN}"
        beside = f" Beside it: {', '.join(self.panel)}." if self.panel else ""
        return (
            f"Judge {judged.judge}{revision}, {judged.precision}, protocol {judged.protocol}.{beside}{note} H: entropy "
            f"in nats, of the tokens of a sample and of all tokens together, counted in {measures.counted_in}. "
            f"{self.level} intervals by resampling."
        )

    def guard(self) -> list[str]:
        """Return the guard's verdicts in words, and what was left out."""
        lines = []
        for row, source in zip(self.evaluation.rows, self.sources, strict=True):
            verdict = row.verdict
            lines += [f"{row.name}: {finding.level}: {finding}." for finding in verdict.findings]
            if verdict.passed:
                lines.append(f"{row.name}: no figure was flagged in comparison with real text.")
            if verdict.unchecked:
                lines.append(f"{row.name}: not checked: {', '.join(verdict.unchecked)}.")
            if row.measures.skipped:
                lines.append(
                    f"{row.name}: samples left out because they are too short to be scored: {row.measures.skipped}."
                )
            if source.samples.metadata.get("complete") is False:
                count, asked = len(source.samples), source.samples.metadata.get("n", "all")
                more = isinstance(asked, int) and count > asked
                state = f"was changed: {count} samples instead of" if more else f"is unfinished: {count} samples of"
                lines.append(f"{row.name}: {source.origin} {state} {asked}.")
            if bad := source.samples.bad_lines:
                first = f"the first is line {bad[0].number} ({bad[0].reason})"
                lines.append(f"{row.name}: {len(bad)} line{'s' * (len(bad) > 1)} of {source.origin} left out: {first}.")
        for a, b, found in self.panels():
            if found.alone is not None:
                lines.append(f"{a}: warning: the gain over {b} is seen by the judge {found.alone} alone.")
        judges = (self.evaluation.rows[0].measures.perplexity.judge, *self.panel)
        checkpoints = {(one.model, str(one.samples.metadata.get("checkpoint", one.origin))) for one in self.sources}
        return lines + judge_notes(judges, sorted(checkpoints))

    def panels(self) -> list[tuple[str, str, PanelComparison]]:
        """Return what all judges say of each set against the baseline at equal entropy, or of each two sets."""
        if not self.panel:
            return []
        if self.matched:
            return [
                (name, f"{baseline} at equal {found.kind} entropy", compare_panels(found.model, found.baseline))
                for name, baseline, found in self.matched
                if found.matched
            ]
        pairs = [(self.evaluation[a], self.evaluation[b]) for a, b, _ in self.comparisons()]
        return [(a.name, b.name, compare_panels(a.measures, b.measures)) for a, b in pairs]

    def agreement(self) -> list[str]:
        """Return a sentence for each comparison on whether the judges agree; none if there is one judge."""
        return [found.agreement(a, b) for a, b, found in self.panels()]

    def comparisons(self) -> list[tuple[str, str, Comparison]]:
        """Return the comparisons of sets with equal numbers of steps, or of all sets if no two numbers are equal."""
        steps = dict(zip((row.name for row in self.evaluation.rows), (s.steps for s in self.sources), strict=True))
        pairs = list(combinations(self._rows_without_controls(), 2))
        alike = [(a, b) for a, b in pairs if steps[a.name] == steps[b.name]]
        return [(a.name, b.name, self.evaluation.compare(a.name, b.name)) for a, b in alike or pairs]

    def _rows_without_controls(self) -> list[EvaluatedSet]:
        rows = zip(self.evaluation.rows, self.sources, strict=True)
        return [row for row, source in rows if not source.control]

    def differences(self) -> list[str]:
        """Return a sentence for each pair of sets that differ beyond chance in the headline figure or an entropy."""
        compared = self.comparisons()
        lines = [text for a, b, found in compared if (text := _difference(a, b, found))]
        rest = len(compared) - len(lines)
        if rest:
            are = "1 pair is" if rest == 1 else f"{rest} pairs are"
            title = FIGURES[self.headline].title
            lines.append(
                f"{are} not distinguishable in {title} and both entropies: their intervals contain no difference."
            )
        return lines

    def at_equal_entropy(self) -> list[str]:
        """Return a sentence for each set and kind of entropy: the ratio of the headline figure to the baseline's."""
        return [f"{name} against {baseline}: {found}." for name, baseline, found in self.matched]

    def sentences(self) -> list[str]:
        """Return all that is said below the table, the verdict last."""
        said = [*self.guard(), *self.differences(), *self.at_equal_entropy(), *self.agreement()]
        return [*said, self.verdict()]

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON, which `as_json` completes: settings, every figure, verdicts, comparisons."""
        rows = []
        for found, source in zip(self.evaluation.to_dict()["rows"], self.sources, strict=True):
            bad = [line._asdict() for line in source.samples.bad_lines]
            made = dict(source.samples.metadata)
            rows.append({**found, "model": source.model, "origin": source.origin, "made": made, "bad_lines": bad})
        compared = [{"a": a, "b": b, **found.to_dict()} for a, b, found in self.comparisons()]
        matched = [{"name": name, "against": baseline, **found.to_dict()} for name, baseline, found in self.matched]
        plain = {"settings": dict(self.settings), "rows": rows, "comparisons": compared, "at_equal_entropy": matched}
        plain["judges"] = [{"a": a, "b": b, **found.to_dict()} for a, b, found in self.panels()]
        return {**plain, "guard": self.guard(), "differences": self.differences(), "verdict": self.verdict()}

    def to_csv(self) -> str:
        """Return the table as CSV, a line for each set and for real text, every figure with its interval."""
        out = io.StringIO()
        names = [f"{name}{end}" for name in FIGURES for end in ENDS]
        measured, how = ("nfe", "samples", "flops"), ("protocol", "precision", "judge", "revision")
        beside = [f"{name}{end} ({judge})" for judge in self.panel for name in LIKELIHOODS for end in ENDS]
        columns = ["name", "model", *measured, *how, "vocabulary", *names, "flags", *beside]
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writerow({name: spreadsheet_cell(name) for name in writer.fieldnames})
        for name, measures, row in self.entries():
            line: dict[str, Any] = {"name": name, "model": self.model(name), "vocabulary": measures.vocabulary}
            line |= {key: getattr(measures, key) for key in measured}
            line |= {key: getattr(measures.perplexity, key) for key in how}
            for i, one in enumerate((measures, *measures.panel)):
                by = f" ({one.perplexity.judge})" if i else ""
                for figure, value in one.figures.items():
                    line |= {f"{figure}{end}{by}": _finite(x) for end, x in zip(ENDS, value, strict=True)}
            line["flags"] = "" if row is None else " ".join(row.verdict.flags)
            writer.writerow({name: spreadsheet_cell(value) for name, value in line.items()})
        return out.getvalue()


def cost_cell(measures: Measures) -> tuple[str, str]:
    """Return the NFE of a set and its GFLOPs a sample as texts, empty where they are not known."""
    nfe = "" if measures.nfe is None else str(measures.nfe)
    return nfe, "" if measures.flops is None else f"{measures.flops / 1e9:.3g}"


def short_name(judge: str) -> str:
    """Return the last part of the name of a judge."""
    return PurePath(judge).name or judge


def guard_summary(row: EvaluatedSet) -> str:
    """Return the guard's verdict in a word or two: "passed" only if there is neither a flag nor a comment."""
    flags = len(row.verdict.flags)
    if not flags:
        return "comment" if row.verdict.findings else "passed"
    return f"{flags} flag{'s' if flags > 1 else ''}"


def as_json(value: Any) -> Any:
    """Return a value for JSON, in which numbers that are not finite are None."""
    if isinstance(value, dict):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    return _finite(value) if isinstance(value, float) else value


def _same_size(a: Measures, b: Measures) -> bool:
    pairs = ((a.samples, b.samples), (a.length.estimate, b.length.estimate))
    return all(abs(x - y) <= SAME_SIZE * y for x, y in pairs)


def _difference(a: str, b: str, found: Comparison) -> str | None:
    """Return how two sets differ, or None if neither the headline figure nor an entropy does beyond chance."""
    headline = found.headline
    verdicts = {name: found.verdict(name) for name in (headline, *ENTROPIES)}
    if set(verdicts.values()) == {"not distinguishable"}:
        return None
    parts = [_in_words(name, verdict, found) for name, verdict in verdicts.items()]
    sentence = f"{a} against {b}: {'; '.join(parts)}."
    if verdicts[headline] == "lower" and "lower" in (verdicts[name] for name in ENTROPIES):
        sentence += f" A lower entropy alone lowers {FIGURES[headline].title}, "
        sentence += "so this is a gain only if it also holds at equal entropy."
    return sentence


def _in_words(name: str, verdict: str, found: Comparison) -> str:
    """Return a verdict on a figure with the ratio of the headline figure, or the size of a difference in entropy."""
    title = FIGURES[name].title
    if verdict == "not distinguishable":
        return f"{title} {verdict}"
    if name == found.headline:
        return f"{title} {verdict}, {found.ratio.estimate:.3f} times ({found.ratio.ends('.3f')})"
    value = found.differences[name]
    size = Interval(abs(value.estimate), *sorted((abs(value.low), abs(value.high))))
    return f"{title} {verdict} by {size:.3f} nats"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
