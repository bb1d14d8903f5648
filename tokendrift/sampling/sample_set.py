"""A set of samples in memory, and samples of a denoiser at one setting after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from tokendrift._checks import check_count, fail
from tokendrift.diffusion.process import Denoiser, Process
from tokendrift.sampling.chain import Sampler
from tokendrift.sampling.cost import flops_per_evaluation
from tokendrift.sampling.loop import sample

LOGITS_AT_ONCE = 1 << 27  # logits of one batch by default: half a GiB in float32


class BadLine(NamedTuple):
    """A line that holds no sample.

    Attributes:
        number: Its number in the file, from 1.
        reason: What is wrong with it.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class SampleSet:
    """Samples of one model, or real text; ids or texts of each, or both.

    Attributes:
        ids: Ids of each sample as generated, None if they are not known.
        texts: Text of each sample, None if it is not known.
        nfe: Forward calls of the denoiser that a sample cost, None for real text or where it is not known.
        metadata: What the file says about its making.
        bad_lines: Lines left out, by number and reason.
        flops: Mean floating-point operations (FLOPs) of a sample, see `tokendrift.sampling.cost`; None as for nfe.
    """

    ids: list[list[int]] | None = None
    texts: list[str] | None = None
    nfe: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    bad_lines: tuple[BadLine, ...] = ()
    flops: float | None = None

    def __post_init__(self) -> None:
        if self.ids is None and self.texts is None:
            raise fail("a SampleSet needs ids or texts, and has neither.")
        if self.ids is not None and self.texts is not None and len(self.ids) != len(self.texts):
            raise fail(f"a SampleSet has {len(self.ids)} sequences of ids but {len(self.texts)} texts.")

    def __len__(self) -> int:
        return len(self.scored())

    def only(self, chosen: Sequence[int]) -> SampleSet:
        """Return the samples of these indices as a set."""
        ids, texts = self.ids, self.texts
        return replace(
            self,
            ids=ids if ids is None else [ids[i] for i in chosen],
            texts=texts if texts is None else [texts[i] for i in chosen],
        )

    def scored(self) -> list[str] | list[list[int]]:
        """Return what a judge reads: the texts, or the ids where there are none."""
        return self.texts if self.texts is not None else self.ids or []


class SamplingSetting(NamedTuple):
    """How a model is sampled.

    Attributes:
        steps: Reverse steps.
        temperature: Divides the logits. Default: 1, the model's own law.
        top_p: Probability of the nucleus. Default: 1, every token.
    """

    steps: int
    temperature: float = 1.0
    top_p: float = 1.0


def denoiser_samples(
    denoiser: Denoiser,
    process: Process,
    length: int,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    sampler: Sampler | None = None,
    top_k: int | None = None,
    nucleus: str = "keep",
    noise_removal: str = "ancestral",
) -> Callable[[SamplingSetting, int], SampleSet]:
    """Return a function that draws samples from a denoiser: ``draw(setting, count)``.

    Row i has the random numbers of (seed, i) at every setting and for every model, which makes comparisons paired.
    The NFE of a set is the largest number of forward calls that a row took part in, as in a samples file. Its FLOPs are
    known for a module, by one more call with a single sequence, and not for a function.

    Args:
        denoiser: Maps ids (B, L) and sigma (B,) to logits (B, L, V); see `sample`.
        process: `MaskedDiffusion` or `UniformDiffusion`.
        length: L, the number of tokens of a sample.
        batch_size: Sequences in a forward call. Default: 64, or fewer where these have more than 2^27 logits.
        seed: Random seed of the run. Default: 0.
        sampler: See `sample`. Default: `Ancestral`.
        top_k: See `sample`. Default: every token.
        nucleus: See `sample`: ``"keep"`` or ``"drop"``.
        noise_removal: See `sample`: ``"ancestral"``, ``"greedy"`` or ``"none"``.
    """
    rows = max(1, min(64, LOGITS_AT_ONCE // (length * process.vocab_size))) if batch_size is None else batch_size

    @cache
    def per_evaluation() -> int | None:
        return flops_per_evaluation(denoiser, process, length) if isinstance(denoiser, nn.Module) else None

    def draw(setting: SamplingSetting, count: int) -> SampleSet:
        found = sample(
            denoiser,
            process,
            (check_count("count", count, least=1), length),
            steps=setting.steps,
            sampler=sampler,
            temperature=setting.temperature,
            top_k=top_k,
            top_p=setting.top_p,
            nucleus=nucleus,
            noise_removal=noise_removal,
            batch_size=rows,
            seed=seed,
        )
        each, nfe = per_evaluation(), int(found.row_nfe.max())
        flops = None if each is None else each * float(found.row_nfe.double().mean())
        return SampleSet(ids=found.ids.tolist(), nfe=nfe, flops=flops, metadata=setting._asdict())

    return draw
