"""The drift field with the options of the study: transport plans, sharp kernels, noise and scale of the features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokendrift import field, kernels
from tokendrift._checks import check_choice, check_count
from tokendrift.barycentres import ReferenceBlock, Side, Sums, View, sum_references
from tokendrift.field import DriftField, FieldSums
from tokendrift.kernels import Kernel
from tokendrift.variants.sharp import SharpLaplace

KERNELS: dict[str, Kernel] = kernels.KERNELS | {"sharp_laplace": SharpLaplace()}
NORMALIZATIONS: tuple[str, ...] = (*field.NORMALIZATIONS, "sinkhorn")


def build_field(
    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2),
    *,
    kernel: Literal["gaussian", "laplace", "sharp_laplace"] = "gaussian",
    normalization: Literal["joint", "separate", "two_sided", "sinkhorn"] = "joint",
) -> DriftField:
    """Return the drift field of a kernel and a normalisation: `DriftField` where it has both, else an extended one.

    Args:
        temperatures: T, in units of squared distance (of distance for the Laplace kernels).
        kernel: A name from `KERNELS`. Default: ``"gaussian"``.
        normalization: A name from `NORMALIZATIONS`. Default: ``"joint"``.

    Raises:
        TokenDriftError: If there is no kernel or normalisation of that name, or a temperature is not above 0.

    >>> build_field((0.1,), normalization="sinkhorn").sinkhorn_iterations
    20
    """
    check_choice("kernel", kernel, tuple(KERNELS))
    check_choice("normalization", normalization, NORMALIZATIONS)
    plain = kernel in kernels.KERNELS and normalization in field.NORMALIZATIONS
    chosen: type[Any] = DriftField if plain else ExtendedDriftField
    return chosen(temperatures, kernel=kernel, normalization=normalization)


@dataclass(frozen=True)
class ExtendedDriftField(DriftField):
    r"""`DriftField` with the further options that the study compared.

    Attributes:
        kernel: As in `DriftField`, or ``"sharp_laplace"``, which moves points like Laplace but has a potential (see
            `SharpLaplace`), or a callable with a method ``pull`` like it.
        normalization: As in `DriftField`, or ``"sinkhorn"``: for each side the rows of an entropic transport plan
            between anchors and references (``sinkhorn_iterations`` walks over the references), so that few positives
            cannot draw all anchors. It depends on the batch of anchors too.
        subtract_noise: Multiply each temperature's drift by the share of its mean square that is not sampling noise,
            :math:`\max(0, 1 - n/m)`, so that it fades at equilibrium in spite of ``rms_normalize``. In m, the square of
            :math:`\sum_{jk} w_j w_k (u_j - v_k)`, n is the part that uses a positive or a negative twice. The rest is a
            U-statistic, zero in expectation where real and generated features have one law: exactly so for ``joint``
            and ``two_sided`` with references independent of the anchors; nearly for ``separate``, whose normalisers
            depend on the draw, and in part for ``sinkhorn``, whose plan does. The paired positive is not an independent
            draw and counts as signal. Default: False.
        feature_scaling: Give the kernel distances in units of their mean over all pairs that an anchor may see, and
            RMS-normalised drifts the size of that unit. Temperatures then need no tuning to the features; this is the
            normalisation of arXiv 2602.04770, appendix A.6, and costs another walk over the references. Default:
            False.
        sinkhorn_iterations: Row and column steps of ``"sinkhorn"``; it ends with a row step. Default: 20.

    The other attributes are those of `DriftField`.

    Raises:
        TokenDriftError: As `DriftField`.

    Source: this package and arXiv 2602.04770; the results are in the study of the documentation.

    >>> field = ExtendedDriftField((1.0,), kernel="sharp_laplace", normalization="separate", rms_normalize=False)
    >>> field(torch.zeros(1, 1), torch.ones(1, 1), -torch.ones(1, 1))
    tensor([[1.]])
    """

    kernel: Literal["gaussian", "laplace", "sharp_laplace"] | Kernel = "gaussian"  # type: ignore[assignment]
    normalization: Literal["joint", "separate", "two_sided", "sinkhorn"] = "joint"  # type: ignore[assignment]
    subtract_noise: bool = False
    feature_scaling: bool = False
    sinkhorn_iterations: int = 20

    kernels: ClassVar[dict[str, Kernel]] = KERNELS
    normalizations: ClassVar[tuple[str, ...]] = NORMALIZATIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinkhorn_iterations", self.sinkhorn_iterations, least=1)

    def signal(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        *,
        exclude_positive: Tensor | None = None,
        exclude_negative: Tensor | None = None,
    ) -> Tensor:
        """Return the mean square of the raw drift less its sampling noise, (T,); arguments as for a call.

        It is about zero, of either sign, at equilibrium. Average it over steps before taking a root.
        """
        field = replace(self, subtract_noise=True)
        raw, sums = field.raw(anchors, positives, negatives, exclude_positive, exclude_negative)
        return raw.square().sum(-1).mean(-1) - self._noise(sums)

    def _view(self, anchors: Tensor, centre: Tensor, positive: Side, negative: Side) -> View:
        plain = super()._view(anchors, centre, positive, negative)
        options = vars(plain) | {"refine": plain.refine or self.feature_scaling}
        view = _ExtendedView(**options, spread=self.subtract_noise)
        return replace(view, unit=_mean_distance(view, positive, negative)) if self.feature_scaling else view

    def _sum_side(self, view: View, side: Side) -> Sums:
        if self.normalization != "sinkhorn":
            return super()._sum_side(view, side)
        potential = _sinkhorn_potential(view, side, self.sinkhorn_iterations)
        return sum_references(view, side, column_share=1.0, row_potential=potential)

    def _aim(self, view: View, side: Sums) -> Tensor:
        if not isinstance(view, _ExtendedView) or view.pull is None:
            return side.mean()
        # The mean of x + rho (y - x), rho the kernel's pull.
        reach, moment = side.further[:2]
        return moment / side.mass[..., None] + (1 - reach / side.mass)[..., None] * view.anchors

    def _scale(self, mean_square: Tensor, sums: FieldSums) -> Tensor:
        unit = sums.view.unit if isinstance(sums.view, _ExtendedView) else None
        scale = super()._scale(mean_square if unit is None else mean_square / unit.square(), sums)
        if self.subtract_noise:
            scale = scale * torch.where(mean_square == 0, 0.0, 1 - self._noise(sums) / mean_square).clamp_min(0)
        return scale

    def _seen(self, pos: Sums, neg: Sums) -> tuple[Tensor, Tensor]:
        if self.normalization != "sinkhorn":
            return super()._seen(pos, neg)
        # Each side has a plan of its own, whose rows have the same mass: the kernel itself says what is seen.
        pos, neg = (side.rescaled(side.peak + side.mass.log()) for side in (pos, neg))
        total, row = pos.mass + neg.mass, torch.logaddexp(pos.row, neg.row)
        effective = torch.where(total == 0, 0.0, total.square() / (pos.square + neg.square))
        return torch.where(row.isneginf(), 0.0, (pos.row - row).exp()), effective

    def _noise(self, sums: FieldSums) -> Tensor:
        r"""Return the part of the mean square that comes from pairing a reference with itself, (T,).

        The gap is a sum over pairs of one positive and one negative, :math:`\sum_{jk} q_j r_k (d_j - d_k)` with d
        the (pulled) differences to the anchor. Of its square, the terms that use the same positive twice or the same
        negative twice have positive expectation whatever the distributions; the others are a U-statistic.
        """
        pos, neg, view = sums
        # For each side: the mean difference, and sums of q^2 d, q^2 |d|^2 and q^2, q the weights over their mass.
        pull, own_pos, size_pos, twice_pos = self._moments(view, pos, self.attraction)
        push, own_neg, size_neg, twice_neg = self._moments(view, neg, self.repulsion)
        positives_twice = size_pos - 2 * _dot(own_pos, push) + twice_pos * _dot(push, push)
        negatives_twice = size_neg - 2 * _dot(own_neg, pull) + twice_neg * _dot(pull, pull)
        both_twice = twice_neg * size_pos + twice_pos * size_neg - 2 * _dot(own_pos, own_neg)
        noise = positives_twice + negatives_twice - both_twice
        masses = torch.mul(*self._masses(pos, neg))
        squares = torch.where((pos.mass > 0) & (neg.mass > 0), masses, 0.0).square()
        # The squares underflow first: the noise of such a drift counts as none.
        return torch.where(squares > torch.finfo(squares.dtype).tiny, squares * noise, 0.0).mean(-1)

    def _moments(self, view: View, side: Sums, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return for one side, times the factor on it: mean difference, and the sums over squared weights."""
        reach, moment, size = side.further[-3:]
        square = side.mass.square()
        own = (moment - reach[..., None] * view.anchors) / square[..., None]
        mean = self._aim(view, side) - view.anchors
        return factor * mean, factor * own, factor**2 * size / square, side.square / square


@dataclass(frozen=True)
class _ExtendedView(View):
    """A view with a unit of distance, the pull of a sharp kernel, and sums over squared weights.

    The further sums are, rho being the pull: of w rho and w rho y for a sharp kernel; of w^2 rho, w^2 rho y and
    w^2 rho^2 d^2 if ``spread``.
    """

    unit: Tensor | None = None
    spread: bool = False

    @property
    def pull(self) -> Kernel | None:
        return getattr(self.kernel, "pull", None)

    @property
    def further_powers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (1, 1) * (self.pull is not None) + (2, 2, 2) * self.spread

    def in_unit(self, squared: Tensor) -> Tensor:
        return squared if self.unit is None else squared / self.unit.square()

    def further_sums(self, block: ReferenceBlock, weights: Tensor) -> tuple[Tensor, ...]:
        pulled, found = weights, []
        if self.pull is not None:
            scaled = self.in_unit(block.squared)
            pulled = weights * torch.stack([self.pull(scaled, tau) for tau in self.temperatures])
            found += [pulled.sum(-1), pulled @ block.points]
        if self.spread:
            squares = weights * pulled
            found += [squares.sum(-1), squares @ block.points, (pulled.square() * block.squared).sum(-1)]
        return tuple(found)


def _sinkhorn_potential(view: View, side: Side, iterations: int) -> Tensor:
    r"""Return the log row factors f (T, N) of a transport plan between the anchors and the references of one side.

    .. math::
        \log P_{ij} = f_i + \log k_{ij} + g_j, \qquad
        g_j = \log w_j - \log\textstyle\sum_i k_{ij} e^{f_i}, \qquad f_i = -\log\textstyle\sum_j k_{ij} e^{g_j}

    The column factors g follow from f and are never stored: every iteration is one walk over the references. The last
    row step takes place when the rows are normalised, so this function walks ``iterations - 1`` times. An anchor that
    sees nothing has f = -inf and takes no part.
    """
    potential = view.anchors.new_zeros(len(view.temperatures), len(view.anchors))
    for _ in range(iterations - 1):
        # Column step, then row step, block by block.
        row = torch.full_like(potential, -torch.inf)
        for block in view.blocks(side):
            logits = block.weighted() + block.column_potential(potential)
            row = torch.logaddexp(row, torch.logsumexp(logits, dim=-1))
        potential = torch.where(row.isinf(), -torch.inf, -row)
        top = potential.amax(dim=-1, keepdim=True)  # only differences count: keep them small
        potential = potential - torch.where(top.isinf(), 0.0, top)
    return potential


def _mean_distance(view: View, *sides: Side) -> Tensor:
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
    return torch.where(total == 0, 1.0, total / count)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)
