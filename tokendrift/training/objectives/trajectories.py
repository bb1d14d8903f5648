"""Drifting on the model's own few-step chains, and the objective ``pairs``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokendrift._checks import check_count, check_positive, fail
from tokendrift.diffusion import Mixture, Process
from tokendrift.loss import TokenDriftLoss
from tokendrift.modes import evaluation_mode
from tokendrift.pairs import PairDriftLoss
from tokendrift.sampling import Chain, sample
from tokendrift.training.objectives.continuation import Continuation
from tokendrift.training.objectives.objective import (
    Network,
    ObjectiveConfig,
    ObjectiveSetup,
    StatefulObjective,
    StepLoss,
    corrupt_rows,
)
from tokendrift.training.settings import check_fraction

COUNT_BATCH = 64  # sequences whose pairs are counted at a time


@dataclass
class OwnTrajectories(StatefulObjective):
    """A drifting loss on what the model meets when it samples in few steps, rather than on corrupted real text.

    Each batch belongs to one position of one chain: after k of N ancestral steps from the prior, at time 1 - k/N. The
    model samples up to there without gradient and completes the text in one call, and the loss compares the completions
    with real text. The last position of a chain is the last step of the sampler, whose completions are the samples.

    Masked models leave out k = 0: all inputs are the same there, and what consistency gains, diversity loses.

    Several processes choose the same position if their generators are in the same state. With ``share`` they do
    together what one process does with the whole batch.

    Attributes:
        process: Corruption and posterior.
        drift: The loss. A `PairDriftLoss` has ``strata=len(chain_positions(...))``, a law for each position, or one law
            for all.
        steps: Numbers of steps N of the chains. Positions are drawn at random, not chains: with chains of 2 and 4
            steps, three calls in four of a masked model belong to the longer one.
        base_weight: Weight of the NELBO on corrupted real text beside the loss, which holds the rest of the model in
            place. Masked models need it (0.1 is enough): their first step is no position of these chains, and may
            collapse without it.
        own: If False, real text corrupted at the same times replaces the chains: cheaper, and a comparison.
        generator: Source of positions, chains and noise; PyTorch's global generator by default.
        share: Rank of this process and the number of processes; the rows of their chains are numbered consecutively.
        count_before: Number of sequences of real text whose pairs a `PairDriftLoss` counts before the first step.

    Raises:
        TokenDriftError: If there is no position, or the loss has another number of strata.
    """

    process: Process
    drift: PairDriftLoss | TokenDriftLoss
    steps: Sequence[int] = (2, 4)
    base_weight: float = 0.0
    own: bool = True
    generator: torch.Generator | None = None
    share: tuple[int, int] = (0, 1)
    count_before: int = 0

    def __post_init__(self) -> None:
        self.positions = chain_positions(self.process, self.steps)
        if isinstance(self.drift, PairDriftLoss) and len(self.drift.generated) not in (1, len(self.positions)):
            raise fail(
                f"drift must have one stratum for each of the {len(self.positions)} positions of these chains, or one "
                "for all.",
                "Build it with strata=len(chain_positions(process, steps)).",
                strata=len(self.drift.generated),
            )

    @property
    def module(self) -> nn.Module:
        return self.drift

    def before_training(self, take: Callable[[int], Tensor]) -> None:
        """Count pairs of real text: the first batches alone lack most of the pairs that the text has."""
        if not isinstance(self.drift, PairDriftLoss) or not self.count_before:
            return
        device, (rank, ranks) = self.drift.real.device, self.share
        for rows in take(self.count_before).split(COUNT_BATCH):
            mine = (torch.arange(len(rows)) % ranks == rank)[:, None].expand_as(rows)
            self.drift.observe(rows.to(device), attention_mask=mine.to(device))

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        # 1. Draw a position, and the noisy ids that the model has there.
        number = self._random(len(self.positions))
        total, taken = self.positions[number]
        times = torch.full((len(x0),), 1 - taken / total, device=x0.device)
        if self.own:
            x_t = self.inputs(model, x0, total, taken)
        else:
            x_t = corrupt_rows(self.process, x0, times, generator=self.generator, share=self.share).x_t
        where: dict[str, Any] = {"noisy_ids": x_t, "predicted": self.process.predicted(x_t)}
        if isinstance(self.drift, PairDriftLoss):
            where["stratum"] = number % len(self.drift.generated)
        # 2. Complete the text with gradient, and compare it with real text. The logits have no name here: it would hold
        # them in memory while the model is called again for the base loss.
        loss = self.drift(self._completion(model(x_t, self.process.sigma(times)), x_t, times), x0, **where)
        logs = {"drift": loss.detach()}
        if log and isinstance(self.drift, PairDriftLoss):
            met = self.drift.generated_weight > 0  # a law without any text yet has no distance
            logs["total_variation"] = self.drift.total_variation()[met].mean()
            logs["divergence"] = self.drift.divergence()[met].mean()
        # 3. Add the NELBO on corrupted real text.
        if self.base_weight:
            base = Continuation(self.process, self.generator, self.share)(model, x0)
            logs |= base.logs
            loss = loss + self.base_weight * base.loss
        return StepLoss(loss, logs)

    def _completion(self, logits: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
        """Return logits of the law that the step to time 0 draws from.

        A uniform-state model predicts a position from all others; its sampler adds what the token at the position
        itself tells, q(x0 = j | x_t) ~ p_j (alpha [j = x_t] + (1 - alpha) / V).
        """
        if self.process.mask_id is not None:
            return logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        alpha = self.process.schedule.alpha(times)
        shown = torch.log1p(self.process.vocab_size * alpha / (1 - alpha)).to(wide)
        return wide.scatter_add(2, x_t[..., None], shown[:, None, None].expand(-1, x_t.shape[1], 1))

    def inputs(self, model: Network, x0: Tensor, steps: int, taken: int) -> Tensor:
        """Return ids (B, L) after ``taken`` of the ``steps`` of a chain that the model samples, without gradient."""
        rank, ranks = self.share

        def first_steps(chain: Chain, total: int | None) -> Iterator[Mixture]:
            for t, s in pairwise(chain.times(total)[: taken + 1]):
                law = chain.posterior(t, s)
                if ranks > 1:
                    _ = chain.log_p  # call the network at every step: a wrapped network waits for all processes
                yield law

        seed, first_row = self._random(2**62), rank * len(x0)
        options: dict[str, Any] = {"steps": steps, "sampler": first_steps, "seed": seed, "first_row": first_row}
        with evaluation_mode(model):
            return sample(model, self.process, (len(x0), x0.shape[1]), device=x0.device, **options).ids

    def _random(self, count: int) -> int:
        """Draw a number from 0 to count - 1."""
        device = None if self.generator is None else self.generator.device
        return int(torch.randint(count, (), generator=self.generator, device=device))


def chain_positions(process: Process, steps: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the positions of chains, each as (N, k): after k of N steps.

    The start, k = 0, is the same for all chains; it appears once for uniform-state models, never for masked ones.

    Args:
        process: The corruption process.
        steps: Numbers of steps N of the chains.

    Raises:
        TokenDriftError: If no chain has a position.

    >>> from tokendrift.diffusion import MaskedDiffusion
    >>> chain_positions(MaskedDiffusion(7), (2, 4))
    ((2, 1), (4, 1), (4, 2), (4, 3))
    """
    counts = sorted({check_count("steps", n, least=1) for n in steps})
    if not counts or (process.mask_id is not None and max(counts) < 2):
        raise fail("steps must name a chain of at least 1 step, of 2 for masked models.", steps=steps)
    start = [(counts[-1], 0)] if process.mask_id is None else []
    return (*start, *((n, k) for n in counts for k in range(1, n)))


@dataclass(frozen=True)
class PairsConfig(ObjectiveConfig):
    """Settings of the objective ``pairs``: `PairDriftLoss` on the model's own few-step chains.

    Attributes:
        chains: Numbers of steps of the chains.
        base_weight: Weight of the NELBO beside the loss; 0 leaves it out.
        pair_decay: Share, in [0, 1), that the law of generated pairs keeps at each micro-batch.
        pair_buckets: Number of buckets of the laws of pairs. By default every pair has an entry of its own if there
            are at most 4,096 tokens, and a law has 65,536 buckets if there are more.
        pair_sequences: Number of sequences of the text whose pairs are counted before the first step. Pairs of the
            training batches are counted in any case.
    """

    description: ClassVar[str] = "a drift of the law of token pairs on its own few-step chains (`PairDriftLoss`)"
    chains: tuple[int, ...] = (2, 4)
    base_weight: float = 0.1
    pair_decay: float = 0.95
    pair_buckets: int | None = None
    pair_sequences: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.chains:
            raise fail("chains must name at least one number of steps, such as (2, 4).", chains=self.chains)
        for steps in self.chains:
            check_count("chains", steps, least=1)
        if self.base_weight:
            check_positive("base_weight", self.base_weight)
        check_fraction("pair_decay", self.pair_decay)
        if self.pair_buckets is not None:
            check_count("pair_buckets", self.pair_buckets, least=2)
        check_count("pair_sequences", self.pair_sequences)

    def build(self, setup: ObjectiveSetup) -> OwnTrajectories:
        drift = PairDriftLoss(
            setup.process.vocab_size,
            strata=len(chain_positions(setup.process, self.chains)),
            decay=self.pair_decay,
            buckets="auto" if self.pair_buckets is None else self.pair_buckets,
            mask_id=setup.process.mask_id,
        )
        options: dict[str, Any] = {"generator": setup.generator, "share": setup.share}
        weight, ahead = self.base_weight, self.pair_sequences
        return OwnTrajectories(setup.process, drift, self.chains, weight, count_before=ahead, **options)
