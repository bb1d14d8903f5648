"""Drifting on the model's own few-step chains, and the objective ``pairs``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokendrift.diffusion import Process
from tokendrift.loss import TokenDriftLoss
from tokendrift.pairs import PairDriftLoss
from tokendrift.training.objectives.objective import Network, ObjectiveSetup, StatefulObjective, StepLoss
from tokendrift.training.objectives.own_chains import (
    ChainsConfig,
    OwnChains,
    chain_positions,
    check_strata,
    count_pairs,
    pair_logs,
)


@dataclass
class OwnTrajectories(StatefulObjective):
    """A drifting loss on the states of the model's own few-step chains, instead of corrupted real text.

    Each batch belongs to one position of one chain: after k of N ancestral steps from the prior, at time 1 - k/N. The
    model samples up to there without gradient and completes the text in one call, and the loss compares the completions
    with real text. The last position of a chain is the last step of the sampler, whose completions are the samples.

    Masked models leave out k = 0: all inputs are the same there, and consistency could only be gained at the expense of
    diversity.

    Several processes choose the same position if their generators are in the same state. With ``share``, they together
    sample the chains that one process would sample for the whole batch.

    Attributes:
        process: Corruption and posterior.
        drift: The loss. A `PairDriftLoss` has ``strata=len(chain_positions(...))``, a law for each position, or one law
            for all.
        steps: Numbers of steps N of the chains. Positions rather than chains are drawn at random, so longer chains are
            used more often: with chains of 2 and 4 steps, three out of four calls of a masked model use the longer one.
        base_weight: Weight of the NELBO on corrupted real text, which is added to the loss. Masked models need it (0.1
            is enough): their first step is not a position of these chains, and may collapse without it.
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
        self.chains = OwnChains(self.process, self.generator, self.share)
        if isinstance(self.drift, PairDriftLoss):
            check_strata(self.drift, len(self.positions))

    @property
    def module(self) -> nn.Module:
        return self.drift

    def before_training(self, take: Callable[[int], Tensor]) -> None:
        """Count pairs of real text: the first batches alone lack most of the pairs that the text has."""
        if isinstance(self.drift, PairDriftLoss) and self.count_before:
            count_pairs(self.drift, take(self.count_before), self.share)

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        # 1. Draw a position, and the noisy ids that the model has there.
        number = self.chains.random(len(self.positions))
        total, taken = self.positions[number]
        time = 1 - taken / total
        if self.own:
            x_t = self.chains.inputs(model, x0, total, taken)
        else:
            x_t = self.chains.corrupt(x0, torch.full((len(x0),), time, device=x0.device)).x_t
        where: dict[str, Any] = {"noisy_ids": x_t, "predicted": self.process.predicted(x_t)}
        if isinstance(self.drift, PairDriftLoss):
            where["stratum"] = number % len(self.drift.generated)
        # 2. Complete the text with gradient, and compare it with real text. The logits have no name here: it would hold
        # them in memory while the model is called again for the base loss.
        loss = self.drift(self.chains.logits(model, x_t, time), x0, **where)
        logs = {"drift": loss.detach()}
        if log and isinstance(self.drift, PairDriftLoss):
            logs |= pair_logs(self.drift)
        # 3. Add the NELBO on corrupted real text.
        if self.base_weight:
            base = self.chains.nelbo(model, x0)
            logs["nelbo"] = base.detach()
            loss = loss + self.base_weight * base
        return StepLoss(loss, logs)


@dataclass(frozen=True)
class PairsConfig(ChainsConfig):
    """Settings of the objective ``pairs``: `PairDriftLoss` on the model's own few-step chains."""

    description: ClassVar[str] = "a drift of the law of token pairs on its own few-step chains (`PairDriftLoss`)"
    chains: tuple[int, ...] = (2, 4)

    def build(self, setup: ObjectiveSetup) -> OwnTrajectories:
        drift = self.pair_loss(setup.process, len(chain_positions(setup.process, self.chains)))
        options: dict[str, Any] = {"generator": setup.generator, "share": setup.share}
        weight, ahead = self.base_weight, self.pair_sequences
        return OwnTrajectories(setup.process, drift, self.chains, weight, count_before=ahead, **options)
