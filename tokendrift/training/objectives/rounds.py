"""Distillation in rounds: the teacher is an earlier self of the student, and its step grows with every round."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from tokendrift._checks import check_choice, check_count, check_frozen, check_positive, fail
from tokendrift.diffusion import Corruption, Process, sample_times
from tokendrift.loss import MirrorTeacherLoss, TokenDriftLoss
from tokendrift.references import add_over_ranks
from tokendrift.training.objectives.drift import DriftConfig
from tokendrift.training.objectives.objective import (
    Network,
    ObjectiveSetup,
    StatefulObjective,
    StepLoss,
)
from tokendrift.training.objectives.own_chains import OwnChains

if TYPE_CHECKING:
    from tokendrift.training.optimization import Optimization

Divergence = Literal["kl_student_teacher", "kl_teacher_student", "mse", "l1"]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
ELEMENTS = {"cpu": 2**20, "cuda": 2**25}  # entries of the logits whose divergence is computed at a time


def divergence(log_student: Tensor, log_teacher: Tensor, kind: Divergence = "kl_student_teacher") -> Tensor:
    r"""Return how far the law of the student is from that of the teacher, for every row.

    With the student's law p and the teacher's law q, both over the last dimension:

    * ``"kl_student_teacher"``: :math:`\mathrm{KL}(p\|q) = \sum_v p_v (\log p_v - \log q_v)`. If q changes from call to
      call, as the targets of distillation do, the best p is their normalised geometric mean,
      :math:`p \propto \exp(\mathbb E \log q)`, which is sharper than the targets: it drops what some of them exclude.
    * ``"kl_teacher_student"``: :math:`\mathrm{KL}(q\|p) = \sum_v q_v (\log q_v - \log p_v)`. The best p is the
      arithmetic mean :math:`\mathbb E\, q`, the law of a token that is drawn from the teacher's chain.
    * ``"mse"``: the mean over v of :math:`(\log p_v - \log q_v)^2`.
    * ``"l1"``: :math:`\sum_v |\log p_v - \log q_v|`, which SDTT's code calls the total variation.

    Args:
        log_student: Log-probabilities of p, (..., V).
        log_teacher: Log-probabilities of q, (..., V).
        kind: One of the four.

    Returns:
        Shape (...), in the wider dtype of the two.

    Raises:
        TokenDriftError: If the kind is unknown or the shapes differ.

    >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> divergence(p, q), divergence(p, q, "kl_teacher_student")
    (tensor(0.1438), tensor(0.1308))
    """
    check_choice("kind", kind, DIVERGENCES)
    if log_student.shape != log_teacher.shape:
        raise fail("log_student and log_teacher must have one shape.", log_student=log_student, log_teacher=log_teacher)
    gap = log_student - log_teacher
    if kind == "kl_student_teacher":
        return (log_student.exp() * gap).sum(dim=-1)
    if kind == "kl_teacher_student":
        return -(log_teacher.exp() * gap).sum(dim=-1)
    return gap.square().mean(dim=-1) if kind == "mse" else gap.abs().sum(dim=-1)


@dataclass(frozen=True)
class RoundsConfig(DriftConfig, ABC):
    """Base of the objectives that distil in rounds.

    Attributes:
        divergence: Divergence between the laws of student and teacher: ``"kl_student_teacher"`` (the default of the
            released code of SDTT and DCD, where it is called ``kl-bwd``), ``"kl_teacher_student"`` (``kl-fwd``),
            ``"mse"`` or ``"l1"`` (``tvd``), see `divergence`.
        round_steps: Number of optimiser steps in a round. After each round the teacher takes the weights of the
            student, and its step grows.
        teacher_average: Whether the teacher takes the averaged weights (``ema``) in place of the weights.
        teacher_steps: Number of teacher's steps from noise to text in the first round.
        drift_weight: Weight of the drifting loss of the objective ``drift`` on the same logits, with its settings; 0
            leaves it out.
    """

    divergence: Divergence = "kl_student_teacher"
    round_steps: int = 10_000
    teacher_average: bool = False
    teacher_steps: int = 1024
    drift_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("round_steps", self.round_steps, least=1)
        check_count("teacher_steps", self.teacher_steps, least=1)
        check_positive("drift_weight", self.drift_weight, or_zero=True)

    @property
    @abstractmethod
    def growth(self) -> int:
        """Factor by which the step of the teacher grows with every round."""

    @property
    def least_steps(self) -> int:
        """Number of teacher's steps below which there is no further round."""
        return 1

    def parts(self, setup: ObjectiveSetup) -> tuple[nn.Module, dict[str, Any]]:
        """Return a teacher and the options of the objective that `build` makes."""
        teacher = copy.deepcopy(setup.base).eval().requires_grad_(False)
        drift = self.drifting_loss(setup) if self.drift_weight else None
        options = {"drift": drift, "generator": setup.generator, "share": setup.share, "autocast": setup.autocast}
        return teacher, options


class RoundDistillation(StatefulObjective, ABC):
    """Base of the objectives that distil in rounds; a subclass says what student and teacher read.

    Args:
        process: Corruption and posterior.
        teacher: Frozen denoiser, usually a copy of the checkpoint that the student starts from. `next_round` overwrites
            its weights.
        config: Settings. Default: those of the class, ``settings()``.
        drift: Drifting loss for ``config.drift_weight``.
        generator: Source of times and noise, on the device of the text. Default: PyTorch's global one.
        share: Number of this process, and how many train together. Default: (0, 1).
        autocast: Dtype of the teacher under autocast. Default (None): no autocast.

    Attributes:
        round: Number of finished rounds.

    Raises:
        TokenDriftError: If the teacher is not frozen, or one of drift and ``drift_weight`` is missing.
    """

    settings: ClassVar[type[RoundsConfig]]

    def __init__(
        self,
        process: Process,
        teacher: nn.Module,
        config: RoundsConfig | None = None,
        *,
        drift: TokenDriftLoss | MirrorTeacherLoss | None = None,
        generator: torch.Generator | None = None,
        share: tuple[int, int] = (0, 1),
        autocast: torch.dtype | None = None,
    ) -> None:
        check_frozen("teacher", teacher)
        config = config or self.settings()
        if (drift is None) != (not config.drift_weight):
            raise fail(
                f"drift {'is missing' if drift is None else 'was given'}, but drift_weight is {config.drift_weight:g}.",
                "Pass a TokenDriftLoss as drift and a drift_weight above 0, or neither.",
            )
        self.process, self.teacher, self.config, self.drift = process, teacher, config, drift
        self.generator, self.share, self.autocast = generator, share, autocast
        self.chains = OwnChains(process, generator, share)
        self.round = 0

    # ------------------------------------------------------------------------------------------ rounds

    @property
    def steps(self) -> float:
        """Number of steps that the teacher would take from noise to text in the present round."""
        return self.config.teacher_steps / self.config.growth**self.round

    def next_round(self, parameters: Iterable[Tensor]) -> None:
        """Begin the next round: the teacher takes the weights of the student, and its step grows.

        After the last round, beyond which the teacher would take too few steps, nothing changes.

        Args:
            parameters: All parameters of the student or their averages, as ``model.parameters()`` returns them. Every
                process has to call if they are sharded.
        """
        if round(self.steps / self.config.growth) < self.config.least_steps:
            return
        with torch.no_grad():
            for own, new in zip(self.teacher.parameters(), parameters, strict=True):
                own.copy_(new.full_tensor() if hasattr(new, "full_tensor") else new)
        self.round += 1

    def after_step(self, finished: int, optimization: Optimization | None = None) -> None:
        if self.config.teacher_average and optimization is not None and not optimization.average.values:
            raise fail(
                "teacher_average is True, but this training keeps no average of the weights.",
                "Set ema above 0, or teacher_average to False. The Trainer of transformers keeps no average.",
            )
        if finished % self.config.round_steps == 0:
            if optimization is None:
                raise fail(
                    "a round ends here, and the next teacher needs the student's weights.",
                    "Call next_round(parameters) yourself, or pass the optimization that training uses.",
                )
            with optimization.average.applied() if self.config.teacher_average else nullcontext():
                self.next_round(optimization.bare_network.parameters())  # the frozen ones among them

    # ------------------------------------------------------------------------------------------ loss

    @abstractmethod
    def lesson(self, x0: Tensor) -> tuple[Corruption, Tensor]:
        """Return what the student reads, and the teacher's logits (K, V) at its K predicted positions.

        Args:
            x0: Clean ids (B, L).
        """

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        """Return the loss of clean ids (B, L).

        It is the mean of the divergence over the predicted positions of all processes, plus the weighted drifting loss.
        """
        corrupted, target = self.lesson(x0)
        logits = corrupted.denoise(model, **self.chains.random_input(model, corrupted.x_t))
        positions = max(1, add_over_ranks(len(target), ranks=self.share[1], device=x0.device))
        loss = total_divergence(self.process, logits, target, corrupted, self.config.divergence)
        loss = loss * self.share[1] / positions
        logs = {"distillation": loss.detach()}
        if log:
            logs["teacher_steps"] = loss.new_tensor(self.steps)
        if self.drift is not None:
            drift = self.drift(logits, x0, noisy_ids=corrupted.x_t, predicted=corrupted.predicted)
            logs["drift"] = drift.detach()
            loss = loss + self.config.drift_weight * drift
        return StepLoss(loss, logs)

    def step_context(self) -> AbstractContextManager[None]:
        return self.drift.frozen_queues() if self.drift is not None and self.config.freeze_queues else nullcontext()

    def rows(self, values: Tensor, predicted: Tensor) -> Tensor:
        """Return values (B, L, ...) at the predicted positions, one after the other."""
        return values.flatten(0, 1) if self.process.mask_id is None else values[predicted]

    def times(self, x0: Tensor, smallest: float) -> Tensor:
        """Draw the times of the rows of this process (B,), stratified over the rows of all processes."""
        rank, ranks = self.share
        found = sample_times(ranks * len(x0), smallest=smallest, generator=self.generator, device=x0.device)
        return found[rank * len(x0) : (rank + 1) * len(x0)]

    @torch.no_grad()
    def teach(self, ids: Tensor, sigma: Tensor | None) -> Tensor:
        """Return the teacher's logits (B, L, V)."""
        with torch.autocast(ids.device.type, self.autocast, enabled=self.autocast is not None):
            found: Tensor = self.teacher(ids, sigma, **self.chains.random_input(self.teacher, ids))
        return found

    # ------------------------------------------------------------------------------------------ state

    @property
    def module(self) -> nn.ModuleDict:
        """Teacher and drifting loss, to be moved to a device before the first call."""
        parts = {"teacher": self.teacher, "drift": self.drift}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a run needs to go on to the bit: teacher, round, queues and the state of the generator."""
        found = self.module.state_dict() | {"round": torch.tensor(self.round)}
        if self.generator is not None:
            found["generator"] = self.generator.get_state()
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave."""
        own = dict(state)
        self.round = int(own.pop("round"))
        generator = own.pop("generator", None)
        if self.generator is not None and generator is not None:
            self.generator.set_state(generator.cpu())
        self.module.load_state_dict(own)


def total_divergence(
    process: Process, logits: Tensor, teacher_logits: Tensor, corrupted: Corruption, kind: Divergence
) -> Tensor:
    """Return the sum of a `divergence` over the predicted positions.

    Args:
        process: Process of both networks.
        logits: The student's logits (B, L, V).
        teacher_logits: The teacher's logits (K, V) at the K predicted positions.
        corrupted: What the student read.
        kind: Kind of the divergence.
    """
    index = corrupted.predicted.flatten().nonzero()[:, 0]
    ids = corrupted.x_t.flatten()[index]

    def part(rows: Tensor, span: slice) -> Tensor:
        log_p, log_q = (process.log_probs(each[None], ids[None, span]) for each in (rows, teacher_logits[span]))
        return divergence(log_p, log_q, kind).sum()

    found: Tensor = cast(Any, _SumOverRows.apply)(logits.flatten(0, 1), index, part)  # torch leaves it untyped
    return found


class _SumOverRows(torch.autograd.Function):
    """Sum of a function of rows of logits, some rows at a time. First derivatives only.

    The gradient is computed with the sum, so that no other tensor of the size of the logits is held.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        slope = torch.zeros_like(rows)
        total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        size = max(1, ELEMENTS.get(rows.device.type, ELEMENTS["cpu"]) // rows.shape[1])
        for start in range(0, len(index), size):
            span = slice(start, start + size)
            with torch.enable_grad():
                part = rows[index[span]].requires_grad_()
                value = function(part, span)
                (found,) = torch.autograd.grad(value, part)
            slope.index_copy_(0, index[span], found)
            total += value.detach()
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad.to(slope.dtype) * slope, None, None
