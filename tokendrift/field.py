r"""Drift fields: features and their references in, one drift vector an anchor out.

An anchor :math:`h_i` is pulled toward the positives :math:`u_j` (real text) and away from the negatives
:math:`v_k` (generated text). Swapping positives and negatives flips the sign of the drift; that law,
anti-symmetry, is what `tokendrift.testing` checks on any field.

Everything runs without gradient, in float32 or wider, with autocast and TF32 off, and streams over the
references in blocks: memory does not grow with their number beyond the references themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tokendrift._checks import (
    check_choice,
    check_count,
    check_floating,
    check_positive,
    check_same_device,
    check_tensor,
    fail,
)

Kernel = Callable[[Tensor, float], Tensor]
"""Squared distances and temperature to log-weights, elementwise."""


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
    """

    rms: Tensor
    positive_mass: Tensor
    effective_references: Tensor
    pair_weight: Tensor


def gaussian(squared: Tensor, temperature: float) -> Tensor:
    """Log of exp(-d^2 / tau): TokenDrift's kernel, a Gaussian of variance tau/2."""
    return squared / -temperature


def laplace(squared: Tensor, temperature: float) -> Tensor:
    """Log of exp(-d / tau): the kernel of Generative Modeling via Drifting (arXiv 2602.04770), equation 12."""
    return squared.sqrt() / -temperature


KERNELS: dict[str, Kernel] = {"gaussian": gaussian, "laplace": laplace}
NORMALIZATIONS = ("joint", "separate", "two_sided")


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
        temperatures: T, in units of squared distance (of distance for ``laplace``).
        kernel: ``"gaussian"``, ``"laplace"``, or a callable (squared distances, tau) -> log-weights.
        normalization: ``"joint"`` as above. ``"separate"`` normalises each side alone (W+ and W- sum to one).
            ``"two_sided"`` takes the geometric mean of row and column softmax before the cross-weights, as
            Algorithm 2 of arXiv 2602.04770; its columns run over the anchors, so with few anchors it is
            unsafe (with one anchor it only doubles the temperature).
        rms_normalize: Divide each temperature's drift by its RMS over the anchors. Hides equilibrium: the
            normalised drift keeps size 1 where the raw one is sampling noise.
        aggregate: ``"mean"`` over temperatures, or ``"sum"`` as arXiv 2602.04770.
        eps: Added inside the root of s. A temperature with a mean square below eps contributes zero instead of
            amplified rounding.
        block_size: References handled at a time.

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
    block_size: int = 8192

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
        check_count("block_size", self.block_size, least=1)

    def __call__(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        *,
        exclude_positive: Tensor | None = None,
        exclude_negative: Tensor | None = None,
    ) -> Tensor:
        """Return the drift of every anchor.

        Args:
            anchors: Points that drift, (N, M).
            positives: Real features, (P, M), P at least 1.
            negatives: Generated features, (Q, M); Q = 0 gives zero drift.
            exclude_positive: The positive each anchor must not see, int64 (N,), -1 for none.
            exclude_negative: The same for negatives: usually the anchor itself.

        Returns:
            Shape (N, M), float32 or wider, without gradient. Zero for an anchor that sees nothing on one side.
        """
        raw, _ = self.raw(anchors, positives, negatives, exclude_positive, exclude_negative)
        return self.combine(raw)

    def diagnose(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        *,
        exclude_positive: Tensor | None = None,
        exclude_negative: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> tuple[Tensor, FieldDiagnostics]:
        """Return the drift with diagnostics; ``pairs`` int64 (N,) names each anchor's own positive."""
        raw, sums = self.raw(anchors, positives, negatives, exclude_positive, exclude_negative)
        rms = raw.square().sum(-1).mean(-1).sqrt()
        total = sums.mass_pos + sums.mass_neg
        pair_weight = torch.full_like(rms, torch.nan)
        if pairs is not None and exclude_positive is None:
            own = (anchors.to(raw.dtype) - positives[pairs].to(raw.dtype)).square().sum(-1)
            own_log = torch.stack([self._kernel(own, tau) for tau in self.temperatures])
            pair_weight = ((own_log - sums.peak).exp() / sums.mass_pos).mean(-1)
        seen = torch.where(total > 0, sums.mass_pos / total, 0.0)
        effective = torch.where(total > 0, total.square() / sums.square, 0.0)
        return self.combine(raw), FieldDiagnostics(rms, seen.mean(-1), effective.mean(-1), pair_weight)

    @property
    def _kernel(self) -> Kernel:
        return KERNELS[self.kernel] if isinstance(self.kernel, str) else self.kernel

    def combine(self, raw: Tensor) -> Tensor:
        """Return the drift (N, M) from the raw drifts (T, N, M): RMS normalisation, then aggregation."""
        if self.rms_normalize:
            mean_square = raw.square().sum(-1).mean(-1)
            scale = torch.where(mean_square > self.eps, (mean_square + self.eps).rsqrt(), 0.0)
            raw = raw * scale[:, None, None]
        return raw.mean(dim=0) if self.aggregate == "mean" else raw.sum(dim=0)

    @torch.no_grad()
    def raw(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        exclude_positive: Tensor | None = None,
        exclude_negative: Tensor | None = None,
    ) -> tuple[Tensor, Sums]:
        """Return the raw drifts (T, N, M), before RMS normalisation, and the sums they were made from."""
        _check_clouds(anchors, positives, negatives, exclude_positive, exclude_negative)
        dtype = torch.promote_types(anchors.dtype, torch.float32)
        with exact_matmul(anchors.device):
            anchors, positives, negatives = (x.to(dtype) for x in (anchors, positives, negatives))
            # Distances by products cancel badly far from the origin, so all clouds are centred first.
            centre = torch.cat([positives, negatives]).mean(dim=0) if len(negatives) else positives.mean(dim=0)
            anchors = anchors - centre
            sums = Sums.empty(len(self.temperatures), anchors)
            for sign, cloud, excluded in ((1, positives, exclude_positive), (0, negatives, exclude_negative)):
                for start in range(0, len(cloud), self.block_size):
                    block = cloud[start : start + self.block_size] - centre
                    sums = self._absorb(sums, anchors, block, start, excluded, positive=bool(sign))
            return self._drift(sums), sums

    def _absorb(
        self, sums: Sums, anchors: Tensor, block: Tensor, start: int, excluded: Tensor | None, *, positive: bool
    ) -> Sums:
        """Add one block of references to the running sums, rescaling them to the new peak."""
        # Near zero the root of a product-form distance is all rounding, and only the Gaussian takes no root.
        squared = squared_distances(anchors, block, refine=self.kernel != "gaussian")
        logits = torch.stack([self._kernel(squared, tau) for tau in self.temperatures])  # (T, N, b)
        if excluded is not None:
            column = torch.arange(start, start + len(block), device=block.device)
            logits = logits.masked_fill(column == excluded[:, None], -torch.inf)
        row = torch.logaddexp(sums.row, torch.logsumexp(logits, dim=-1))
        if self.normalization == "two_sided":
            columns = torch.logsumexp(logits, dim=1, keepdim=True)
            logits = torch.where(columns.isinf(), -torch.inf, logits - 0.5 * columns)
        peak = torch.maximum(sums.peak, logits.amax(dim=-1))
        anchor_point = torch.where(peak.isinf(), 0.0, peak)  # -inf minus -inf would be NaN
        weights = (logits - anchor_point[..., None]).exp_()
        rescale = (sums.peak - anchor_point).exp()
        mass, moment = weights.sum(-1), weights @ block
        gain_pos, gain_neg = (1, 0) if positive else (0, 1)
        return Sums(
            peak,
            row,
            sums.mass_pos * rescale + gain_pos * mass,
            sums.mass_neg * rescale + gain_neg * mass,
            sums.moment_pos * rescale[..., None] + (moment if positive else 0),
            sums.moment_neg * rescale[..., None] + (0 if positive else moment),
            sums.square * rescale.square() + weights.square().sum(-1),
        )

    def _drift(self, sums: Sums) -> Tensor:
        """Return the raw drifts (T, N, M) from complete sums; zero where one side is empty."""
        _, _, mass_pos, mass_neg, moment_pos, moment_neg, _ = (part[..., None] for part in sums)
        moment_pos, moment_neg = moment_pos[..., 0], moment_neg[..., 0]
        both = (mass_pos > 0) & (mass_neg > 0)
        gap = torch.where(both, moment_pos / mass_pos - moment_neg / mass_neg, 0.0)
        if self.normalization == "separate":
            return gap
        if self.normalization == "joint":
            total = mass_pos + mass_neg
            return torch.where(both, (mass_pos / total) * (mass_neg / total), 0.0) * gap
        shift = (sums.peak - 0.5 * sums.row)[..., None]  # A = exp(logits - column/2 - row/2)
        return torch.where(both, (mass_pos * shift.exp()) * (mass_neg * shift.exp()), 0.0) * gap


class Sums(NamedTuple):
    """Running sums over references for every temperature and anchor, relative to exp(peak).

    ``peak``, ``row`` (log-sum-exp of the kernel), masses and the sum of squared weights are (T, N); moments,
    the weighted sums of references, are (T, N, M).
    """

    peak: Tensor
    row: Tensor
    mass_pos: Tensor
    mass_neg: Tensor
    moment_pos: Tensor
    moment_neg: Tensor
    square: Tensor

    @classmethod
    def empty(cls, temperatures: int, anchors: Tensor) -> Sums:
        """Return sums over no reference."""
        low = anchors.new_full((temperatures, len(anchors)), -torch.inf)
        none, moment = torch.zeros_like(low), anchors.new_zeros(temperatures, *anchors.shape)
        return cls(low, low, none, none, moment, moment, none)


def squared_distances(x: Tensor, y: Tensor, *, refine: bool = False) -> Tensor:
    """Return squared Euclidean distances (N, P) of centred clouds, never below zero.

    One matrix product; ``refine`` computes the few pairs that nearly coincide from their difference.
    """
    size = x.square().sum(-1, keepdim=True) + y.square().sum(-1)
    squared = torch.addmm(size, x, y.T, alpha=-2).clamp_min_(0)
    if refine:
        row, column = (squared < 1e-3 * size).nonzero(as_tuple=True)
        squared[row, column] = (x[row] - y[column]).square().sum(-1)
    return squared


@contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off for a while."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or torch.compiler.is_compiling():
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _check_clouds(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    exclude_positive: Tensor | None,
    exclude_negative: Tensor | None,
) -> None:
    check_floating("anchors", check_tensor("anchors", anchors, ("N", "M")))
    check_floating("positives", check_tensor("positives", positives, ("P", "M")))
    if not isinstance(negatives, Tensor) or negatives.ndim != 2:
        raise fail("negatives must be a tensor of shape (Q, M).", negatives=negatives)
    check_floating("negatives", negatives)
    for name, cloud in (("positives", positives), ("negatives", negatives)):
        if cloud.shape[1] != anchors.shape[1]:
            raise fail(
                f"{name} has width M = {cloud.shape[1]} but anchors have M = {anchors.shape[1]}.",
                "Take all features from one feature map.",
                anchors=anchors,
                **{name: cloud},
            )
    for name, index in (("exclude_positive", exclude_positive), ("exclude_negative", exclude_negative)):
        wrong = not isinstance(index, Tensor) or index.shape != anchors.shape[:1] or index.dtype != torch.int64
        if index is not None and wrong:
            raise fail(
                f"{name} must be int64 of shape (N,): for each anchor the index of one reference, -1 for none.",
                anchors=anchors,
                **{name: index},
            )
    check_same_device(
        "anchors",
        anchors,
        positives=positives,
        negatives=negatives,
        exclude_positive=exclude_positive,
        exclude_negative=exclude_negative,
    )
