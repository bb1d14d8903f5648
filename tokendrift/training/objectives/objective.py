"""Objectives of training: the loss of a batch, and for `refine` the settings, state and hooks of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tokendrift.diffusion import Corruption, Process
from tokendrift.models import LoadedDenoiser
from tokendrift.training.settings import Settings

if TYPE_CHECKING:
    from tokendrift.training.optimization import Optimization

Network = Callable[..., Any]  # a denoiser; for other objectives whatever they can call


class StepLoss(NamedTuple):
    """The loss of one batch.

    Attributes:
        loss: Scalar, differentiable to the parameters of the network.
        logs: Detached scalars to log, by name.
    """

    loss: Tensor
    logs: dict[str, Tensor]


class Objective(Protocol):
    """Maps a network and clean ids (B, L) to a loss. Any function of this form can be passed to `train`."""

    def __call__(self, model: Network, x0: Tensor, /, *, log: bool = False) -> StepLoss:
        """Return the loss of one batch; with ``log``, compute diagnostics too."""
        ...


class StatefulObjective:
    """An objective with state and hooks, as `refine` trains it. By default the hooks do nothing.

    An objective with networks of its own, such as a frozen teacher or an auxiliary network, returns them as `module`,
    so that they move to the device. An auxiliary network is trained by an optimiser of the objective: in the call, or
    in `after_step`. What a resumed run needs of them goes into `state_dict`.
    """

    def __call__(self, model: Network, x0: Tensor, /, *, log: bool = False) -> StepLoss:
        """Return the loss of clean ids (B, L); with ``log``, compute diagnostics too."""
        raise NotImplementedError

    @property
    def module(self) -> nn.Module | None:
        """Module that holds the tensors of the objective, or None. By default its ``state_dict`` is the state."""
        return None

    def before_training(self, take: Callable[[int], Tensor]) -> None:
        """Prepare a run that starts from step 0; a resumed run does not call this.

        Args:
            take: Returns the first sequences of the training text, int64 (count, L), for a count.
        """

    def step_context(self) -> AbstractContextManager[None]:
        """Return a context for one optimiser step with all its micro-batches."""
        return nullcontext()

    def after_step(self, finished: int, optimization: Optimization | None = None) -> None:
        """Act after an optimiser step, for instance to copy the network into a teacher.

        Args:
            finished: Number of finished optimiser steps.
            optimization: The network with its optimiser and average. ``optimization.average.applied()`` is a context
                in which the network has its averaged weights. `refine`, `train` and `ObjectiveTrainer` always pass it;
                a loop of your own need not, unless the objective reads it.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint must hold, optimiser states included; every process calls this."""
        return {} if self.module is None else self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        if self.module is not None:
            self.module.load_state_dict(dict(state))


class ObjectiveSetup(NamedTuple):
    """Everything that an objective is built from.

    Attributes:
        base: The network before training, on the CPU. It is not trained: an objective may keep or copy it.
        process: The corruption process of the network.
        length: Tokens of a sequence, L.
        generator: Source of times and noise on the device of training. It is in the same state on all processes, and
            seeded anew before every micro-batch.
        share: Rank of this process and the number of processes.
        seed: Seed of the run, for random numbers of the objective's own.
        steps: Number of optimiser steps of the run.
        autocast: Dtype in which networks run under autocast, or None.
        accelerator: The ``accelerate.Accelerator`` of the run, to reduce over processes or to wrap networks.
    """

    base: LoadedDenoiser
    process: Process
    length: int
    generator: torch.Generator
    share: tuple[int, int] = (0, 1)
    seed: int = 0
    steps: int = 0
    autocast: torch.dtype | None = None
    accelerator: Any = None


@dataclass(frozen=True)
class ObjectiveConfig(Settings, ABC):
    """Base of the settings of an objective: a frozen dataclass whose fields all have defaults.

    Registered as ``OBJECTIVES["name"] = MyConfig``, it is a choice of ``objective`` in `RefineConfig`, in TOML files
    and on the command line, and its fields are settings there under their own names.
    """

    description: ClassVar[str] = "an objective of the user"  # for the model card: "trained with ..."

    def for_process(self, process: Process, numbers: int | None = 0) -> ObjectiveConfig:
        """Return the settings with defaults that depend on the process, or on the network, filled in.

        Args:
            process: Process of the network.
            numbers: Random numbers that the network takes at each masked position; None if it has no random input and
                cannot be given one. Default: 0.
        """
        return self

    def prepare(self, model: LoadedDenoiser) -> None:
        """Change the network that is going to be trained, in place, for instance to give it a random input."""

    @abstractmethod
    def build(self, setup: ObjectiveSetup) -> StatefulObjective:
        """Return the objective.

        Raises:
            TokenDriftError: If the settings do not fit the network, the process or the length.
        """


def grouped(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return tensors named ``group/name`` by group and name; a name without a slash is a group with one empty name."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups


def corrupt_rows(
    process: Process,
    x0: Tensor,
    t: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    share: tuple[int, int] = (0, 1),
) -> Corruption:
    """Corrupt the rows of this process as one process would corrupt them within the batch of all processes.

    Times and noise are drawn for all rows from a generator that is in the same state on every process, and the rows of
    this process are kept. Drawing numbers costs little beside a call of the network.

    Args:
        process: The corruption process.
        x0: Clean ids (B, L) of this process; every process has as many.
        t: Times (B,); drawn by the process if omitted.
        generator: Source of times and noise.
        share: Rank of this process and the number of processes.
    """
    rank, ranks = share
    if ranks == 1:
        return process.corrupt(x0, t, generator=generator)
    own = slice(rank * len(x0), (rank + 1) * len(x0))
    # The rows of the others do not influence this process's rows, so copies of its own can stand in for them.
    times = None if t is None else t.repeat(ranks)
    return Corruption(*(value[own] for value in process.corrupt(x0.repeat(ranks, 1), times, generator=generator)))
