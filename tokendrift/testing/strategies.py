"""Hypothesis strategies that draw clouds on which drift fields often fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tokendrift.field import Field


class Cloud(NamedTuple):
    """One input of a field: the points, and which reference each anchor must not see. Laws take it as ``*cloud``.

    Attributes:
        anchors: Float64 (N, M).
        positives: Float64 (P, M).
        negatives: Float64 (Q, M).
        exclude_positive: Int64 (N,) with -1 for none, or None.
        exclude_negative: The same for negatives.
    """

    anchors: Tensor
    positives: Tensor
    negatives: Tensor
    exclude_positive: Tensor | None = None
    exclude_negative: Tensor | None = None

    def drift(self, field: Field) -> Tensor:
        """Return the drift that a field gives this cloud."""
        return field(
            self.anchors,
            self.positives,
            self.negatives,
            exclude_positive=self.exclude_positive,
            exclude_negative=self.exclude_negative,
        )


SHAPES = ("ball", "line", "sphere", "outlier", "point")


@st.composite
def clouds(
    draw: st.DrawFn,
    *,
    max_anchors: int = 5,
    max_references: int = 8,
    max_width: int = 6,
    offset: float = 100.0,
    shapes: Sequence[str] = SHAPES,
    masked: bool = True,
) -> Cloud:
    """Draw anchors, positives and negatives on which drift fields often fail.

    One reference or many, P = Q or not, duplicated points, points shared by all three sets, clouds far from
    the origin, clouds wide or narrow against the temperatures, and anchors that stand among the negatives and
    exclude themselves, as in training.

    Args:
        draw: Supplied by hypothesis.
        max_anchors: Largest N.
        max_references: Largest P, and largest Q beside the anchors (one more of either where a point is shared).
        max_width: Largest M.
        offset: Distance from the origin of the clouds that lie far from it; 0 for none of those.
        shapes: Some of ``"ball"``; ``"line"``, all points on one; ``"sphere"``, unit vectors that nearly coincide;
            ``"outlier"``, one positive a thousand times as far away; ``"point"``, all points in one place.
        masked: Draw exclusions as well. Without them, anchors that stand among the negatives see themselves.

    Returns:
        A strategy of `Cloud`.

    >>> cloud = clouds(max_anchors=2).example()  # doctest: +SKIP
    """
    sizes = st.integers(1, max_anchors), st.integers(1, max_references), st.integers(1, max_references)
    anchor_count, positive_count, negative_count = (draw(size) for size in sizes)
    width = draw(st.integers(1, max_width))
    shape = draw(st.sampled_from(shapes))
    spread = draw(st.sampled_from((1.0, 0.2, 0.03)))
    shift = draw(st.sampled_from((0.0, offset)))
    # A seed and not single numbers: drawing is fast, and the sizes and flags still shrink.
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    common = normalize(normal(width), dim=0)

    def points(count: int) -> Tensor:
        if shape == "line":
            return spread * normal(count, 1) * common + shift
        if shape == "point":
            return (spread * common).expand(count, -1) + shift
        if shape == "sphere":
            return normalize(common + 0.25 * spread * normal(count, width), dim=-1) + shift
        return spread * normal(count, width) + shift

    anchors, positives, negatives = points(anchor_count), points(positive_count), points(negative_count)
    if shape == "outlier":
        positives[-1] += 1000 * spread * common
    if draw(st.booleans()):  # points that occur twice, and in both sets
        positives = torch.cat([positives, positives[:1]])
        negatives = torch.cat([negatives, positives[:1]])
    own = draw(st.booleans())
    if own:
        negatives = torch.cat([anchors, negatives])
    exclude_positive = exclude_negative = None
    if masked and own:
        exclude_negative = torch.arange(anchor_count)
    if masked and draw(st.booleans()):
        exclude_positive = torch.randint(-1, len(positives), (anchor_count,), generator=generator)
    return Cloud(anchors, positives, negatives, exclude_positive, exclude_negative)
