"""Drifting where the sampler goes: inputs from the model's own few-step chains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.diffusion import Mixture, Process
from tokendrift.loss import TokenDriftLoss
from tokendrift.modes import evaluation_mode
from tokendrift.pairs import PairDriftLoss
from tokendrift.sampling import Chain, sample
from tokendrift.training.objectives import Continuation, Network, StepLoss


@dataclass
class OwnTrajectories:
    """A drifting loss on what the model meets when it samples in few steps, rather than on corrupted real text.

    Each batch belongs to one place of one chain: after k of N ancestral steps from the prior, at time 1 - k/N. The
    model draws its own way there without gradient, completes the text in one shot, and the loss compares the
    completions with real text. Its last place is the last step of the sampler, whose completions are the samples.

    Masked models leave out k = 0: there all inputs are one, and what is gained in consistency is lost in diversity.

    Several processes meet at the same place if their generators are in the same state; with `share`, and a process that
    corrupts each one's rows of the whole batch, they do what one process does with all of it.

    Attributes:
        process: Corruption and posterior.
        drift: The loss. A `PairDriftLoss` has ``strata=len(places(...))``, a law for each place, or one law for all.
        steps: N of the chains. Their places take turns at random, not the chains: of chains of 2 and 4 steps a masked
            model is at the longer in three calls of four.
        base_weight: Weight of the NELBO on corrupted real text beside it: what keeps the rest of the model in place.
            Masked models need it (0.1 will do): their first step is no place of these chains, and without it may
            collapse.
        own: If False, corrupted real text at the same times stands in for the chains: cheaper, and for comparison.
        generator: Source of places, chains and noise.
        share: Number of this process, and how many train together: the rows of their chains are numbered through.

    Raises:
        TokenDriftError: If there is no place, or the loss has another number of strata.
    """

    process: Process
    drift: PairDriftLoss | TokenDriftLoss
    steps: Sequence[int] = (2, 4)
    base_weight: float = 0.0
    own: bool = True
    generator: torch.Generator | None = field(default=None)
    share: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        self.places = places(self.process, self.steps)
        if isinstance(self.drift, PairDriftLoss) and len(self.drift.generated) not in (1, len(self.places)):
            raise fail(
                f"drift must have a stratum for each of the {len(self.places)} places of these chains, or one for all.",
                "Build it with strata=len(places(process, steps)).",
                strata=len(self.drift.generated),
            )

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        number = self._random(len(self.places))
        total, taken = self.places[number]
        times = torch.full((len(x0),), 1 - taken / total, device=x0.device)
        if self.own:
            x_t = self.inputs(model, x0, total, taken)
        else:
            x_t = self.process.corrupt(x0, times, generator=self.generator).x_t
        where: dict[str, Any] = {"noisy_ids": x_t, "predicted": self.process.predicted(x_t)}
        if isinstance(self.drift, PairDriftLoss):
            where["stratum"] = number % len(self.drift.generated)
        # No name for the logits: they would be held while the model is called again for the base loss.
        loss = self.drift(self._completion(model(x_t, self.process.sigma(times)), x_t, times), x0, **where)
        logs = {"drift": loss.detach()}
        if log and isinstance(self.drift, PairDriftLoss):
            met = self.drift.generated_weight > 0  # a law without any text yet says nothing
            logs["total_variation"] = self.drift.total_variation()[met].mean()
            logs["divergence"] = self.drift.divergence()[met].mean()
        if self.base_weight:
            base = Continuation(self.process, self.generator)(model, x0)
            logs |= base.logs
            loss = loss + self.base_weight * base.loss
        return StepLoss(loss, logs)

    def _completion(self, logits: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
        """Return logits of the law that the step to time 0 draws from.

        A uniform-state model predicts a position from all others; its sampler adds what the position itself shows,
        q(x0 = j | x_t) ~ p_j (alpha [j = x_t] + (1 - alpha) / V).
        """
        if self.process.mask_id is not None:
            return logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        alpha = self.process.schedule.alpha(times)
        shown = torch.log1p(self.process.vocab_size * alpha / (1 - alpha)).to(wide)
        return wide.scatter_add(2, x_t[..., None], shown[:, None, None].expand(-1, x_t.shape[1], 1))

    def inputs(self, model: Network, x0: Tensor, steps: int, taken: int) -> Tensor:
        """Return ids (B, L) after some of the steps of a chain, drawn by the model itself."""
        rank, ranks = self.share

        def first(chain: Chain, total: int | None) -> Iterator[Mixture]:
            for t, s in pairwise(chain.times(total)[: taken + 1]):
                law = chain.posterior(t, s)
                if ranks > 1:
                    _ = chain.log_p  # one call a step on every process: a wrapped network waits for all of them
                yield law

        seed, first_row = self._random(2**62), rank * len(x0)
        options: dict[str, Any] = {"steps": steps, "sampler": first, "seed": seed, "first_row": first_row}
        with evaluation_mode(model):
            return sample(model, self.process, (len(x0), x0.shape[1]), device=x0.device, **options).ids

    def _random(self, count: int) -> int:
        """Draw a number from 0 to count - 1."""
        place = None if self.generator is None else self.generator.device
        return int(torch.randint(count, (), generator=self.generator, device=place))


def places(process: Process, steps: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the places (N, k) of chains of N steps, their common start (N, 0) once and for masked models never."""
    counts = sorted({check_count("steps", n, least=1) for n in steps})
    if not counts or (process.mask_id is not None and max(counts) < 2):
        raise fail("steps must name a chain of at least 1 step, of 2 for masked models.", steps=steps)
    start = [(counts[-1], 0)] if process.mask_id is None else []
    return (*start, *((n, k) for n in counts for k in range(1, n)))
