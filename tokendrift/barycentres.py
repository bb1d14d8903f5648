"""Weighted means of references for every anchor, streamed: memory does not grow with the number of references."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokendrift.kernels import Kernel, SharpKernel, squared_distances


class Side(NamedTuple):
    """The references of one side.

    Attributes:
        points: Shape (P, M).
        excluded: Int64 (N,): the reference that each anchor must not see, -1 for none; or None.
        weights: Zero or above, (P,), or None for all ones. A weight of two counts like two copies.
        pairs: Int64 (N,): the reference that belongs to each anchor, for diagnostics; or None.
    """

    points: Tensor
    excluded: Tensor | None = None
    weights: Tensor | None = None
    pairs: Tensor | None = None


class Block(NamedTuple):
    """Some references as the anchors see them.

    Attributes:
        points: Centred, (b, M).
        squared: Squared distances to the anchors, (N, b).
        scaled: The same in the unit that the kernel is given, (N, b).
        logits: Log-kernel, -inf where excluded, (T, N, b).
        hidden: Where an anchor must not look, bool (N, b), or None.
        log_weights: Log of the references' own weights, (b,), or None.
        start: Index of the first.
    """

    points: Tensor
    squared: Tensor
    scaled: Tensor
    logits: Tensor
    hidden: Tensor | None
    log_weights: Tensor | None
    start: int

    def weighted(self) -> Tensor:
        """Return the logits with the references' own weights."""
        return self.logits if self.log_weights is None else self.logits + self.log_weights

    def column_potential(self, row_potential: Tensor | None = None) -> Tensor:
        """Return minus the log of what a column sums to over the anchors, (T, 1, b).

        The references' own weights stay out: two copies of a point have the same column each.
        """
        logits = self.logits if row_potential is None else self.logits + row_potential[..., None]
        columns = torch.logsumexp(logits, dim=1, keepdim=True)
        return torch.where(columns.isinf(), 0.0, -columns)  # nobody sees it: its logits are -inf already


@dataclass(frozen=True)
class View:
    """How a set of centred anchors (N, M) looks at references: kernel, temperatures (T), unit of distance."""

    anchors: Tensor
    centre: Tensor
    kernel: Kernel
    temperatures: tuple[float, ...]
    block_size: int
    refine: bool
    unit: Tensor | None = None

    def blocks(self, side: Side) -> Iterator[Block]:
        """Walk over the references of a side."""
        for start in range(0, len(side.points), self.block_size):
            stop = start + self.block_size
            points = side.points[start:stop].to(self.centre.dtype) - self.centre
            squared = squared_distances(self.anchors, points, refine=self.refine)
            scaled = squared if self.unit is None else squared / self.unit.square()
            logits = torch.stack([self.kernel(scaled, tau) for tau in self.temperatures])
            hidden = None
            if side.excluded is not None:
                hidden = torch.arange(start, start + len(points), device=points.device) == side.excluded[:, None]
                logits = logits.masked_fill(hidden, -torch.inf)
            log_weights = None if side.weights is None else side.weights[start:stop].to(squared.dtype).log()
            yield Block(points, squared, scaled, logits, hidden, log_weights, start)

    def pull(self, block: Block) -> Tensor | None:
        """Return the kernel's factor on differences, (T, N, b), or None where it is one."""
        kernel = self.kernel
        if not isinstance(kernel, SharpKernel):
            return None
        return torch.stack([kernel.pull(block.scaled, tau) for tau in self.temperatures])


class Sums(NamedTuple):
    r"""Running sums over the references of one side, weights w relative to exp(peak) and rho the kernel's pull.

    Attributes:
        peak: Largest log-weight, (T, N).
        row: Log-sum-exp of the kernel without column factors, (T, N); kept where column factors are in use.
        own: Log-weight of each anchor's own pair, (T, N).
        mass: Sum of w, (T, N).
        reach: Sum of w rho, (T, N); the mass itself for a kernel without pull.
        moment: Sum of w rho y, (T, N, M).
        square: Sum of w^2, (T, N).
        spread: What the noise estimate needs beside it, or None.
    """

    peak: Tensor
    row: Tensor
    own: Tensor
    mass: Tensor
    reach: Tensor
    moment: Tensor
    square: Tensor
    spread: Spread | None

    def rescaled(self, peak: Tensor) -> Sums:
        """Return the same sums relative to another peak."""
        factor = (self.peak - torch.where(peak.isinf(), 0.0, peak)).exp()  # -inf minus -inf would be NaN
        return self._replace(
            peak=peak,
            mass=self.mass * factor,
            reach=self.reach * factor,
            moment=self.moment * factor[..., None],
            square=self.square * factor.square(),
            spread=None if self.spread is None else self.spread.times(factor.square()),
        )

    def aim(self, x: Tensor) -> Tensor:
        """Return the points that anchors x are drawn to, (T, N, M): means of x + rho (y - x)."""
        return self.moment / self.mass[..., None] + (1 - self.reach / self.mass)[..., None] * x


class Spread(NamedTuple):
    """Sums of squared weights: of w^2 rho (T, N), of w^2 rho y (T, N, M), of w^2 rho^2 d^2 (T, N)."""

    reach: Tensor
    moment: Tensor
    size: Tensor

    def times(self, factor: Tensor) -> Spread:
        """Return the sums times a factor (T, N)."""
        return Spread(self.reach * factor, self.moment * factor[..., None], self.size * factor)

    def shares(self, x: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums of q^2 d (T, N, M) and q^2 |d|^2 (T, N), q the weights over their mass, d = rho (y - x)."""
        square = mass.square()
        return (self.moment - self.reach[..., None] * x) / square[..., None], self.size / square


def sum_references(
    view: View,
    side: Side,
    *,
    peak: Tensor | None = None,
    column_share: float = 0.0,
    row_potential: Tensor | None = None,
    spread: bool = False,
) -> Sums:
    """Sum the weighted references of one side for every anchor, rescaling to a new peak block by block.

    Args:
        view: How anchors look at references.
        side: The references.
        peak: Where the peak starts, (T, N): two sides are put on one scale by starting the second from the first's.
        column_share: Power of the column factor: 0 for none, 1/2 for the two-sided form, 1 for a transport plan.
        row_potential: For `Block.column_potential`.
        spread: Sum for the noise estimate as well.
    """
    low = view.anchors.new_full((len(view.temperatures), len(view.anchors)), -torch.inf)
    none, nowhere = torch.zeros_like(low), view.anchors.new_zeros(*low.shape, view.anchors.shape[1])
    sums = Sums(low, low, low, none, none, nowhere, none, Spread(none, nowhere, none) if spread else None)
    if peak is not None:
        sums = sums.rescaled(peak)
    for block in view.blocks(side):
        sums = _absorb(sums, block, view.pull(block), column_share, row_potential, side.pairs)
    return sums


def _absorb(
    sums: Sums,
    block: Block,
    pull: Tensor | None,
    column_share: float,
    row_potential: Tensor | None,
    pairs: Tensor | None,
) -> Sums:
    """Add one block of references to the running sums."""
    logits, row, own = block.weighted(), sums.row, sums.own
    if column_share:
        row = torch.logaddexp(row, torch.logsumexp(logits, dim=-1))
        logits = logits + column_share * block.column_potential(row_potential)
    if pairs is not None:
        index = pairs - block.start
        here = (index >= 0) & (index < len(block.points))
        column = torch.where(here, index, 0).expand(len(logits), -1)[..., None]
        own = torch.where(here, logits.gather(-1, column)[..., 0], own)
    sums = sums.rescaled(torch.maximum(sums.peak, logits.amax(dim=-1)))
    weights = (logits - torch.where(sums.peak.isinf(), 0.0, sums.peak)[..., None]).exp_()
    pulled = weights if pull is None else weights * pull
    spread = sums.spread
    if spread is not None:
        squares = weights * pulled
        spread = Spread(
            spread.reach + squares.sum(-1),
            spread.moment + squares @ block.points,
            spread.size + (pulled.square() * block.squared).sum(-1),
        )
    mass = weights.sum(-1)
    return Sums(
        sums.peak,
        row,
        own,
        sums.mass + mass,
        sums.reach + (mass if pull is None else pulled.sum(-1)),
        sums.moment + pulled @ block.points,
        sums.square + weights.square().sum(-1),
        spread,
    )


def sinkhorn_potential(view: View, side: Side, iterations: int) -> Tensor:
    r"""Return the log row factors f (T, N) of a transport plan between the anchors and the references of one side.

    .. math::
        \log P_{ij} = f_i + \log k_{ij} + g_j, \qquad
        g_j = \log w_j - \log\textstyle\sum_i k_{ij} e^{f_i}, \qquad f_i = -\log\textstyle\sum_j k_{ij} e^{g_j}

    The column factors g follow from f and are never stored: every iteration is one walk over the references. The
    last row step is left to whoever normalises the rows, so that these are ``iterations - 1`` walks. An anchor that
    sees nothing has f = -inf and takes no part.
    """
    potential = view.anchors.new_zeros(len(view.temperatures), len(view.anchors))
    for _ in range(iterations - 1):
        row = torch.full_like(potential, -torch.inf)
        for block in view.blocks(side):
            logits = block.weighted() + block.column_potential(potential)
            row = torch.logaddexp(row, torch.logsumexp(logits, dim=-1))
        potential = torch.where(row.isinf(), -torch.inf, -row)
        top = potential.amax(dim=-1, keepdim=True)  # only differences count: keep them small
        potential = potential - torch.where(top.isinf(), 0.0, top)
    return potential


def mean_distance(view: View, *sides: Side) -> Tensor:
    """Return the weighted mean distance, a scalar, over all pairs that an anchor may see; 1 if they all coincide."""
    total, count = view.anchors.new_zeros(()), view.anchors.new_zeros(())
    for side in sides:
        for block in view.blocks(side):
            weights = torch.ones_like(block.squared)
            if block.log_weights is not None:
                weights = weights * block.log_weights.exp()
            if block.hidden is not None:
                weights = weights.masked_fill(block.hidden, 0.0)
            total, count = total + (weights * block.squared.sqrt()).sum(), count + weights.sum()
    return torch.where(total > 0, total / count, 1.0)
