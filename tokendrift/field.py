r"""Drift fields: from features and their references to one drift vector for each anchor.

An anchor :math:`h_i` is pulled toward the positives :math:`u_j` (real text) and away from the negatives
:math:`v_k` (generated text). Swapping positives and negatives flips the sign of the drift; that law,
anti-symmetry, is what `tokendrift.testing` checks on any field.

Everything runs without gradient, in float32 or wider, with autocast and TF32 off, and streams over the
references in blocks: memory does not grow with their number beyond the references themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tokendrift._checks import (
    check_choice,
    check_clouds,
    check_count,
    check_positive,
    check_temperatures,
    fail,
)
from tokendrift.barycentres import Side, Sums, View, sum_references
from tokendrift.kernels import KERNELS, Kernel, exact_matmul

__all__ = ["NORMALIZATIONS", "DriftField", "Field", "FieldDiagnostics"]


class Field(Protocol):
    """The signature of a drift field, as `TokenDriftLoss` calls it. Your own field needs this signature."""

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
    """Diagnostics of a field, one value for each temperature: detached tensors on the device of the anchors.

    Attributes:
        rms: Raw drift RMS before any normalisation, (T,). Falls like N^-1/2 at equilibrium.
        positive_mass: Mean share of the kernel weight on positives, (T,); P/(P+Q) at equilibrium.
        effective_references: Mean effective sample size (sum w)^2 / sum w^2 over all references, (T,).
        pair_weight: Mean share of its own paired positive among an anchor's positives, (T,); NaN when no
            pair was given.
    """

    rms: Tensor
    positive_mass: Tensor
    effective_references: Tensor
    pair_weight: Tensor


class FieldSums(NamedTuple):
    """What the raw drifts were computed from: the sums of both sides, and how the anchors saw them."""

    positives: Sums
    negatives: Sums
    view: View


NORMALIZATIONS: tuple[str, ...] = ("joint", "separate", "two_sided")
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

    Further forms that the study tried are in `tokendrift.variants`.

    Attributes:
        temperatures: T, in units of squared distance (of distance for ``"laplace"``). Default: (0.02, 0.05, 0.2).
        kernel: ``"gaussian"`` (default), ``"laplace"``, or a callable (squared distances, tau) -> log-weights.
        normalization: ``"joint"`` as above (default). ``"separate"`` normalises each side alone (W+ and W- sum to
            one). ``"two_sided"`` takes the geometric mean of row and column softmax before the cross-weights, as
            Algorithm 2 of arXiv 2602.04770; its columns run over the anchors, so with few anchors it is
            unsafe (with one anchor it only doubles the temperature).
        rms_normalize: Divide each temperature's drift by its RMS over the anchors. This hides equilibrium: there the
            raw drift is sampling noise, but the normalised drift still has size 1. Default: True.
        aggregate: ``"mean"`` over temperatures (default), or ``"sum"`` as arXiv 2602.04770.
        eps: Added inside the root of s. A temperature whose mean square is below eps contributes almost zero instead of
            amplified rounding errors. Default: 1e-12.
        block_size: Number of references handled at a time; memory grows with it and not with the number of
            references. By default a block stays in the cache of a CPU (about a million numbers), or fills an
            accelerator (8192 references).
        attraction: Factor on the pull to the positives, taken as differences to the anchor. Default: 1.
        repulsion: Factor on the push from the negatives. Default: 1. Only equal factors make the field anti-symmetric.

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
    kernel: Literal["gaussian", "laplace"] | Kernel = "gaussian"
    normalization: Literal["joint", "separate", "two_sided"] = "joint"
    rms_normalize: bool = True
    aggregate: Literal["mean", "sum"] = "mean"
    eps: float = 1e-12
    block_size: int | None = None
    attraction: float = 1.0
    repulsion: float = 1.0

    kernels: ClassVar[dict[str, Kernel]] = KERNELS
    normalizations: ClassVar[tuple[str, ...]] = NORMALIZATIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", check_temperatures(self.temperatures, symbol="each tau"))
        if not callable(self.kernel):
            check_choice("kernel", self.kernel, tuple(self.kernels))
        check_choice("normalization", self.normalization, self.normalizations)
        check_choice("aggregate", self.aggregate, ("mean", "sum"))
        check_positive("eps", self.eps)
        if self.block_size is not None:
            check_count("block_size", self.block_size, least=1)
        for name in ("attraction", "repulsion"):
            check_positive(name, getattr(self, name), or_zero=True)
        if self.attraction == self.repulsion == 0:
            raise fail("attraction and repulsion are both 0, so the drift would always be zero.")

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
            positive_weights: Number of copies that each positive represents, (P,): non-negative, not necessarily
                integers. Default: all ones.
            negative_weights: The same for negatives, (Q,); see `tokendrift.references.guidance_weight`.

        Returns:
            Shape (N, M), float32 or wider, without gradient. Zero for an anchor that sees nothing on one side, NaN
            where a reference is not finite or features are too large for their squares.
        """
        raw, sums = self.raw(
            anchors, positives, negatives, exclude_positive, exclude_negative, positive_weights, negative_weights
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
        """Return the drift with diagnostics; ``pairs``, int64 (N,), is the index of each anchor's own positive."""
        pairs = pairs if exclude_positive is None else None
        raw, sums = self.raw(
            anchors, positives, negatives, exclude_positive, exclude_negative, positive_weights, negative_weights, pairs
        )
        rms = raw.square().sum(-1).mean(-1).sqrt()
        pair_weight = torch.full_like(rms, torch.nan)
        if pairs is not None:
            positive = sums.positives
            pair_weight = ((positive.own - positive.peak).exp() / positive.mass).mean(-1)
        seen, effective = self._seen(sums.positives, sums.negatives)
        return self.combine(raw, sums), FieldDiagnostics(rms, seen.mean(-1), effective.mean(-1), pair_weight)

    @torch.no_grad()
    def raw(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        exclude_positive: Tensor | None = None,
        exclude_negative: Tensor | None = None,
        positive_weights: Tensor | None = None,
        negative_weights: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> tuple[Tensor, FieldSums]:
        """Return the raw drifts (T, N, M), before RMS normalisation, and the sums they were computed from."""
        check_clouds(
            anchors, positives, negatives, exclude_positive, exclude_negative, positive_weights, negative_weights
        )
        dtype = torch.promote_types(anchors.dtype, torch.float32)
        with exact_matmul(anchors.device):
            # 1. Distances by products cancel badly far from the origin, so all clouds are centred first. Any point
            # among them will do: the mean of some.
            some = [cloud[:CENTRE_FROM] for cloud in (positives, negatives)]
            centre = (some[0].sum(0, dtype=dtype) + some[1].sum(0, dtype=dtype)) / (len(some[0]) + len(some[1]))
            sides = (
                Side(positives, exclude_positive, positive_weights, pairs),
                Side(negatives, exclude_negative, negative_weights),
            )
            # 2. Weighted sums of the references of both sides, block by block.
            view = self._view(anchors.to(dtype) - centre, centre, *sides)
            # 3. From their means and masses, the drift.
            return self._drift(view, *(self._sum_side(view, side) for side in sides))

    def combine(self, raw: Tensor, sums: FieldSums) -> Tensor:
        """Return the drift (N, M) from the raw drifts (T, N, M): scales of the temperatures, then aggregation."""
        raw = raw * self._scale(raw.square().sum(-1).mean(-1), sums)[:, None, None]
        return raw.mean(dim=0) if self.aggregate == "mean" else raw.sum(dim=0)

    def _block_for(self, anchors: Tensor) -> int:
        if self.block_size is not None:
            return self.block_size
        if anchors.device.type != "cpu" or torch.compiler.is_compiling():
            return 8192
        numbers = anchors.shape[1] + len(anchors) * len(self.temperatures)  # for each reference: itself, its weights
        return min(8192, max(256, 2**20 // numbers))

    def _view(self, anchors: Tensor, centre: Tensor, positive: Side, negative: Side) -> View:
        """Return how centred anchors look at references."""
        # Near zero the root of a product-form distance is all rounding, and only the Gaussian takes no root.
        refine = self.kernel != "gaussian"
        kernel = self.kernels[self.kernel] if isinstance(self.kernel, str) else self.kernel
        return View(anchors, centre, kernel, self.temperatures, self._block_for(anchors), refine)

    def _sum_side(self, view: View, side: Side) -> Sums:
        """Return the sums of one side, relative to a peak of its own."""
        return sum_references(view, side, column_share=0.5 if self.normalization == "two_sided" else 0.0)

    def _masses(self, pos: Sums, neg: Sums) -> tuple[Tensor, Tensor]:
        """Return the sums of A over positives and over negatives, (T, N) each; ones where each sums to one alone."""
        if self.normalization == "joint":
            ahead = (pos.peak - neg.peak) + (pos.mass.log() - neg.mass.log())
            return ahead.sigmoid(), (-ahead).sigmoid()
        if self.normalization == "two_sided":  # A = exp(logits - column/2 - row/2)
            row = 0.5 * torch.logaddexp(pos.row, neg.row)
            return pos.mass * (pos.peak - row).exp(), neg.mass * (neg.peak - row).exp()
        return torch.ones_like(pos.mass), torch.ones_like(neg.mass)

    def _aim(self, view: View, side: Sums) -> Tensor:
        """Return the points that the anchors are drawn to by a side, (T, N, M)."""
        return side.mean()

    def _drift(self, view: View, pos: Sums, neg: Sums) -> tuple[Tensor, FieldSums]:
        """Return the raw drifts (T, N, M) from complete sums; zero where one side is empty, NaN where it is NaN."""
        empty = (pos.mass == 0) | (neg.mass == 0)
        mass_pos, mass_neg = self._masses(pos, neg)
        # Cross-weights: each side is scaled by the mass of the other, which makes the field anti-symmetric.
        masses = torch.where(empty, 0.0, mass_pos * mass_neg)
        gap = self.attraction * self._aim(view, pos) - self.repulsion * self._aim(view, neg)
        if self.attraction != self.repulsion:  # pull and push are differences to the anchor
            gap = gap - (self.attraction - self.repulsion) * view.anchors
        return masses[..., None] * torch.where(empty[..., None], 0.0, gap), FieldSums(pos, neg, view)

    def _scale(self, mean_square: Tensor, sums: FieldSums) -> Tensor:
        """Return the factor on the raw drift of each temperature, (T,)."""
        if not self.rms_normalize:
            return torch.ones_like(mean_square)
        return torch.where(mean_square <= self.eps, 0.0, (mean_square + self.eps).rsqrt())

    def _seen(self, pos: Sums, neg: Sums) -> tuple[Tensor, Tensor]:
        """Return the share of the weight on positives and the effective number of references, (T, N) each.

        Both are zero for an anchor that sees nothing.
        """
        peak = torch.maximum(pos.peak, neg.peak)
        pos, neg = pos.rescaled(peak), neg.rescaled(peak)
        total = pos.mass + neg.mass
        nothing = total == 0
        effective = total.square() / (pos.square + neg.square)
        return torch.where(nothing, 0.0, pos.mass / total), torch.where(nothing, 0.0, effective)
