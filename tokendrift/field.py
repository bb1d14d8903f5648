r"""Drift fields: features and their references in, one drift vector an anchor out.

An anchor :math:`h_i` is pulled toward the positives :math:`u_j` (real text) and away from the negatives
:math:`v_k` (generated text). Swapping positives and negatives flips the sign of the drift; that law,
anti-symmetry, is what `tokendrift.testing` checks on any field.

Everything runs without gradient, in float32 or wider, with autocast and TF32 off, and streams over the
references in blocks: memory does not grow with their number beyond the references themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tokendrift._checks import check_choice, check_clouds, check_count, check_positive, check_weights, fail
from tokendrift.barycentres import Side, Sums, View, mean_distance, sinkhorn_potential, sum_references
from tokendrift.kernels import KERNELS, Kernel, exact_matmul

__all__ = ["NORMALIZATIONS", "DriftField", "Field", "FieldDiagnostics"]


class Field(Protocol):
    """What `TokenDriftLoss` asks of a drift field; write your own with this signature."""

    def __call__(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        *,
        exclude_positive: Tensor | None = None,
        exclude_negative: Tensor | None = None,
    ) -> Tensor:
        """Map anchors (N, M), positives (P, M) and negatives (Q, M) to drifts (N, M).

        ``exclude_positive`` and ``exclude_negative`` are int64 (N,): the one reference that each anchor
        must not see, -1 for none.
        """
        ...


class FieldDiagnostics(NamedTuple):
    """How a field worked, one value a temperature; detached tensors on the device of the anchors.

    Attributes:
        rms: Raw drift RMS before any normalisation, (T,). Falls like N^-1/2 at equilibrium.
        positive_mass: Mean share of the kernel weight on positives, (T,); P/(P+Q) at equilibrium.
        effective_references: Mean effective sample size (sum w)^2 / sum w^2 over all references, (T,).
        pair_weight: Mean share of its own paired positive among an anchor's positives, (T,); NaN when no
            pair was named.
        signal: Mean square of the raw drift less its sampling noise, (T,): about zero, of either sign, at
            equilibrium. Average it over steps before taking a root.
    """

    rms: Tensor
    positive_mass: Tensor
    effective_references: Tensor
    pair_weight: Tensor
    signal: Tensor


NORMALIZATIONS = ("joint", "separate", "two_sided", "sinkhorn")
JOINT = ("joint", "two_sided")  # both sides share one sum
CENTRE_FROM = 256  # references of either side


@dataclass(frozen=True)
class DriftField:
    r"""The anti-symmetric drift field of TokenDrift, averaged over temperatures.

    With :math:`s^+_{ij} = -\lVert h_i-u_j\rVert^2/\tau`, :math:`s^-_{ik}` likewise, and A the softmax of each
    row over positives and negatives *jointly*, split into :math:`A^+, A^-`:

    .. math::
        W^+_{ij} = A^+_{ij}\textstyle\sum_k A^-_{ik},\quad
        W^-_{ik} = A^-_{ik}\textstyle\sum_j A^+_{ij},\quad
        V^{(\tau)}_i = \sum_j W^+_{ij} u_j - \sum_k W^-_{ik} v_k

        V_i = \frac1{|T|}\sum_\tau V^{(\tau)}_i / s(\tau),\qquad
        s(\tau) = \sqrt{\tfrac1N\textstyle\sum_i \lVert V^{(\tau)}_i\rVert^2 + \epsilon}

    Attributes:
        temperatures: T, in units of squared distance (of distance for ``laplace`` and ``sharp_laplace``).
        kernel: ``"gaussian"``; ``"laplace"``; ``"sharp_laplace"``, which moves points like Laplace but has a
            potential (see `SharpLaplace`; the Gaussian has one anyway); or a callable (squared distances, tau) ->
            log-weights, with a method ``pull`` if differences are to be shortened as well.
        normalization: ``"joint"`` as above. ``"separate"`` normalises each side alone (W+ and W- sum to one).
            ``"two_sided"`` takes the geometric mean of row and column softmax before the cross-weights, as
            Algorithm 2 of arXiv 2602.04770; its columns run over the anchors, so with few anchors it is
            unsafe (with one anchor it only doubles the temperature). ``"sinkhorn"`` takes for each side the rows
            of an entropic transport plan between anchors and references (``sinkhorn_iterations`` walks over the
            references), so that few positives cannot draw all anchors; it depends on the batch of anchors too.
        rms_normalize: Divide each temperature's drift by its RMS over the anchors. Hides equilibrium: the
            normalised drift keeps size 1 where the raw one is sampling noise.
        aggregate: ``"mean"`` over temperatures, or ``"sum"`` as arXiv 2602.04770.
        eps: Added inside the root of s. A temperature with a mean square below eps contributes zero instead of
            amplified rounding.
        block_size: References handled at a time; memory grows with it and not with the number of references. By default
            a block stays in the cache of a CPU (about a million numbers), or fills an accelerator (8192 references).
        attraction, repulsion: Factors on the pull to the positives and on the push from the negatives, as differences
            to the anchor. Only equal factors make the field anti-symmetric.
        subtract_noise: Multiply each temperature's drift by the share of its mean square that is not sampling noise,
            :math:`\max(0, 1 - n/m)`, so that it fades at equilibrium in spite of ``rms_normalize``. In m, the square
            of :math:`\sum_{jk} w_j w_k (u_j - v_k)`, n is the part that uses a positive or a negative twice. What is
            left is a U-statistic, zero in expectation where real and generated features have one law: exactly so
            for ``joint`` and ``two_sided`` with references independent of the anchors; nearly for ``separate``, whose
            normalisers depend on the draw, and in part for ``sinkhorn``, whose plan does. The paired positive is
            no independent draw and counts as signal.
        feature_scaling: Give the kernel distances in units of their mean over all pairs that an anchor may see, and
            RMS-normalised drifts the size of that unit. Temperatures then need no tuning to the features; this is the
            normalisation of arXiv 2602.04770, appendix A.6, and costs another walk over the references.
        sinkhorn_iterations: Row and column steps of ``"sinkhorn"``; it ends with a row step.

    Raises:
        TokenDriftError: If an option is out of range (at construction) or shapes, dtypes or devices do not
            agree (at the call).

    Source: TokenDrift (arXiv 2605.19470), section 3.3; the paper leaves open what "jointly normalised" means,
    this is the translation-invariant reading.

    >>> field = DriftField(temperatures=(1.0,), rms_normalize=False)
    >>> field(torch.zeros(1, 1), torch.ones(1, 1), -torch.ones(1, 1))  # a+ a- (b+ - b-) = 1/2 * 1/2 * 2
    tensor([[0.5000]])
    """

    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)
    kernel: Literal["gaussian", "laplace", "sharp_laplace"] | Kernel = "gaussian"
    normalization: Literal["joint", "separate", "two_sided", "sinkhorn"] = "joint"
    rms_normalize: bool = True
    aggregate: Literal["mean", "sum"] = "mean"
    eps: float = 1e-12
    block_size: int | None = None
    attraction: float = 1.0
    repulsion: float = 1.0
    subtract_noise: bool = False
    feature_scaling: bool = False
    sinkhorn_iterations: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.temperatures, Sequence) or not self.temperatures:
            raise fail("temperatures must be a tuple of numbers above 0.", temperatures=self.temperatures)
        for temperature in self.temperatures:
            check_positive("temperatures", temperature, symbol="each tau")
        object.__setattr__(self, "temperatures", tuple(map(float, self.temperatures)))
        if not callable(self.kernel):
            check_choice("kernel", self.kernel, tuple(KERNELS))
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_choice("aggregate", self.aggregate, ("mean", "sum"))
        check_positive("eps", self.eps)
        if self.block_size is not None:
            check_count("block_size", self.block_size, least=1)
        check_count("sinkhorn_iterations", self.sinkhorn_iterations, least=1)
        for name in ("attraction", "repulsion"):
            if getattr(self, name) != 0:
                check_positive(name, getattr(self, name), symbol="zero or above")
        if self.attraction == self.repulsion == 0:
            raise fail("attraction and repulsion are both 0: nothing would move.")

    def __call__(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        *,
        exclude_positive: Tensor | None = None,
        exclude_negative: Tensor | None = None,
        positive_weights: Tensor | None = None,
        negative_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the drift of every anchor.

        Args:
            anchors: Points that drift, (N, M).
            positives: Real features, (P, M), P at least 1.
            negatives: Generated features, (Q, M); Q = 0 gives zero drift.
            exclude_positive: The positive each anchor must not see, int64 (N,), -1 for none.
            exclude_negative: The same for negatives: usually the anchor itself.
            positive_weights: How many copies each positive stands for, (P,), zero or above and not only whole
                numbers; all ones by default.
            negative_weights: The same for negatives, (Q,); see `guidance_weight`.

        Returns:
            Shape (N, M), float32 or wider, without gradient. Zero for an anchor that sees nothing on one side.
        """
        raw, sums = self.raw(
            anchors,
            positives,
            negatives,
            exclude_positive,
            exclude_negative,
            positive_weights=positive_weights,
            negative_weights=negative_weights,
            noise=self.subtract_noise,
        )
        return self.combine(raw, sums)

    def diagnose(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        *,
        exclude_positive: Tensor | None = None,
        exclude_negative: Tensor | None = None,
        positive_weights: Tensor | None = None,
        negative_weights: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> tuple[Tensor, FieldDiagnostics]:
        """Return the drift with diagnostics; ``pairs`` int64 (N,) names each anchor's own positive."""
        raw, sums = self.raw(
            anchors,
            positives,
            negatives,
            exclude_positive,
            exclude_negative,
            positive_weights=positive_weights,
            negative_weights=negative_weights,
            pairs=pairs if exclude_positive is None else None,
            noise=True,
        )
        pos, neg = sums.positives, sums.negatives
        mean_square = raw.square().sum(-1).mean(-1)
        pair_weight = torch.full_like(mean_square, torch.nan)
        if pairs is not None and exclude_positive is None:
            pair_weight = ((pos.own - pos.peak).exp() / pos.mass).mean(-1)
        if self.normalization == "sinkhorn":  # each side has a plan of its own
            seen = (pos.row - torch.logaddexp(pos.row, neg.row)).exp()
            pos, neg = (side.rescaled(side.peak + side.mass.log()) for side in (pos, neg))
        else:
            peak = torch.maximum(pos.peak, neg.peak)
            pos, neg = pos.rescaled(peak), neg.rescaled(peak)
            seen = pos.mass / (pos.mass + neg.mass)
        effective = (pos.mass + neg.mass).square() / (pos.square + neg.square)
        noise = torch.zeros_like(mean_square) if sums.noise is None else sums.noise
        return self.combine(raw, sums), FieldDiagnostics(
            mean_square.sqrt(),
            seen.nan_to_num(0.0).mean(-1),
            effective.nan_to_num(0.0).mean(-1),
            pair_weight,
            mean_square - noise,
        )

    @property
    def _kernel(self) -> Kernel:
        return KERNELS[self.kernel] if isinstance(self.kernel, str) else self.kernel

    def _block_for(self, anchors: Tensor) -> int:
        if self.block_size is not None:
            return self.block_size
        if anchors.device.type != "cpu" or torch.compiler.is_compiling():
            return 8192
        numbers = anchors.shape[1] + len(anchors) * len(self.temperatures)  # for each reference: itself, its weights
        return min(8192, max(256, 2**20 // numbers))

    def combine(self, raw: Tensor, sums: FieldSums) -> Tensor:
        """Return the drift (N, M) from the raw drifts (T, N, M): scales of the temperatures, then aggregation."""
        mean_square = raw.square().sum(-1).mean(-1)
        if self.rms_normalize:
            size = mean_square if sums.unit is None else mean_square / sums.unit.square()
            scale = torch.where(size > self.eps, (size + self.eps).rsqrt(), 0.0)
            raw = raw * scale[:, None, None]
        if self.subtract_noise and sums.noise is not None:
            kept = torch.where(mean_square > 0, 1 - sums.noise / mean_square, 0.0).clamp_min(0)
            raw = raw * kept[:, None, None]
        return raw.mean(dim=0) if self.aggregate == "mean" else raw.sum(dim=0)

    @torch.no_grad()
    def raw(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        exclude_positive: Tensor | None = None,
        exclude_negative: Tensor | None = None,
        *,
        positive_weights: Tensor | None = None,
        negative_weights: Tensor | None = None,
        pairs: Tensor | None = None,
        noise: bool = False,
    ) -> tuple[Tensor, FieldSums]:
        """Return the raw drifts (T, N, M), before RMS normalisation, and the sums they were made from."""
        check_clouds(anchors, positives, negatives, exclude_positive, exclude_negative)
        check_weights(anchors, positives=(positives, positive_weights), negatives=(negatives, negative_weights))
        dtype = torch.promote_types(anchors.dtype, torch.float32)
        with exact_matmul(anchors.device):
            # Distances by products cancel badly far from the origin, so all clouds are centred first. Any point
            # among them will do: the mean of some.
            some = [cloud[:CENTRE_FROM] for cloud in (positives, negatives)]
            centre = (some[0].sum(0, dtype=dtype) + some[1].sum(0, dtype=dtype)) / (len(some[0]) + len(some[1]))
            # Near zero the root of a product-form distance is all rounding, and only the Gaussian takes no root.
            refine = self.kernel != "gaussian" or self.feature_scaling
            view = View(
                anchors.to(dtype) - centre, centre, self._kernel, self.temperatures, self._block_for(anchors), refine
            )
            sides = (
                Side(positives, exclude_positive, positive_weights, pairs),
                Side(negatives, exclude_negative, negative_weights),
            )
            if self.feature_scaling:
                view = replace(view, unit=mean_distance(view, *sides))
            pos, neg = self._sum_sides(view, *sides, spread=noise)
            return self._drift(view, pos, neg)

    def _sum_sides(self, view: View, positive: Side, negative: Side, *, spread: bool) -> tuple[Sums, Sums]:
        """Return the sums of both sides: on one scale where the normalisation is joint, each on its own if not."""
        share = {"two_sided": 0.5, "sinkhorn": 1.0}.get(self.normalization, 0.0)
        plans: list[Tensor | None] = [None, None]
        if self.normalization == "sinkhorn":
            plans = [sinkhorn_potential(view, side, self.sinkhorn_iterations) for side in (positive, negative)]
        pos = sum_references(view, positive, column_share=share, row_potential=plans[0], spread=spread)
        peak = pos.peak if self.normalization in JOINT else None
        neg = sum_references(view, negative, peak=peak, column_share=share, row_potential=plans[1], spread=spread)
        return (pos if peak is None else pos.rescaled(neg.peak)), neg

    def _drift(self, view: View, pos: Sums, neg: Sums) -> tuple[Tensor, FieldSums]:
        """Return the raw drifts (T, N, M) from complete sums; zero where one side is empty."""
        both = (pos.mass > 0) & (neg.mass > 0)
        mass_pos, mass_neg = torch.ones_like(pos.mass), torch.ones_like(neg.mass)
        if self.normalization == "joint":
            total = pos.mass + neg.mass
            mass_pos, mass_neg = pos.mass / total, neg.mass / total
        elif self.normalization == "two_sided":  # A = exp(logits - column/2 - row/2)
            shift = (pos.peak - 0.5 * torch.logaddexp(pos.row, neg.row)).exp()
            mass_pos, mass_neg = pos.mass * shift, neg.mass * shift
        masses = torch.where(both, mass_pos * mass_neg, 0.0)
        aims = [side.aim(view.anchors) for side in (pos, neg)]
        gap = self.attraction * aims[0] - self.repulsion * aims[1]
        if self.attraction != self.repulsion:  # pull and push are differences to the anchor
            gap = gap - (self.attraction - self.repulsion) * view.anchors
        raw = masses[..., None] * torch.where(both[..., None], gap, 0.0)
        noise = None
        if pos.spread is not None and neg.spread is not None:
            own = pos.spread.shares(view.anchors, pos.mass), neg.spread.shares(view.anchors, neg.mass)
            twice = pos.square / pos.mass.square(), neg.square / neg.mass.square()
            sampling = self._sampling_noise([aim - view.anchors for aim in aims], own, twice)
            squares = masses.square()  # these underflow first: the noise of such a drift counts as none
            noise = torch.where(squares > torch.finfo(squares.dtype).tiny, squares * sampling, 0.0).mean(-1)
        return raw, FieldSums(pos, neg, noise, view.unit)

    def _sampling_noise(
        self, mean: Sequence[Tensor], own: Sequence[tuple[Tensor, Tensor]], twice: Sequence[Tensor]
    ) -> Tensor:
        r"""Return the part of the squared gap that comes from pairing a reference with itself, (T, N).

        The gap is a sum over pairs of one positive and one negative, :math:`\sum_{jk} q_j r_k (d_j - d_k)` with d
        the (pulled) differences to the anchor. Of its square, the terms that use the same positive twice or the same
        negative twice have positive expectation whatever the distributions; the others are a U-statistic.

        Args, of positives and negatives: sums of q d (T, N, M); of q^2 d and of q^2 |d|^2; of q^2 (T, N).
        """
        pull, push = self.attraction * mean[0], self.repulsion * mean[1]
        own_pos, size_pos = self.attraction * own[0][0], self.attraction**2 * own[0][1]
        own_neg, size_neg = self.repulsion * own[1][0], self.repulsion**2 * own[1][1]
        positives_twice = size_pos - 2 * _dot(own_pos, push) + twice[0] * _dot(push, push)
        negatives_twice = size_neg - 2 * _dot(own_neg, pull) + twice[1] * _dot(pull, pull)
        both_twice = twice[1] * size_pos + twice[0] * size_neg - 2 * _dot(own_pos, own_neg)
        return positives_twice + negatives_twice - both_twice


class FieldSums(NamedTuple):
    """What the raw drifts were made from: sums of both sides, noise (T,) and unit of distance if asked for."""

    positives: Sums
    negatives: Sums
    noise: Tensor | None
    unit: Tensor | None


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)
