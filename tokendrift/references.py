"""Further reference features: gathered from other ranks, kept in queues, weighted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from tokendrift._checks import check_count, check_positive, check_same_device, check_tensor, fail
from tokendrift._operators import wide_dtype


class Gathered(NamedTuple):
    """Features of all ranks.

    Attributes:
        features: In the order of the ranks, (sum of K over ranks, M), without gradient.
        offset: Row at which those of this rank start: what is added to an index of a reference of its own.
    """

    features: Tensor
    offset: int


def rank_count() -> int:
    """Return the number of ranks in the default process group, 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


@torch.no_grad()
def gather(features: Tensor, *, call: int = 0, error: Exception | None = None) -> Gathered:
    """Collect the features of all ranks of the default process group, the same on every rank.

    Every rank has to call, with as many features as it has: batches are padded to the largest, gathered and cut
    again. Without a process group, or alone in it, the features come back as they are.

    Args:
        features: Shape (K, M); K may differ between ranks and be 0, M may not.
        call: Number of the call, which has to be the same on all ranks: it shows that a rank has left out a batch.
        error: What has prevented this rank from computing its features. It is raised here once the ranks have met,
            and all other ranks raise an error as well, instead of waiting for features that do not come.

    Raises:
        TokenDriftError: On every rank, if widths, dtypes or numbers of calls differ between ranks, or if one has an
            error.

    Source: TokenDrift (arXiv 2605.19470), Algorithm 1: the current features are gathered, without gradient.

    >>> gather(torch.ones(2, 3)).offset
    0
    """
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise fail("features must be a tensor of shape (K, M).", features=features)
    features = features.detach()
    ranks = rank_count()
    if ranks == 1:
        return Gathered(features, 0)
    form = torch.tensor([*features.shape, features.element_size(), call, error is not None], device=features.device)
    forms = [torch.empty_like(form) for _ in range(ranks)]
    distributed.all_gather(forms, form)
    counts, widths, sizes, calls, failed = zip(*(each.tolist() for each in forms), strict=True)
    if error is not None:
        raise error
    if any(failed):
        raise fail(
            f"rank {failed.index(1)} could not compute its features; its own error says why. No queue has changed.",
            "Mend the batch, or leave it out on all ranks.",
        )
    if len(set(calls)) > 1:
        raise fail(
            f"ranks are at different calls of the loss: {list(calls)}. No queue has changed.",
            "Call the loss on every rank equally often. After an error on one rank alone, restart from a checkpoint.",
        )
    if len(set(widths)) > 1 or len(set(sizes)) > 1:
        raise fail(
            f"features differ between ranks: widths M {list(widths)}, bytes per number {list(sizes)}.",
            "Build the same feature map in the same precision on every rank.",
            features=features,
        )
    padded = features.new_zeros(max(counts), features.shape[1])
    padded[: len(features)] = features
    pieces = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(pieces, padded)
    kept = [piece[:count] for piece, count in zip(pieces, counts, strict=True)]
    return Gathered(torch.cat(kept), sum(counts[: distributed.get_rank()]))


@torch.no_grad()
def add_over_ranks(
    count: int, *, ranks: int, device: torch.device, call: int = 0, error: Exception | None = None
) -> int:
    """Return a count added up over all ranks of the default process group; this waits for the device.

    Every rank has to call, also one that has an error.

    Args:
        count: The count of this rank.
        ranks: Number of ranks. With 1, there is no communication.
        device: Device of the process group.
        call: Number that has to be the same on all ranks, as in `gather`.
        error: What has prevented this rank from doing its part. It is raised here once the ranks have met, and all
            other ranks raise an error as well.

    Raises:
        TokenDriftError: On every rank, if a rank has an error, or ``call`` differs between ranks.
    """
    failed, alike = error is not None, True
    if ranks > 1:
        found = torch.tensor([count, failed, call, call**2], device=device)
        distributed.all_reduce(found)
        count, failed, first, second = found.tolist()
        alike = first**2 == ranks * second  # otherwise the mean of the squares is larger than the square of the mean
    if error is not None:
        raise error
    if failed:
        raise fail(
            "another rank could not compute its loss; its own error says why.",
            "Mend the batch, or leave it out on all ranks.",
        )
    if not alike:
        raise fail(
            "ranks are at different calls of the objective, or at different positions of the chains.",
            "Call it on every rank equally often, with generators in the same state. After an error on one rank alone, "
            "restart from a checkpoint.",
        )
    return count


class FeatureQueue(nn.Module):
    """A first-in-first-out queue of detached features; part of ``state_dict``.

    Features are kept in float32 or wider, also when their owner is converted to bfloat16 or float16: distances are
    taken between them and the features of the step.

    Rows with NaN or infinities never enter. On a CPU they are dropped. An accelerator would have to be waited for to
    count the others: until the queue is full, ``len`` then counts the rows that were offered, and `features` repeats
    the oldest rows in place of the dropped ones.

    Args:
        capacity: Most features kept; 0 keeps none.
        width: M, the feature width. Lazy when omitted: set by the first push or by ``load_state_dict``.
    """

    buffer: Tensor
    pushed: Tensor

    def __init__(self, capacity: int, width: int | None = None) -> None:
        super().__init__()
        _keep_eager()
        self.capacity = check_count("capacity", capacity)
        dtype = wide_dtype(torch.get_default_dtype())
        self.register_buffer("buffer", torch.zeros(capacity, width or 0, dtype=dtype))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self._pushed = 0  # `pushed` as the host knows it: equal on a CPU, an upper bound on other devices
        self._held: list[Tensor] | None = None  # what is pushed while the queue is frozen

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    def features(self) -> Tensor:
        """Return the features, oldest first, (len(self), M).

        Raises:
            TokenDriftError: In training mode during a backward pass, see `push`.
        """
        if self.capacity == 0:
            return self.buffer
        if self.training and self._held is None:
            refuse_recomputation("the queues", " Or run both passes inside loss.frozen_queues().")
        filled = self.pushed.clamp(max=self.capacity)
        rows = torch.arange(len(self), device=self.buffer.device) % filled.clamp_min(1)
        rows = (rows + torch.where(self.pushed > self.capacity, self.pushed, 0)) % self.capacity
        return torch.where(filled > 0, self.buffer[rows], torch.nan)

    def check_width(self, features: Tensor) -> None:
        """Require features (K, M) of the width of those that are kept."""
        width = self.buffer.shape[1]
        # Two comparisons: torch.compile evaluates `width not in (0, size)` wrongly where the size is symbolic.
        if width > 0 and width != features.shape[1]:
            raise fail(
                f"features has width M = {features.shape[1]} but the queue holds M = {width}.",
                "One queue belongs to one feature map: build a new loss for a new one.",
                features=features,
            )

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Append detached features (K, M); the oldest make room, and rows that are not finite are left out.

        Raises:
            TokenDriftError: If width or device differ from those of the features already kept, or if this is called
                during a backward pass: gradient checkpointing then computes the forward pass again, with other
                references than the first time. In a frozen queue the second push has no effect instead.
        """
        check_tensor("features", features, ("K", "M"))
        if self._held is not None:
            if not in_backward_pass():
                self._held.append(features.detach().clone())
            return
        if self.capacity == 0:
            return
        refuse_recomputation("the queues", " Or run both passes inside loss.frozen_queues().")
        if self.buffer.shape[1] == 0:
            dtype = wide_dtype(features.dtype)
            with torch.inference_mode(False):  # a tensor born in inference mode could not be written to in training
                self.buffer = features.new_zeros(self.capacity, features.shape[1], dtype=dtype)
                self.pushed = self.pushed.to(features.device)
        self.check_width(features)
        check_same_device("queue", self.buffer, features=features)
        kept = features.detach()[-self.capacity :].to(self.buffer.dtype)
        # Finite rows first, in their order. The slots behind them keep what they hold.
        finite = kept.isfinite().all(dim=1)
        kept, row = kept[finite.logical_not().byte().argsort(stable=True)], torch.arange(len(kept), device=kept.device)
        slots = (self.pushed + row) % self.capacity
        self.buffer.index_copy_(0, slots, torch.where((row < finite.sum())[:, None], kept, self.buffer[slots]))
        self.pushed += finite.sum()
        self._pushed = int(self.pushed) if self.buffer.device.type == "cpu" else self._pushed + len(kept)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Do not change the features inside the block; features that are pushed there enter, in order, when it ends.

        If the block raises, it does not enter at all.
        """
        if self._held is not None:
            raise fail("the queue is already frozen.", "Exit the other frozen block first.")
        held = self._held = []
        try:
            yield
        finally:
            self._held = None
        for features in held:
            self.push(features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureQueue:
        before = self.buffer
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.buffer.dtype.itemsize < torch.float32.itemsize:
            self.buffer = before.to(self.buffer.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "buffer")
        if stored is not None:
            if stored.ndim != 2 or not stored.is_floating_point():
                raise fail("the stored queue must be floating point of shape (capacity, M).", buffer=stored)
            if len(stored) != self.capacity:
                raise fail(
                    f"the stored queue has room for {len(stored)} features but this one for {self.capacity}.",
                    f"Build the loss with queue_size={len(stored)}.",
                )
            _check_stored(stored, state_dict.get(prefix + "pushed"))
            if stored.shape[1] != self.buffer.shape[1]:
                self.buffer = self.buffer.new_zeros(stored.shape, dtype=wide_dtype(stored.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.buffer = self.buffer.to(wide_dtype(self.buffer.dtype))  # with assign=True it has the stored dtype
        self._pushed = int(self.pushed)


def _check_stored(stored: Tensor, pushed: Tensor | None) -> None:
    """Require a counter that fits the stored features, and finite features."""
    if pushed is None or "meta" in (pushed.device.type, stored.device.type):
        return
    if pushed.ndim or pushed.is_floating_point() or pushed < 0 or (pushed > 0 and 0 in stored.shape):
        raise fail("pushed must be the number of features that the stored queue has taken.", pushed=pushed)
    if not stored[: int(pushed)].isfinite().all():
        raise fail(
            "the stored queue holds features that are not finite: every drift would be NaN.",
            "Take an earlier checkpoint, or remove the entries of the queues and load the rest with strict=False.",
            buffer=stored,
        )


def in_backward_pass() -> bool:
    """Return whether this runs inside a backward pass, as the second forward pass of gradient checkpointing does."""
    return torch._C._current_graph_task_id() != -1


def refuse_recomputation(state: str, remedy: str = "") -> None:
    """Require that a call that reads or changes a state is not the second forward pass of gradient checkpointing.

    Raises:
        TokenDriftError: If it is.
    """
    if in_backward_pass():
        raise fail(
            f"the loss is computed again during the backward pass, as gradient checkpointing does, but {state} have "
            "changed since: the gradient would be wrong.",
            "Checkpoint the model alone, and call the loss outside of the checkpointed function." + remedy,
        )


def guidance_weight(guidance: float, *, negatives: int, unconditional: int) -> float:
    r"""Return the weight of unconditional real features among the negatives, for classifier-free guidance.

    .. math:: w = (Q - 1)(\alpha - 1) / U

    The drift of a conditional generator then vanishes where it generates
    :math:`\alpha\, p(\cdot|c) - (\alpha - 1)\, p(\cdot)`.

    Args:
        guidance: alpha, at least 1; 1 is no guidance.
        negatives: Q, the generated negatives, the anchor itself (which it does not see) included.
        unconditional: U, the unconditional real features that are appended to the negatives.

    Raises:
        TokenDriftError: If a number is out of range.

    Source: Generative Modeling via Drifting (arXiv 2602.04770), section 3.5 and appendix A.7.

    >>> weight = guidance_weight(2.0, negatives=4, unconditional=6)
    >>> weight
    0.5
    >>> from tokendrift import DriftField
    >>> generated, real, unconditional = torch.randn(4, 2), torch.randn(8, 2), torch.randn(6, 2)
    >>> drift = DriftField()(
    ...     generated,
    ...     real,
    ...     torch.cat([generated, unconditional]),
    ...     exclude_negative=torch.arange(4),
    ...     negative_weights=torch.tensor([1.0] * 4 + [weight] * 6),
    ... )
    """
    if check_positive("guidance", guidance, symbol="alpha") < 1:
        raise fail("guidance (alpha) must be at least 1.", "1 is no guidance.", guidance=guidance)
    check_count("negatives", negatives, least=2)
    check_count("unconditional", unconditional, least=1)
    return (negatives - 1) * (guidance - 1) / unconditional


@functools.cache
def _keep_eager() -> None:
    """Keep the methods that count on the host out of compiled graphs, which would be rebuilt at every push.

    Done at the first construction: as decorators they would import the compiler with the package.
    """
    for name in ("features", "push"):
        setattr(FeatureQueue, name, torch.compiler.disable(getattr(FeatureQueue, name)))
