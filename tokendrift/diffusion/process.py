"""The common interface of masked and uniform-state diffusion, which losses, training and samplers use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Generator, Tensor

from tokendrift._checks import check_count, check_denoiser, check_floating, check_ids, check_tensor, check_times, fail
from tokendrift.diffusion._row_ops import log_prob_at
from tokendrift.diffusion.schedules import LogLinear, Schedule, sample_times

Device: TypeAlias = torch.device | str | None
LEAST_NOISE = 1e-30  # 1 - alpha in objectives: their limit at t = 0, where they would divide by zero


class Denoiser(Protocol):
    """A network that returns raw logits, without SUBS or log-softmax.

    The vocabulary and the mask belong to the process. A network whose output does not depend on sigma can say so by an
    attribute ``time_conditioned`` that is False.
    """

    def __call__(self, x_t: Tensor, sigma: Tensor | None, /) -> Tensor:
        """Map noisy ids (B, L) int64 and sigma (B,) to logits (B, L, V)."""
        ...


class Corruption(NamedTuple):
    """A corrupted batch with everything that a denoiser or a loss needs.

    Attributes:
        x_t: Noisy ids, int64 (B, L).
        predicted: Positions the model has to predict (the paper's M), bool (B, L).
        t: Diffusion times, float (B,), in [0, 1].
        sigma: ``-log alpha_t``, float (B,): what denoisers take as their second argument.
    """

    x_t: Tensor
    predicted: Tensor
    t: Tensor
    sigma: Tensor

    def denoise(self, denoiser: Denoiser, **options: Tensor) -> Tensor:
        """Return the denoiser's logits (B, L, V) for this batch; options are passed to it."""
        check_denoiser(denoiser)
        return denoiser(self.x_t, self.sigma, **options)


class Mixture(NamedTuple):
    """A reverse step as probabilities: whether a position keeps its token, and what its new token is drawn from.

    Attributes:
        stay: Probability that a position keeps its token, float64 (B, L).
        denoise: Probability that its token is drawn from the denoiser's p, float64 (B, L). With the remaining
            probability, the token is drawn uniformly from the vocabulary.
    """

    stay: Tensor
    denoise: Tensor


class Process(ABC):
    """A corruption process with its objective and its exact reverse step.

    Args:
        vocab_size: V, the mask entry included where there is one.
        schedule: Signal level over time; log-linear by default.
    """

    mask_id: int | None = None

    def __init__(self, vocab_size: int, schedule: Schedule | None = None) -> None:
        self.vocab_size = check_count("vocab_size", vocab_size, least=2)
        self.schedule: Schedule = LogLinear() if schedule is None else schedule

    def __repr__(self) -> str:
        mask = "" if self.mask_id is None else f", mask_id={self.mask_id}"
        return f"{type(self).__name__}({self.vocab_size}{mask}, schedule={self.schedule})"

    def sigma(self, t: Tensor) -> Tensor:
        """Return ``-log alpha_t`` for times of any shape."""
        return self.schedule.sigma(t)

    def corrupt(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        *,
        antithetic: bool = True,
        generator: Generator | None = None,
    ) -> Corruption:
        """Draw noisy ids from the forward process.

        Args:
            x0: Clean ids (B, L), an integer dtype, in [0, V).
            t: Times (B,) in [0, 1]; drawn by `sample_times` when omitted.
            antithetic: Stratify the drawn times over the batch.
            generator: Source of randomness for times and tokens, on the device of x0.

        Returns:
            The noisy ids with their predicted positions, times and sigma.

        Raises:
            TokenDriftError: If ids are out of range, or t is not (B,) or not in [0, 1].
        """
        x0 = check_ids("x0", x0, self.vocab_size).long()
        if t is None:
            t = sample_times(len(x0), antithetic=antithetic, generator=generator, device=x0.device)
        return self._corrupted(x0, check_times(t, len(x0)), generator)

    def _corrupted(self, x0: Tensor, t: Tensor, generator: Generator | None) -> Corruption:
        chance = torch.empty(x0.shape, device=x0.device).uniform_(generator=generator)  # see sample_times
        moved = chance < self.schedule.noise(t)[:, None]
        x_t = torch.where(moved, self.prior(x0.shape, generator=generator, device=x0.device), x0)
        return Corruption(x_t, self.predicted(x_t), t, self.sigma(t))

    @abstractmethod
    def prior(self, shape: tuple[int, ...], *, generator: Generator | None = None, device: Device = None) -> Tensor:
        """Draw ids (B, L) at t = 1."""

    @abstractmethod
    def predicted(self, x_t: Tensor) -> Tensor:
        """Return the positions that the model predicts, bool (B, L)."""

    @abstractmethod
    def log_probs(self, logits: Tensor, x_t: Tensor) -> Tensor:
        """Return the model's log p(x0 | x_t) in nats, (B, L, V), in float32 or wider."""

    def completion_logits(self, logits: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return logits (B, L, V) of the law of x0 given all of x_t, from which the step from times (B,) to 0 draws.

        They are those of the denoiser, unless it predicts a position from the others alone.
        """
        return logits

    def nll(self, logits: Tensor, x0: Tensor, x_t: Tensor) -> Tensor:
        """Return -log p(x0 | x_t) in nats, (B, L), at predicted positions and exactly 0 elsewhere.

        Only rows of predicted positions are read, and beside their gradient nothing of the size of the logits is made.
        A clean id that is the mask itself costs 1e6 nats: multiply such positions (padding) by 0.

        Args:
            logits: Raw denoiser output (B, L, V).
            x0: Clean ids (B, L).
            x_t: Noisy ids (B, L).

        Raises:
            TokenDriftError: If the shapes do not belong together or ids are out of range.
        """
        check_objective(self.vocab_size, logits, x0, x_t)
        # This waits for an accelerator, once a call: the rows that are left out are half of the work.
        index = self.predicted(x_t).flatten().nonzero()[:, 0]
        closed = -1 if self.mask_id is None else self.mask_id
        log_p = log_prob_at(logits.flatten(0, 1), x0.long().flatten()[index], index, closed)
        return log_p.new_zeros(x_t.numel()).index_copy(0, index, -log_p).view(x_t.shape)

    @abstractmethod
    def nelbo(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the negative evidence lower bound per token in nats, (B, L), in float32 or wider."""

    @abstractmethod
    def posterior(self, logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return q(x_s | x_t, x0 ~ p) as a dense (B, L, V): for tests and small vocabularies."""

    @abstractmethod
    def mixture(self, log_p: Tensor | None, x_t: Tensor, t: float, s: float) -> Mixture:
        """Return the same law as stay / denoise / uniform chances.

        Args:
            log_p: The denoiser's log p of the present token x_t, (B, L); unused by masked diffusion.
            x_t: Noisy ids (B, L).
            t: Present time.
            s: Next time, below t. ``s = 0`` means alpha_s = 1: the last step.
        """

    def levels(self, t: float, s: float) -> tuple[float, float]:
        """Return (alpha_t, alpha_s) in double precision, with alpha = 1 at time 0."""
        times = torch.tensor([t, s], dtype=torch.float64)
        alpha_t, alpha_s = self.schedule.alpha(times).tolist()
        return alpha_t, 1.0 if s == 0 else alpha_s


def wide(logits: Tensor) -> Tensor:
    """Return logits in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_columns(name: str, value: Tensor, vocab_size: int) -> None:
    """Require a floating-point tensor (B, L, V) with a column for each entry of the vocabulary."""
    check_floating(name, check_tensor(name, value, ("B", "L", "V")))
    if value.shape[-1] != vocab_size:
        raise fail(
            f"{name} must have V = {vocab_size} columns, one for each entry of the vocabulary of the process.",
            **{name: value},
        )


def check_objective(
    vocab_size: int, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor | None = None, *, name: str = "logits"
) -> None:
    """Apply the input rules that the objectives of all processes share."""
    check_columns(name, logits, vocab_size)
    check_ids("x0", x0, vocab_size, like=logits)
    check_ids("x_t", x_t, vocab_size, like=logits)
    if t is not None:
        check_times(t, len(logits))
