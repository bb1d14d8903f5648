"""The model's own few-step chains: their positions, the inputs found there, and the law of the last step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokendrift._checks import check_count, check_fraction, check_positive, fail
from tokendrift.diffusion import Corruption, Mixture, Process
from tokendrift.modes import evaluation_mode
from tokendrift.pairs import PairDriftLoss
from tokendrift.sampling import Chain, sample
from tokendrift.sampling.noise import RowNoise, random_input
from tokendrift.training.objectives.objective import Network, ObjectiveConfig, corrupt_rows

COUNT_BATCH = 64  # sequences whose pairs are counted at a time


@dataclass(frozen=True)
class OwnChains:
    """Draws what a model meets when it samples in few steps.

    Attributes:
        process: Corruption and posterior.
        generator: Source of chains and noise; PyTorch's global generator by default.
        share: Rank of this process and the number of processes; the rows of their chains are numbered consecutively.
    """

    process: Process
    generator: torch.Generator | None = None
    share: tuple[int, int] = (0, 1)

    def inputs(self, model: Network, x0: Tensor, steps: int, taken: int) -> Tensor:
        """Return ids of the shape of x0 after ``taken`` of the ``steps`` of a chain, sampled without gradient."""
        rank, ranks = self.share

        def first_steps(chain: Chain, total: int | None) -> Iterator[Mixture]:
            for t, s in pairwise(chain.times(total)[: taken + 1]):
                law = chain.posterior(t, s)
                if ranks > 1:
                    _ = chain.log_p  # call the network at every step: a wrapped network waits for all processes
                yield law

        seed, first_row = self.random(2**62), rank * len(x0)
        options: dict[str, Any] = {"steps": steps, "sampler": first_steps, "seed": seed, "first_row": first_row}
        with evaluation_mode(model):
            return sample(model, self.process, (len(x0), x0.shape[1]), device=x0.device, **options).ids

    def logits(self, model: Network, x_t: Tensor, time: float | Tensor) -> Tensor:
        """Return logits, with gradient, of the law that the step from a time, or from times (B,), to 0 draws from."""
        times = time if isinstance(time, Tensor) else torch.full((len(x_t),), time, device=x_t.device)
        logits = model(x_t, self.process.sigma(times), **self.random_input(model, x_t))
        return self.process.completion_logits(logits, x_t, times)

    def nelbo(self, model: Network, ids: Tensor) -> Tensor:
        """Return the mean NELBO per token of clean ids (B, L), in nats."""
        corrupted = self.corrupt(ids)
        logits = model(corrupted.x_t, corrupted.sigma, **self.random_input(model, corrupted.x_t))
        return self.process.nelbo(logits, ids, corrupted.x_t, corrupted.t).mean()

    def corrupt(self, ids: Tensor, t: Tensor | None = None) -> Corruption:
        """Corrupt the rows of this process, see `corrupt_rows`."""
        return corrupt_rows(self.process, ids, t, generator=self.generator, share=self.share)

    def noise(self, ids: Tensor) -> RowNoise:
        """Return fresh streams of random numbers, one for each row, numbered consecutively over all processes."""
        return RowNoise(self.random(2**62), self.share[0] * len(ids), len(ids), ids.device)

    def random_input(self, model: Network, ids: Tensor) -> dict[str, Tensor]:
        """Return the keyword arguments that hold fresh numbers for a model with a random input; none for others."""
        return random_input(model, self.noise, ids)

    def random(self, count: int) -> int:
        """Draw a number from 0 to count - 1. This waits for an accelerator: the host decides by it what to call."""
        device = None if self.generator is None else self.generator.device
        return int(torch.randint(count, (), generator=self.generator, device=device))


def chain_positions(
    process: Process, steps: Sequence[int], *, start: bool | None = None
) -> tuple[tuple[int, int], ...]:
    """Return the positions of chains, each as (N, k): after k of N steps.

    Args:
        process: The corruption process.
        steps: Numbers of steps N of the chains.
        start: Whether k = 0, which is the same for all chains, is a position; it then appears once and first. Default:
            for uniform-state models alone, since the start of a masked model is the same input for every text.

    Raises:
        TokenDriftError: If no chain has a position.

    >>> from tokendrift.diffusion import MaskedDiffusion
    >>> chain_positions(MaskedDiffusion(7), (2, 4))
    ((2, 1), (4, 1), (4, 2), (4, 3))
    """
    counts = sorted({check_count("steps", n, least=1) for n in steps})
    start = process.mask_id is None if start is None else start
    if not counts or (not start and max(counts) < 2):
        raise fail(
            "chains: the numbers of steps must name a chain of at least 1 step, of 2 for masked models.", chains=steps
        )
    first = [(counts[-1], 0)] if start else []
    return (*first, *((n, k) for n in counts for k in range(1, n)))


def check_strata(pairs: PairDriftLoss, positions: int) -> None:
    """Require one law of generated pairs for each position of the chains, or one for all."""
    if len(pairs.generated) not in (1, positions):
        raise fail(
            f"the pair loss must have one stratum for each of the {positions} positions of these chains, or one for "
            "all.",
            f"Build it with strata={positions}, or with strata=1.",
            strata=len(pairs.generated),
        )


def count_pairs(pairs: PairDriftLoss, rows: Tensor, share: tuple[int, int]) -> None:
    """Count the pairs of sequences (n, L) before training: the first batches alone lack most of those of the text."""
    device, (rank, ranks) = pairs.real.device, share
    for part in rows.split(COUNT_BATCH):
        mine = (torch.arange(len(part)) % ranks == rank)[:, None].expand_as(part)
        pairs.observe(part.to(device), attention_mask=mine.to(device))


def pair_logs(pairs: PairDriftLoss) -> dict[str, Tensor]:
    """Return how far the laws of generated pairs are from that of real ones, averaged over the laws in use."""
    met = pairs.generated_weight > 0  # a law without any text yet has no distance
    # A mask as an index waits for an accelerator; this runs at steps that are logged alone.
    return {name: getattr(pairs, name)()[met].mean() for name in ("total_variation", "divergence")}


@dataclass(frozen=True)
class ChainsConfig(ObjectiveConfig):
    """Base of the objectives on the model's own few-step chains, with the settings of the pair loss.

    Attributes:
        chains: Numbers of steps of the chains.
        base_weight: Weight of the NELBO beside the loss; 0 leaves it out.
        pair_decay: Share, in [0, 1), that the law of generated pairs keeps at each micro-batch.
        pair_buckets: Number of buckets of the laws of pairs. By default every pair has an entry of its own if there
            are at most 4,096 tokens, and a law has 65,536 buckets if there are more.
        pair_sequences: Number of sequences of the text whose pairs are counted before the first step. Pairs of the
            training batches are counted in any case.
    """

    chains: tuple[int, ...] | None = (2, 4)
    base_weight: float = 0.1
    pair_decay: float = 0.95
    pair_buckets: int | None = None
    pair_sequences: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chains is not None:
            if not self.chains:
                raise fail("chains must name at least one number of steps, such as (2, 4).", chains=self.chains)
            for steps in self.chains:
                check_count("chains", steps, least=1, most=10_000)
        check_positive("base_weight", self.base_weight, or_zero=True)
        check_fraction("pair_decay", self.pair_decay)
        if self.pair_buckets is not None:
            check_count("pair_buckets", self.pair_buckets, least=2, most=2**26)
        check_count("pair_sequences", self.pair_sequences)

    def pair_loss(self, process: Process, strata: int) -> PairDriftLoss:
        """Return the loss of the law of pairs."""
        buckets = "auto" if self.pair_buckets is None else self.pair_buckets
        options: dict[str, Any] = {"decay": self.pair_decay, "buckets": buckets, "mask_id": process.mask_id}
        return PairDriftLoss(process.vocab_size, strata=strata, **options)
