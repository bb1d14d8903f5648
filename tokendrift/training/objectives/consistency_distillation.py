"""Discrete consistency distillation (DCD) of uniform-state models along paths of one Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokendrift._checks import fail
from tokendrift.diffusion import ArgmaxNoise, Corruption, GaussianDuality, Process
from tokendrift.training.objectives.objective import ObjectiveSetup
from tokendrift.training.objectives.rounds import RoundDistillation, RoundsConfig

SMALLEST = 1e-3  # smallest time, as in the released code
PUBLISHED = GaussianDuality(50_258, -4.0, -1.0)


@dataclass(frozen=True)
class ConsistencyDistillationConfig(RoundsConfig):
    """Settings of the objective ``dcd``: `ConsistencyDistillation`. The defaults are those of the released code.

    Attributes:
        gamma_min: Log noise-to-signal ratio of the Gaussian noise at t = 0. Default: the one with the signal level that
            the published value, -4, has for DUO's vocabulary.
        gamma_max: The same at t = 1; the published value is -1.
    """

    description: ClassVar[str] = "discrete consistency distillation (DCD, arXiv 2506.10892; `ConsistencyDistillation`)"
    teacher_steps: int = 512
    gamma_min: float | None = None
    gamma_max: float | None = None

    @property
    def growth(self) -> int:
        return 2

    def duality(self, vocab_size: int) -> GaussianDuality:
        """Return the schedule of a vocabulary of V tokens."""
        ends = PUBLISHED.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        usual = GaussianDuality.between(vocab_size, *ends)
        first = usual.gamma_min if self.gamma_min is None else self.gamma_min
        return GaussianDuality(vocab_size, first, usual.gamma_max if self.gamma_max is None else self.gamma_max)

    def build(self, setup: ObjectiveSetup) -> ConsistencyDistillation:
        teacher, options = self.parts(setup)
        return ConsistencyDistillation(setup.process, teacher, self, **options)


class ConsistencyDistillation(RoundDistillation):
    r"""Discrete consistency distillation: the student predicts at time t what the teacher predicts a step earlier.

    A uniform-state text is the argmax of clean text plus Gaussian noise, see `GaussianDuality`. One noise gives the
    noisy text x_t that the student reads and the less noisy x_s that the teacher reads, at s = t - delta: two points of
    one path. The loss is the mean over all positions of a divergence between their predictions. A call costs a forward
    pass of the teacher, and a forward and backward pass of the student. delta is 1/512 at first; after ``round_steps``
    optimiser steps the teacher takes the student's weights, and delta doubles, at most to 1.

    The noise over the vocabulary is drawn in the exact law of what the two argmaxes depend on, without a tensor (B, L,
    V). Times and noise levels are those of the Gaussian path; the schedule of the process itself is not used.

    Several processes have generators in the same state and each its ``share``; with equal numbers of rows they do what
    one process does with all of them, up to rounding.

    Raises:
        TokenDriftError: For masked models, which have no such path, and for parts that do not belong together.

    Source: DUO (arXiv 2506.10892), section 5 (algo.py ``Distillation``). There the teacher runs with dropout; here it
    is in evaluation mode.
    """

    settings = ConsistencyDistillationConfig
    config: ConsistencyDistillationConfig

    def __init__(
        self, process: Process, teacher: nn.Module, config: ConsistencyDistillationConfig | None = None, **options: Any
    ) -> None:
        super().__init__(process, teacher, config, **options)
        if process.mask_id is not None:
            raise fail(
                "discrete consistency distillation needs a uniform-state model, but this one is masked.",
                "Use self-distillation through time, the objective sdtt, for masked models.",
                process=process,
            )
        self.duality = self.config.duality(process.vocab_size)

    @property
    def step(self) -> float:
        """Distance delta of the two times in the present round."""
        return 1 / self.steps

    def lesson(self, x0: Tensor) -> tuple[Corruption, Tensor]:
        # 1. Two times, and the noise of the rows of this process within that of the rows of all processes.
        t = (self.times(x0, SMALLEST) + self.step).clamp_max(1)
        rank, ranks = self.share
        whole = ArgmaxNoise.draw(x0.repeat(ranks, 1), self.process.vocab_size, self.generator)
        noise = ArgmaxNoise(*(part[rank * len(x0) : (rank + 1) * len(x0)] for part in whole))
        # 2. One noise at both times: the student reads the later one, the teacher the earlier one.
        late, early = (self._at(x0, noise, times) for times in (t, t - self.step))
        return late, self.teach(early.x_t, early.sigma).flatten(0, 1)

    def _at(self, x0: Tensor, noise: ArgmaxNoise, t: Tensor) -> Corruption:
        x_t = noise.ids(x0, self.duality.gamma(t))
        return Corruption(x_t, self.process.predicted(x_t), t, self.duality.sigma(t))
