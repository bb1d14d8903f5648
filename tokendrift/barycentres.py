"""Weighted means of references for every anchor, streamed: memory does not grow with the number of references."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokendrift.kernels import Kernel, squared_distances


class Side(NamedTuple):
    """The references of one side.

    Attributes:
        points: Shape (P, M).
        excluded: Int64 (N,): the reference that each anchor must not see, -1 for none; or None.
        weights: Non-negative weights, (P,), or None for all ones. A weight of two is equivalent to two copies.
        pairs: Int64 (N,): the reference that belongs to each anchor, for diagnostics; or None.
    """

    points: Tensor
    excluded: Tensor | None = None
    weights: Tensor | None = None
    pairs: Tensor | None = None


class ReferenceBlock(NamedTuple):
    """A block of references with their distances to the anchors.

    Attributes:
        points: Centred, (b, M).
        squared: Squared distances to the anchors, (N, b).
        logits: Log-kernel, -inf where excluded, (T, N, b).
        hidden: References that an anchor must not see, bool (N, b), or None.
        log_weights: Log of the references' own weights, (b,), or None.
        start: Index of the first.
    """

    points: Tensor
    squared: Tensor
    logits: Tensor
    hidden: Tensor | None
    log_weights: Tensor | None
    start: int

    def weighted(self) -> Tensor:
        """Return the logits with the references' own weights."""
        return self.logits if self.log_weights is None else self.logits + self.log_weights

    def column_potential(self, row_potential: Tensor | None = None) -> Tensor:
        """Return minus the log of the sum of each column over the anchors, (T, 1, b).

        The references' own weights stay out: two copies of a point have the same column each. A row potential (T, N)
        is added to the logits first.
        """
        logits = self.logits if row_potential is None else self.logits + row_potential[..., None]
        columns = torch.logsumexp(logits, dim=1, keepdim=True)
        return torch.where(columns.isinf(), 0.0, -columns)  # no anchor sees it: its logits are -inf already


@dataclass(frozen=True)
class View:
    """Centred anchors (N, M) with the kernel, temperatures (T) and block size by which references are weighted."""

    anchors: Tensor
    centre: Tensor
    kernel: Kernel
    temperatures: tuple[float, ...]
    block_size: int
    refine: bool

    further_powers: ClassVar[tuple[int, ...]] = ()
    """The power of the weights in each of the further sums."""

    def blocks(self, side: Side) -> Iterator[ReferenceBlock]:
        """Walk over the references of a side."""
        for start in range(0, len(side.points), self.block_size):
            yield self.block(side, start, start + self.block_size)

    def block(self, side: Side, start: int, stop: int) -> ReferenceBlock:
        """Return the references from ``start`` to ``stop``."""
        points = side.points[start:stop].to(self.centre.dtype) - self.centre
        squared = squared_distances(self.anchors, points, refine=self.refine)
        scaled, hidden = self.in_unit(squared), None
        logits = torch.stack([self.kernel(scaled, tau) for tau in self.temperatures])
        if side.excluded is not None:
            hidden = torch.arange(start, start + len(points), device=points.device) == side.excluded[:, None]
            logits = logits.masked_fill(hidden, -torch.inf)
        log_weights = None if side.weights is None else side.weights[start:stop].to(squared.dtype).log()
        return ReferenceBlock(points, squared, logits, hidden, log_weights, start)

    def in_unit(self, squared: Tensor) -> Tensor:
        """Return squared distances in the unit that the kernel receives."""
        return squared

    def further_sums(self, block: ReferenceBlock, weights: Tensor) -> tuple[Tensor, ...]:
        """Return sums over a block beside those of `Sums`, (T, N) or (T, N, M), one for each of ``further_powers``.

        For fields that need more than the weighted mean. ``weights`` has shape (T, N, b).
        """
        return ()


class Sums(NamedTuple):
    """Running sums over the references of one side; the weights w are relative to exp(peak).

    Attributes:
        peak: Largest log-weight, (T, N).
        row: Log-sum-exp of the kernel without column factors, (T, N); kept where column factors are in use.
        own: Log-weight of each anchor's own pair, (T, N).
        mass: Sum of w, (T, N).
        moment: Sum of w y, (T, N, M).
        square: Sum of w^2, (T, N).
        further: Those of `View.further_sums`.
        powers: Those of `View.further_powers`.
    """

    peak: Tensor
    row: Tensor
    own: Tensor
    mass: Tensor
    moment: Tensor
    square: Tensor
    further: tuple[Tensor, ...] = ()
    powers: tuple[int, ...] = ()

    def rescaled(self, peak: Tensor) -> Sums:
        """Return the same sums relative to another peak."""
        factor = (self.peak - torch.where(peak.isinf(), 0.0, peak)).exp()  # -inf minus -inf would be NaN
        further = []
        for part, power in zip(self.further, self.powers, strict=True):
            scale = factor.square() if power == 2 else factor
            further.append(part * (scale if part.ndim == scale.ndim else scale[..., None]))
        return self._replace(
            peak=peak,
            mass=self.mass * factor,
            moment=self.moment * factor[..., None],
            square=self.square * factor.square(),
            further=tuple(further),
        )

    def mean(self) -> Tensor:
        """Return the weighted mean of the references for every anchor, (T, N, M)."""
        return self.moment / self.mass[..., None]


def sum_references(
    view: View,
    side: Side,
    *,
    column_share: float = 0.0,
    row_potential: Tensor | None = None,
) -> Sums:
    """Sum the weighted references of one side for every anchor, rescaling to a new peak block by block.

    Args:
        view: How anchors look at references.
        side: The references.
        column_share: Power of the column factor: 0 for none, 1/2 for the two-sided form, 1 for a transport plan.
        row_potential: For `ReferenceBlock.column_potential`.
    """
    # Sums over no references at all.
    low = view.anchors.new_full((len(view.temperatures), len(view.anchors)), -torch.inf)
    none, nowhere = torch.zeros_like(low), view.anchors.new_zeros(*low.shape, view.anchors.shape[1])
    further: tuple[Tensor, ...] = ()
    if view.further_powers:
        empty = view.block(side, 0, 0)
        further = view.further_sums(empty, empty.logits.exp())
    sums = Sums(low, low, low, none, nowhere, none, further, view.further_powers)
    for block in view.blocks(side):
        sums = _with_block(sums, view, block, column_share, row_potential, side.pairs)
    return sums


def _with_block(
    sums: Sums,
    view: View,
    block: ReferenceBlock,
    column_share: float,
    row_potential: Tensor | None,
    pairs: Tensor | None,
) -> Sums:
    """Return the running sums with one more block of references."""
    logits, row, own = block.weighted(), sums.row, sums.own
    # 1. Column factors, from sums over the anchors.
    if column_share:
        row = torch.logaddexp(row, torch.logsumexp(logits, dim=-1))
        logits = logits + column_share * block.column_potential(row_potential)
    # 2. The log-weight of each anchor's own pair, where it stands in this block.
    if pairs is not None:
        index = pairs - block.start
        here = (index >= 0) & (index < len(block.points))
        column = torch.where(here, index, 0).expand(len(logits), -1)[..., None]
        own = torch.where(here, logits.gather(-1, column)[..., 0], own)
    # 3. Weights relative to the largest seen so far, so that none overflows, and their sums.
    sums = sums.rescaled(torch.maximum(sums.peak, logits.amax(dim=-1)))
    weights = (logits - torch.where(sums.peak.isinf(), 0.0, sums.peak)[..., None]).exp_()
    further = view.further_sums(block, weights)
    return sums._replace(
        row=row,
        own=own,
        mass=sums.mass + weights.sum(-1),
        moment=sums.moment + weights @ block.points,
        square=sums.square + weights.square().sum(-1),
        further=tuple(old + new for old, new in zip(sums.further, further, strict=True)),
    )
