"""All figures of several sets of samples beside real text, with the guard's verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tokendrift._checks import fail
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.comparison import Comparison, compare
from tokendrift.evaluation.figures import Figure, main_figures
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity
from tokendrift.evaluation.gradient_moment import differentiable_parameters, gradient_features
from tokendrift.evaluation.guard import Verdict, check_samples
from tokendrift.evaluation.measures import Measures, as_sample_set, measure, texts_of, training_ids
from tokendrift.evaluation.samples import SampleInput, id_sequences, spread
from tokendrift.evaluation.two_sample import character_features, kernel_distance
from tokendrift.models.tokenizer import decode, encode
from tokendrift.sampling import SampleSet

WIDTH = 26  # of a column of the printed table
KERNEL_OF = {"energy_distance": "energy", "gradient_moment": "linear"}  # figures between a set and real text


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
        return {row.name: row for row in self.rows}[name]

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
            f"{first.counted_in}; {100 * first.level:g}% intervals by resampling"
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
    gradient_moment: bool = False,
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
        gradient_moment: Include the gradient moment under the judge and its z-score, see
            `tokendrift.evaluation.gradient_moment`. It takes a forward and a backward pass for each sample, of real
            text as well. Default: False.
        progress: As for `GenerativePerplexity.update`.

    Raises:
        TokenDriftError: If there is no set, one cannot be scored, or the judge has no gradient that is asked for.

    >>> import torch
    >>> judge = GenerativePerplexity(lambda ids, mask: torch.zeros(*ids.shape, 10), protocol="all")
    >>> ids = torch.randint(10, (60, 12), generator=torch.Generator().manual_seed(0))
    >>> evaluation = evaluate({"dull": ids[:30].clamp(max=1)}, judge, real=ids[30:])
    >>> "unigram_entropy" in evaluation["dull"].verdict.flags
    True
    """
    if not sets:
        raise fail("evaluate needs at least one set of samples.")
    if gradient_moment:
        differentiable_parameters(judge)
    # 1. All sets and real text in one vocabulary.
    given = {name: as_sample_set(samples) for name, samples in sets.items()}
    real_set, vocabulary = _real_beside(given.values(), real, tokenizer, clean_up_spaces)
    own_tokenizer = tokenizer if vocabulary == "generated" else judge.judge.tokenizer
    if training is not None:  # encoded once for all sets
        training = training_ids(training, own_tokenizer, vocabulary)

    def measured(samples: SampleInput, bound: Interval | None = None) -> Measures:
        return measure(
            samples, judge, tokenizer=tokenizer, clean_up_spaces=clean_up_spaces, vocabulary=vocabulary,
            training=training, nelbo=bound, resamples=resamples, level=level, seed=seed, skip_bad=skip_bad,
            panel=panel, progress=progress,
        )  # fmt: skip

    def features(samples: SampleSet) -> dict[str, Tensor]:
        texts = texts_of(samples, tokenizer, clean_up_spaces)
        found = {} if texts is None else {"energy_distance": character_features(texts)}
        if gradient_moment:
            read = samples if texts is None else texts
            found["gradient_moment"] = gradient_features(read, judge, seed=seed, progress=progress)
        return found

    # 2. Each set, and beside it real text of its lengths; sets of the same lengths share theirs.
    real_measures: dict[tuple[bool, tuple[int, ...]], tuple[Measures, dict[str, Tensor]]] = {}
    rows = []
    for name, samples in given.items():
        measures = measured(samples, (nelbo or {}).get(name))
        key = measures.retokenised, measures.falling_lengths()
        if key not in real_measures:
            cut = cut_to_lengths(real_set, key[1], own_tokenizer, vocabulary, as_text=measures.retokenised)
            expected = measured(cut)
            real_measures[key] = expected, features(cut.only(expected.kept))
        expected, features_of_real = real_measures[key]
        added = _distances(
            features(samples.only(measures.kept)), features_of_real, resamples=resamples, level=level, seed=seed
        )
        measures = replace(measures, figures={**measures.figures, **added})
        # 3. The set against real text: what differs, and what looks bought.
        compared, verdict = compare(measures, expected), check_samples(measures, expected)
        rows.append(EvaluatedSet(name, measures, expected, compared, verdict))
    return Evaluation(tuple(rows))


def _real_beside(
    sets: Iterable[SampleSet], real: SampleInput, tokenizer: Any, clean_up_spaces: bool
) -> tuple[SampleSet, str]:
    """Return real text, ready to be cut, and the vocabulary that it shares with all sets.

    If they do not all have ids, it is text, since ids of the denoiser's tokenizer are none of the judge's. Gaps are
    closed before the text is cut, because closing one may take a token.
    """
    found = as_sample_set(real)
    if found.ids is None and tokenizer is not None:
        found = replace(found, ids=encode(tokenizer, found.texts or []))
    as_generated = all(one.ids is not None for one in (*sets, found))
    texts = texts_of(found, None if as_generated else tokenizer, clean_up_spaces)
    return replace(found, texts=texts), "generated" if as_generated else "judge"


def _distances(own: Mapping[str, Tensor], real: Mapping[str, Tensor], **options: Any) -> dict[str, Interval]:
    """Return the distances between features of the same figure, and their z-scores."""
    added: dict[str, Interval] = {}
    for figure in [name for name in own if name in real]:
        found = kernel_distance(own[figure], real[figure], kernel=KERNEL_OF[figure], **options)
        added |= {figure: found.distance, f"{figure}_z": found.z_score}
    return added


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
