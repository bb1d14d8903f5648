"""All figures of several sets of samples beside real text, with the guard's verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokendrift._checks import fail
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.comparison import Comparison, compare
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity
from tokendrift.evaluation.guard import Verdict, check_samples
from tokendrift.evaluation.measures import Measures, as_sample_set, measure, training_ids
from tokendrift.evaluation.samples import Samples, SampleSet, cleaned, decode, id_sequences, spread, tokenize

COLUMNS = (
    ("gen_ppl", "Gen.-PPL", 1),
    ("sample_entropy", "H sample", 3),
    ("unigram_entropy", "H unigram", 3),
    ("distinct_3", "distinct-3", 3),
    ("repetition_4", "seq-rep-4", 3),
    ("self_bleu", "self-BLEU", 3),
    ("duplicate_share", "duplicates", 3),
)


@dataclass(frozen=True)
class Row:
    """One set of samples.

    Attributes:
        name: Of the set.
        measures: Its figures.
        real: Those of real text, as many samples of the same lengths.
        comparison: The set against real text.
        verdict: Of the guard.
    """

    name: str
    measures: Measures
    real: Measures
    comparison: Comparison
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "name": self.name,
            **self.measures.to_dict(),
            "real_text": self.real.summary(),
            "against_real_text": self.comparison.to_dict(),
            "guard": self.verdict.to_dict(),
        }


@dataclass(frozen=True)
class Evaluation:
    """Several sets of samples beside real text.

    Attributes:
        rows: The sets, in the order given.
    """

    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def compare(self, name: str, other: str) -> Comparison:
        """Return the comparison of two of the sets."""
        return compare(self[name].measures, self[other].measures)

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {"rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        """Return a table in plain text: no Gen.-PPL without its entropies, NFE, n, precision, and real text."""
        sizes = dict.fromkeys(_line("real text", row.real) for row in self.rows)
        lines = [_heading(), *sizes]
        for row in self.rows:
            lines.append(_line(row.name, row.measures))
        judged = self.rows[0].measures.perplexity
        lines.append(
            f"judge {judged.judge}, {judged.precision}, protocol {judged.protocol}; entropies in nats, counted in "
            f"{'the ids as generated' if self.rows[0].measures.vocabulary == 'generated' else 'tokens of the judge'}; "
            f"{self.rows[0].measures.level:.0%} intervals by resampling"
        )
        for row in self.rows:
            lines += [f"{row.name}: {finding.level}: {finding}" for finding in row.verdict.findings]
            if row.measures.skipped:
                lines.append(f"{row.name}: {row.measures.skipped} samples were left out: too short to be scored")
        return "\n".join(lines)


def evaluate(
    sets: Mapping[str, Samples],
    judge: GenerativePerplexity,
    *,
    real: Samples,
    tokenizer: Any = None,
    clean_up_spaces: bool = False,
    training: Samples | None = None,
    nelbo: Mapping[str, Interval] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Measure sets of samples and real text alike, and let the guard look at each.

    Real text is cut to the number and the lengths of each set's samples, since entropy and diversity depend on both.
    Figures are counted in the ids as generated if every set and real text have them, else in the judge's tokens.

    Args:
        sets: Samples by name: ids, texts, or what `read_samples` returns.
        judge: A configured evaluator.
        real: Text that neither denoiser nor judge was trained on, at least as many samples as the largest set.
        tokenizer: The denoiser's: decodes ids that came without text, and encodes real text that came without ids.
        clean_up_spaces: As for `measure`.
        training: Training text, to find copies.
        nelbo: Held-out NELBO of the denoisers by name.
        resamples: As for `measure`.
        level: As for `measure`.
        seed: As for `measure`.
        skip_bad: As for `measure`.
        progress: As for `GenerativePerplexity.update`.

    Raises:
        TokenDriftError: If there is no set, or one cannot be scored.

    >>> import torch
    >>> judge = GenerativePerplexity(lambda ids, mask: torch.zeros(*ids.shape, 10), protocol="all")
    >>> ids = torch.randint(10, (60, 12), generator=torch.Generator().manual_seed(0))
    >>> evaluation = evaluate({"dull": ids[:30].clamp(max=1)}, judge, real=ids[30:])
    >>> "unigram_entropy" in evaluation["dull"].verdict.flags
    True
    """
    if not sets:
        raise fail("evaluate needs at least one set of samples.")
    given = {name: as_sample_set(samples) for name, samples in sets.items()}
    real_set = as_sample_set(real)
    if real_set.ids is None and tokenizer is not None:
        real_set = replace(real_set, ids=tokenize(tokenizer, real_set.texts or []))
    everywhere = all(one.ids is not None for one in (*given.values(), real_set))
    vocabulary = "generated" if everywhere else "judge"
    if training is not None:  # once for all sets
        training = training_ids(training, tokenizer if everywhere else judge.judge.tokenizer)
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "clean_up_spaces": clean_up_spaces,
        "vocabulary": vocabulary,
        "training": training,
        "resamples": resamples,
        "level": level,
        "seed": seed,
        "skip_bad": skip_bad,
        "progress": progress,
    }
    if clean_up_spaces and real_set.texts is not None:  # before it is cut: closing a gap may take a token
        real_set = replace(real_set, texts=[cleaned(text) for text in real_set.texts])
    found: dict[tuple[bool, tuple[int, ...]], Measures] = {}
    rows = []
    for name, samples in given.items():
        measures = measure(samples, judge, nelbo=(nelbo or {}).get(name), **options)
        lengths = tuple(sorted(measures.per_sample["length"].tolist(), reverse=True))
        kind = measures.retokenised, lengths
        if kind not in found:
            cut = cut_to_lengths(real_set, lengths, judge, tokenizer, vocabulary, as_text=measures.retokenised)
            found[kind] = measure(cut, judge, **options)
        expected = found[kind]
        rows.append(Row(name, measures, expected, compare(measures, expected), check_samples(measures, expected)))
    return Evaluation(tuple(rows))


def cut_to_lengths(
    real: SampleSet,
    lengths: tuple[int, ...],
    judge: GenerativePerplexity,
    tokenizer: Any,
    vocabulary: str,
    *,
    as_text: bool,
) -> SampleSet:
    """Return as many samples of real text, of these lengths or, where real text is shorter, of its own.

    They are spread over the text, among the samples that are long enough.

    Args:
        real: Real text.
        lengths: Of the generated samples, in tokens of the vocabulary, falling.
        judge: Its tokenizer encodes and decodes for ``vocabulary="judge"``.
        tokenizer: The denoiser's, for ``vocabulary="generated"``.
        vocabulary: As for `measure`.
        as_text: Whether the judge is to read text.
    """
    own = tokenizer if vocabulary == "generated" else judge.judge.tokenizer
    whole = real.ids if vocabulary == "generated" and real.ids is not None else None
    if whole is None:
        whole = [ids.tolist() for ids in id_sequences(real.scored(), None, own)[0]]
    chosen = spread([len(ids) for ids in whole], lengths)
    if all(len(whole[i]) == length for i, length in zip(chosen, lengths, strict=False)):
        chosen = sorted(chosen)
        ids = [list(whole[i]) for i in chosen]
        texts = [real.texts[i] for i in chosen] if real.texts is not None else None
    else:
        ids = [list(whole[i][:length]) for i, length in zip(chosen, lengths, strict=False)]
        texts = None
    if as_text and texts is None:
        if own is None:
            raise fail(
                "the samples came as texts, and real text as ids without a tokenizer.",
                "Pass tokenizer=..., or real texts.",
            )
        texts = decode(own, ids)
    return SampleSet(ids=ids if vocabulary == "generated" else None, texts=texts) if as_text else SampleSet(ids=ids)


def _heading() -> str:
    return f"{'':<20}{'NFE':>5}{'n':>7}" + "".join(f"{label:>26}" for _, label, _ in COLUMNS)


def _line(name: str, measures: Measures) -> str:
    cells = []
    for field, _, digits in COLUMNS:
        value = getattr(measures, field)
        cells.append(f"{value.estimate:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})".rjust(26))
    nfe = "" if measures.nfe is None else str(measures.nfe)
    return f"{name:<20}{nfe:>5}{measures.samples:>7}" + "".join(cells)
