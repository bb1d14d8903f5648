"""All figures of several sets of samples beside real text, with the guard's verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tokendrift._checks import fail
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.comparison import Comparison, compare
from tokendrift.evaluation.figures import Figure, main_figures
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity
from tokendrift.evaluation.guard import Verdict, check_samples
from tokendrift.evaluation.measures import Measures, as_sample_set, measure, training_ids
from tokendrift.evaluation.samples import SampleInput, cleaned, id_sequences, spread
from tokendrift.evaluation.two_sample import character_features, kernel_distance
from tokendrift.models.tokenizer import decode, encode
from tokendrift.sampling import SampleSet

WIDTH = 26  # of a column of the printed table


@dataclass(frozen=True)
class EvaluatedSet:
    """One set of samples, measured beside real text.

    Attributes:
        name: Name of the set.
        measures: Its figures.
        real: The figures of real text, as many samples of the same lengths.
        comparison: The set compared with real text.
        verdict: What the guard says of the set.
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

    rows: tuple[EvaluatedSet, ...]

    def __getitem__(self, name: str) -> EvaluatedSet:
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
        """Return a table in plain text: every Gen.-PPL with its entropies, NFE, n, precision, and real text."""
        figures = main_figures(*(measures.figures for row in self.rows for measures in (row.measures, row.real)))
        heading = f"{'':<20}{'NFE':>5}{'n':>7}" + "".join(f"{figure.heading:>{WIDTH}}" for figure in figures)
        lines = [heading, *dict.fromkeys(_line("real text", row.real, figures) for row in self.rows)]
        lines += [_line(row.name, row.measures, figures) for row in self.rows]
        first = self.rows[0].measures
        judged = first.perplexity
        lines.append(
            f"judge {judged.judge}, {judged.precision}, protocol {judged.protocol}; entropies in nats, counted in "
            f"{first.counted_in}; {first.level:.0%} intervals by resampling"
        )
        for row in self.rows:
            lines += [f"{row.name}: {finding.level}: {finding}" for finding in row.verdict.findings]
            if row.measures.skipped:
                lines.append(f"{row.name}: {row.measures.skipped} samples were left out: too short to be scored")
        return "\n".join(lines)


def evaluate(
    sets: Mapping[str, SampleInput],
    judge: GenerativePerplexity,
    *,
    real: SampleInput,
    tokenizer: Any = None,
    clean_up_spaces: bool = False,
    training: SampleInput | None = None,
    nelbo: Mapping[str, Interval | None] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    skip_bad: bool = False,
    panel: Sequence[GenerativePerplexity] = (),
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Measure sets of samples and real text alike, and check each set with the guard.

    Real text is cut to the number and the lengths of each set's samples, since entropy and diversity depend on both.
    Where texts are known, the figures include the energy distance of each set to real text in character 3-grams, and
    its z-score, the distance over its spread between two sets of one law: real text against real text has 0 ± 1.
    Figures are counted in the ids as generated if every set and real text have them, else in the judge's tokens.

    Args:
        sets: Samples by name: ids, texts, or what `read_samples` returns.
        judge: A configured evaluator.
        real: Text that neither denoiser nor judge was trained on, at least as many samples as the largest set.
        tokenizer: The denoiser's tokenizer. It decodes ids that came without text, and encodes real text that came
            without ids. Default: None.
        clean_up_spaces: As for `measure`. Default: False.
        training: Training text, to find copies. Default: None.
        nelbo: Held-out NELBO of the denoiser of each set, by the name of the set. Default: None.
        resamples: Redraws of the bootstrap. Default: 1000.
        level: Confidence of the intervals. Default: 0.95.
        seed: Seed of the redraws. Default: 0.
        skip_bad: As for `measure`. Default: False.
        panel: Further judges, as for `measure`. Default: none.
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
    # 1. All sets and real text in one vocabulary.
    given = {name: as_sample_set(samples) for name, samples in sets.items()}
    real_set = as_sample_set(real)
    if real_set.ids is None and tokenizer is not None:
        real_set = replace(real_set, ids=encode(tokenizer, real_set.texts or []))
    as_generated = all(one.ids is not None for one in (*given.values(), real_set))
    vocabulary = "generated" if as_generated else "judge"
    own_tokenizer = tokenizer if as_generated else judge.judge.tokenizer
    if training is not None:  # encoded once for all sets
        training = training_ids(training, own_tokenizer)
    if clean_up_spaces and real_set.texts is not None:  # before it is cut: closing a gap may take a token
        real_set = replace(real_set, texts=[cleaned(text) for text in real_set.texts])

    def measured(samples: SampleInput, bound: Interval | None = None) -> Measures:
        return measure(
            samples, judge, tokenizer=tokenizer, clean_up_spaces=clean_up_spaces, vocabulary=vocabulary,
            training=training, nelbo=bound, resamples=resamples, level=level, seed=seed, skip_bad=skip_bad,
            panel=panel, progress=progress,
        )  # fmt: skip

    # 2. Each set, and beside it real text of its lengths; sets of the same lengths share theirs.
    real_measures: dict[tuple[bool, tuple[int, ...]], tuple[Measures, Tensor | None]] = {}
    rows = []
    for name, samples in given.items():
        measures = measured(samples, (nelbo or {}).get(name))
        key = measures.retokenised, measures.falling_lengths()
        if key not in real_measures:
            cut = cut_to_lengths(real_set, key[1], own_tokenizer, vocabulary, as_text=measures.retokenised)
            real_measures[key] = measured(cut), _features(cut, tokenizer)
        expected, features = real_measures[key]
        own = None if features is None else _features(samples, tokenizer)
        if own is not None and features is not None:
            options: dict[str, Any] = {"resamples": resamples, "level": level, "seed": seed}
            distance = kernel_distance(own, features, kernel="energy", **options)
            added = {"energy_distance": distance.distance, "energy_distance_z": distance.z_score}
            measures = replace(measures, figures={**measures.figures, **added})
        # 3. The set against real text: what differs, and what looks bought.
        compared, verdict = compare(measures, expected), check_samples(measures, expected)
        rows.append(EvaluatedSet(name, measures, expected, compared, verdict))
    return Evaluation(tuple(rows))


def _features(samples: SampleSet, tokenizer: Any) -> Tensor | None:
    """Return the `character_features` of samples, None if their texts are not known."""
    if samples.texts is None and tokenizer is None:
        return None
    return character_features(samples.texts if samples.texts is not None else decode(tokenizer, samples.ids or []))


def cut_to_lengths(
    real: SampleSet, lengths: Sequence[int], tokenizer: Any, vocabulary: str, *, as_text: bool
) -> SampleSet:
    """Return as many samples of real text, of these lengths or, where real text is shorter, of its own.

    They are spread over the text, among the samples that are long enough.

    Args:
        real: Real text.
        lengths: Lengths of the generated samples, in tokens of the vocabulary, falling.
        tokenizer: The tokenizer of the vocabulary, to encode and decode.
        vocabulary: As for `measure`.
        as_text: Whether the judge is to read text.
    """
    # 1. Which samples: those that are long enough, spread over the text.
    whole = real.ids if vocabulary == "generated" else None
    if whole is None:
        whole = [ids.tolist() for ids in id_sequences(real.scored(), None, tokenizer)[0]]
    chosen = spread([len(ids) for ids in whole], lengths)
    # 2. Whole samples keep their texts; the others are cut, and decoded if text is needed.
    texts = None
    if all(len(whole[i]) == length for i, length in zip(chosen, lengths, strict=False)):
        chosen = sorted(chosen)
        ids = [list(whole[i]) for i in chosen]
        texts = [real.texts[i] for i in chosen] if real.texts is not None else None
    else:
        ids = [list(whole[i][:length]) for i, length in zip(chosen, lengths, strict=False)]
    if not as_text:
        return SampleSet(ids=ids)
    if texts is None and tokenizer is None:
        raise fail(
            "the samples are texts, but real text consists of ids and there is no tokenizer to decode them.",
            "Pass tokenizer=..., or real texts.",
        )
    return SampleSet(
        ids=ids if vocabulary == "generated" else None, texts=texts if texts is not None else decode(tokenizer, ids)
    )


def _line(name: str, measures: Measures, figures: Sequence[Figure]) -> str:
    nfe = "" if measures.nfe is None else str(measures.nfe)
    cells = [figure.cell(measures.figures) for figure in figures]
    texts = (f"{value} ({ends})" if value else "" for value, ends in cells)
    return f"{name:<20}{nfe:>5}{measures.samples:>7}" + "".join(text.rjust(WIDTH) for text in texts)
