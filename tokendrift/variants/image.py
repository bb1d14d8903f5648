"""The field of Generative Modeling via Drifting as its published code runs it, for comparisons with that code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendrift._checks import check_clouds, check_temperatures
from tokendrift.kernels import exact_matmul, squared_distances


@dataclass(frozen=True)
class ImageDriftField:
    r"""Algorithm 2 of arXiv 2602.04770 with everything that its official code adds.

    What ``ExtendedDriftField(kernel="laplace", normalization="two_sided", feature_scaling=True, aggregate="sum")``
    leaves out, because it hides an anchor less than fully or depends on the number of references:

    * the product of row and column softmax is at least 1e-6, so that every weight is at least 1e-3;
    * an excluded reference is 100 mean distances further away instead of absent, and counts in the mean distance;
    * weights of references are multiplied after the softmax instead of counting as copies;
    * the RMS is over single coordinates of features that are a root of M apart on average.

    The whole matrix of weights is held: meant for hundreds of references.

    Attributes:
        temperatures: T, in mean distances.

    Raises:
        TokenDriftError: If temperatures, shapes, dtypes or devices are wrong.

    Source: github.com/lambertae/drifting, ``drift_loss.py``.
    """

    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", check_temperatures(self.temperatures, symbol="each R"))

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
        """Return the drift of every anchor, (N, M); arguments as for `DriftField`."""
        raw, unit = self.raw(
            anchors, positives, negatives, exclude_positive, exclude_negative, positive_weights, negative_weights
        )
        mean_square = raw.square().mean(dim=(1, 2), keepdim=True).clamp_min(1e-8)
        return (raw / mean_square.sqrt()).sum(dim=0) * unit

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
    ) -> tuple[Tensor, Tensor]:
        """Return the raw drifts (T, N, M) of features in units of S, and S, the mean distance over the root of M."""
        check_clouds(
            anchors, positives, negatives, exclude_positive, exclude_negative, positive_weights, negative_weights
        )
        x = anchors.to(torch.promote_types(anchors.dtype, torch.float32))
        y = torch.cat([negatives.to(x), positives.to(x)])
        weight, far = x.new_ones(len(y)), x.new_zeros(len(x), len(y))
        for first, side, own, hidden in (
            (0, negatives, negative_weights, exclude_negative),
            (len(negatives), positives, positive_weights, exclude_positive),
        ):
            block = slice(first, first + len(side))
            if own is not None:
                weight[block] = own.to(x)
            if hidden is not None:
                far[:, block] = (torch.arange(len(side), device=x.device) == hidden[:, None]).to(x)
        with exact_matmul(x.device):
            # 1. Distances and their mean, from centred clouds.
            centre = y.mean(dim=0)
            x, y = x - centre, y - centre
            distances = squared_distances(x, y, refine=True).clamp_min(1e-8).sqrt()
            mean = ((distances * weight).sum() / (weight.sum() * len(x))).clamp_min(1e-3)
            unit = mean / x.shape[1] ** 0.5
            x, y = x / unit, y / unit
            drifts = []
            # 2. For each temperature, the geometric mean of row and column softmax, and its cross-weights.
            for temperature in self.temperatures:
                logits = -(distances / mean + 100 * far) / temperature
                affinity = (logits.softmax(dim=1) * logits.softmax(dim=0)).clamp_min(1e-6).sqrt() * weight
                minus, plus = affinity.split([len(negatives), len(positives)], dim=1)
                cross = torch.cat(
                    [-minus * plus.sum(dim=1, keepdim=True), plus * minus.sum(dim=1, keepdim=True)], dim=1
                )
                drifts.append(cross @ y - cross.sum(dim=1, keepdim=True) * x)
        return torch.stack(drifts), unit
