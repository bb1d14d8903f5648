"""Self-distillation through time (SDTT): several small steps of the teacher become one prediction of the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokendrift._checks import check_count
from tokendrift.diffusion import Corruption, Mixture
from tokendrift.sampling import Chain, Shaping
from tokendrift.training.objectives.objective import ObjectiveSetup
from tokendrift.training.objectives.rounds import RoundDistillation, RoundsConfig

SMALLEST = 1e-5  # smallest time, as in the released code


@dataclass(frozen=True)
class SelfDistillationConfig(RoundsConfig):
    """Settings of the objective ``sdtt``: `SelfDistillation`.

    The defaults are those of the released code, except for ``inner_times``.

    Attributes:
        inner_steps: Number of ancestral steps that the teacher takes for a target, and the factor by which its step
            grows with every round.
        fewest_steps: Number of teacher's steps at which the rounds end.
        inner_times: Times of the teacher's steps: ``"even"``, each one step before the other as in the paper, or
            ``"released"``, those of the released code, whose formula puts the first step later and the last one
            earlier.
    """

    description: ClassVar[str] = "self-distillation through time (SDTT, arXiv 2410.21035; `SelfDistillation`)"
    inner_steps: int = 2
    fewest_steps: int = 8
    inner_times: Literal["even", "released"] = "even"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inner_steps", "fewest_steps"):
            check_count(name, getattr(self, name), least=1)

    @property
    def growth(self) -> int:
        return self.inner_steps

    @property
    def least_steps(self) -> int:
        return self.fewest_steps

    def build(self, setup: ObjectiveSetup) -> SelfDistillation:
        teacher, options = self.parts(setup)
        return SelfDistillation(setup.process, teacher, self, **options)


class SelfDistillation(RoundDistillation):
    r"""Self-distillation through time: the student predicts at once what the teacher predicts in several steps.

    Text is corrupted to x_t. The teacher takes k ancestral steps of size dt from there. A position whose token it draws
    in one of them has the teacher's law of that step as its target; all others have the law of the last step. The loss
    is the mean over the predicted positions of x_t of a divergence between the student's law at x_t and the target. A
    call costs k forward passes of the teacher, and one forward and backward pass of the student. After ``round_steps``
    optimiser steps the teacher takes the student's weights, and dt is multiplied by k, until 1/dt would fall below
    ``fewest_steps``.

    **What the student learns.** In masked diffusion every token is drawn once, so that the mean of the target over the
    teacher's chains is the law of the token that the chain writes (for a token that is still masked after k steps, of
    the one that it would write next). ``divergence="kl_teacher_student"`` has this mean as its minimiser. The laws of
    single tokens given x_t are then those of the teacher's chain, and for an exact teacher with small steps they are
    its own laws at x_t, by the tower property: nothing would change. What the default, ``"kl_student_teacher"``, gains
    at few steps comes from its own minimiser, the sharper geometric mean of the targets.

    **Uniform-state models.** The rule for the target needs only that tokens are drawn from a prediction, and holds for
    them too. But here a token may be drawn again, and by the teacher's law of a position is meant its prediction from
    all other positions, without what the token itself shows; student and teacher are compared in this form, in which
    `ConsistencyDistillation` compares them as well. For one step, or for small dt, this is exact as before; in between,
    the mean of the target is no longer the exact law of a step of size k dt. The published method for these models is
    `ConsistencyDistillation`, and SDTT's authors have used theirs for masked models alone.

    Several processes have generators in the same state and each its ``share``; with equal numbers of rows they do what
    one process does with all of them, up to rounding.

    Source: SDTT (arXiv 2410.21035), algorithm 1.
    """

    settings = SelfDistillationConfig
    config: SelfDistillationConfig

    @property
    def step(self) -> float:
        """Size dt of the teacher's step in the present round."""
        return (1 - SMALLEST) / self.steps

    def inner_times(self, t: Tensor) -> Tensor:
        """Return the times (k, B) at which the teacher is called for rows at times t (B,), float64 on the CPU."""
        t, count = t.double().cpu(), self.config.inner_steps
        if self.config.inner_times == "even":
            found = t - self.step * torch.arange(count)[:, None]
        else:
            share = torch.linspace(1, 0, count, dtype=torch.float64)[:, None]
            found = t * share + (1 - t) * (t - count * self.step)
        return found.clamp_min(SMALLEST)

    def lesson(self, x0: Tensor) -> tuple[Corruption, Tensor]:
        corrupted = self.chains.corrupt(x0, self.times(x0, SMALLEST))
        return corrupted, self.target(corrupted)

    @torch.no_grad()
    def target(self, corrupted: Corruption) -> Tensor:
        """Return the teacher's logits (K, V), each row from the step in which the position's token was drawn."""
        held: list[Tensor] = []

        def teacher(ids: Tensor, sigma: Tensor | None) -> Tensor:
            held[:] = [self.teach(ids, sigma)]
            return held[0]

        x_t, predicted = corrupted.x_t, corrupted.predicted
        chain = Chain(teacher, self.process, x_t, predicted, self.chains.noise(x_t), shaping=Shaping(), end=0.0)
        found, drawn = torch.empty(0), torch.zeros_like(x_t, dtype=torch.bool)
        for number, t in enumerate(self.inner_times(corrupted.t), start=1):
            # 1. The teacher's laws; positions that were drawn before keep theirs.
            chain.at_sigma(self.process.sigma(t))
            log_p = chain.log_p  # calls the teacher for the whole batch
            rows = self.rows(held[0], predicted)
            found = rows if number == 1 else torch.where(self.rows(drawn, predicted)[:, None], found, rows)
            # 2. A step of the chain; after the last one nothing is read.
            if number < self.config.inner_steps:
                chain.drawn_log_p.fill_(1.0)  # no logarithm of a probability: drawing overwrites it
                chain.move(self._law(log_p, chain.ids, t))
                drawn |= chain.drawn_log_p < 1
        return found

    def _law(self, log_p: Tensor, ids: Tensor, t: Tensor) -> Mixture:
        """Return the law of a step of size dt, for rows that have times of their own."""
        laws = [
            self.process.mixture(log_p[row : row + 1], ids[row : row + 1], time, max(time - self.step, 0.0))
            for row, time in enumerate(t.tolist())
        ]
        return Mixture(*(torch.cat(parts) for parts in zip(*laws, strict=True)))
