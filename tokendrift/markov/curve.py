"""Few-step generation compared with the language: a table over steps and temperatures, with a row of real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tokendrift._checks import check_count, fail
from tokendrift.diffusion import Denoiser, Process
from tokendrift.markov.language import MarkovLanguage
from tokendrift.markov.law_measures import MarkovMeasures, measure_ids, real_floor
from tokendrift.sampling import Sampler, sample

if TYPE_CHECKING:
    from rich.table import Table


class FewStepRow(NamedTuple):
    """One number of steps and temperature, with the measures of its samples.

    Attributes:
        nfe: Forward calls of the denoiser for a batch.
        temperature: Sampling temperature.
        measures: Measures of the samples.
    """

    nfe: int
    temperature: float
    measures: MarkovMeasures


@dataclass(frozen=True)
class FewStepResult:
    """Measures of one denoiser over steps and temperatures.

    Attributes:
        rows: One for each number of steps and temperature, in the order asked for.
        real: The same measures of as much real text.
        language: The language.
    """

    rows: list[FewStepRow]
    real: MarkovMeasures
    language: MarkovLanguage

    def best(self, nfe: int) -> FewStepRow:
        """Return the row of smallest total variation at a number of forward calls, over all temperatures.

        A refined model is compared with this row, since a lower temperature costs nothing.

        Raises:
            TokenDriftError: If no row has that many.
        """
        rows = [row for row in self.rows if row.nfe == nfe]
        if not rows:
            raise fail(f"no row has nfe {nfe}.", f"There are {sorted({row.nfe for row in self.rows})}.", nfe=nfe)
        return min(rows, key=lambda row: row.measures.total_variation.estimate)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON, the true entropies included."""
        true = {name: getattr(self.language, name) for name in ("unigram_entropy", "conditional_entropy", "entropy")}
        return {
            "rows": [{"nfe": r.nfe, "temperature": r.temperature, **r.measures.to_dict()} for r in self.rows],
            "real": self.real.to_dict(),
            "true": true,
        }

    def table(self, title: str = "Few-step generation against the true law") -> Table:
        """Return a `rich` table (extra ``cli``); the last row is real text."""
        from rich.table import Table

        language = self.language
        table = Table(
            title=title,
            caption=f"{self.real.samples} sequences of {language.length} words; 95% intervals; H in nats, true "
            f"{language.unigram_entropy:.3f} and {language.conditional_entropy:.3f}; noise floor of TV "
            f"{self.real.floor:.3f}",
        )
        for heading in ("NFE", "T", "validity", "TV", "TV among valid", "H word", "H next word"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(str(row.nfe), f"{row.temperature:g}", *_cells(row.measures))
        table.add_section()
        table.add_row("", "real", *_cells(self.real))
        return table


def few_step(
    language: MarkovLanguage,
    denoiser: Denoiser,
    process: Process,
    *,
    steps: Sequence[int | None] = (2, 4, 8),
    temperatures: Sequence[float] = (1.0,),
    samples: int = 4096,
    batch_size: int = 1024,
    seed: int = 0,
    sampler: Sampler | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    nucleus: str = "keep",
    noise_removal: str = "ancestral",
) -> FewStepResult:
    """Sample a denoiser with few steps and measure the samples against the language.

    The same seed gives every row and every denoiser the same random numbers.

    Args:
        language: What the denoiser should have learned.
        denoiser: Maps ids (B, L) and sigma (B,) to raw logits (B, L, V); called in evaluation mode.
        process: Its diffusion process.
        steps: Numbers of reverse steps; None for a sampler that sets its own, such as `FirstHitting`.
            Default: (2, 4, 8).
        temperatures: Sampling temperatures. A comparison of models needs the baseline at several. Default: (1.0,).
        samples: Sequences of each row. Default: 4096.
        batch_size: Sequences in a forward call. Default: 1024.
        seed: Random seed of sampling, bootstrap and real text. Default: 0.
        sampler, top_k, top_p, nucleus, noise_removal: As for `tokendrift.sampling.sample`, with its defaults.

    Raises:
        TokenDriftError: If an option is out of range, or samples contain ids that are no words, such as the mask.

    >>> language = MarkovLanguage.random(words=6, successors=2, length=5)
    >>> from tokendrift.markov import ExactDenoiser
    >>> process = language.process("masked")
    >>> found = few_step(language, ExactDenoiser(language, process), process, steps=(1, 100), samples=64)
    >>> found.rows[0].measures.validity.estimate < found.rows[1].measures.validity.estimate
    True
    """
    check_count("samples", samples, least=2)
    check_count("batch_size", batch_size, least=1)
    for name, values in (("steps", steps), ("temperatures", temperatures)):
        if not isinstance(values, Sequence):
            raise fail(f"{name} must be a list.", f"Pass {name}=({values!r},).", **{name: values})
    if not steps or not temperatures:
        raise fail("steps and temperatures need at least one entry each.", steps=steps, temperatures=temperatures)
    # Sample each number of steps at each temperature, and measure against the language.
    floor = real_floor(language, samples, seed=seed)
    rows = []
    for n_steps in steps:
        for temperature in temperatures:
            drawn = sample(
                denoiser,
                process,
                (samples, language.length),
                steps=n_steps,
                temperature=temperature,
                seed=seed,
                batch_size=batch_size,
                sampler=sampler,
                top_k=top_k,
                top_p=top_p,
                nucleus=nucleus,
                noise_removal=noise_removal,
            )
            measured = measure_ids(language, drawn.ids.cpu(), floor=floor, seed=seed)
            rows.append(FewStepRow(drawn.nfe, float(temperature), measured))
    real = measure_ids(language, language.sample(samples, seed=seed), floor=floor, seed=seed)
    return FewStepResult(rows, real, language)


def _cells(measures: MarkovMeasures) -> list[str]:
    intervals = (measures.validity, measures.total_variation, measures.mode_imbalance)
    return [f"{figure:.3f}" for figure in (*intervals, measures.unigram_entropy, measures.conditional_entropy)]
