"""Laws that follow from the form of a drift field: signs, origin, axes, order."""

from __future__ import annotations

import torch
from torch import Tensor

from tokendrift.field import Field
from tokendrift.testing._report import TOLERANCE, Law, compare
from tokendrift.testing.strategies import Cloud

ANTISYMMETRY = Law(
    "anti-symmetry V(x; P, N) = -V(x; N, P)",
    "real and generated text are not weighed alike, so text goes on drifting where the two agree already.",
    "positives and negatives do not get the same treatment: a scale or normaliser computed from one of them only, "
    "different factors on attraction and repulsion, or an exclusion applied to a fixed slot.",
)
EQUILIBRIUM = Law(
    "equilibrium V(x; Y, Y) = 0",
    "a model that is right already is driven away from where it is.",
    "either the field is not anti-symmetric, or a division by its own size blows rounding up to size one: let "
    "a drift below some eps count as zero (DriftField.eps).",
)
TRANSLATION = Law(
    "translation invariance V(x + c; P + c, N + c) = V(x; P, N)",
    "what features have in common, and pooled hidden states have much, pulls the drift toward the origin or away.",
    "the weights of the positives do not add up to those of the negatives, so the position of the origin enters "
    "(a joint softmax without cross-weights does this), or distances are not taken on centred points.",
)
ROTATION = Law(
    "rotation equivariance V(xR; PR, NR) = V(x; P, N)R",
    "the axes of the feature space, which mean nothing, decide where text drifts.",
    "single coordinates are scaled, clipped or compared. If that is meant, leave this law out: "
    "check_field(field, skip=['rotation_equivariant']).",
)
PERMUTATION = Law(
    "permutation equivariance",
    "what a sequence learns depends on its place in the batch, or on that of others in the queue.",
    "rows are matched by position (anchor i with reference i) where only exclude_positive and exclude_negative "
    "may tell which reference belongs to which anchor.",
)


def assert_antisymmetric(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    exclude_positive: Tensor | None = None,
    exclude_negative: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    r"""Assert that swapping positives and negatives flips the drift.

    .. math:: V(x;\, P, N) = -V(x;\, N, P)

    An exclusion belongs to the block that it points into and travels with it: an anchor that stands among the
    negatives keeps excluding itself when they take the place of the positives.

    Args:
        field: The field under test.
        anchors: Shape (N, M).
        positives: Shape (P, M).
        negatives: Shape (Q, M); Q need not equal P.
        exclude_positive: Int64 (N,), -1 for none.
        exclude_negative: The same for negatives.
        tolerance: Largest deviation, times the largest drift where that is above 1.

    Raises:
        AssertionError: If the law is broken.

    Source: Generative Modeling via Drifting (arXiv 2602.04770), proposition 3.1.
    """
    cloud = Cloud(anchors, positives, negatives, exclude_positive, exclude_negative)
    swapped = Cloud(anchors, negatives, positives, exclude_negative, exclude_positive)
    compare(ANTISYMMETRY, cloud, cloud.drift(field), -swapped.drift(field), tolerance)


def assert_equilibrium(
    field: Field,
    anchors: Tensor,
    references: Tensor,
    exclude: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    r"""Assert that nothing moves where positives and negatives are the same set.

    .. math:: V(x;\, Y, Y) = 0

    With an exclusion the law needs it on both sides. On the negatives alone the sets no longer coincide, and the
    drift is rightly not zero: that is the state of training, where the law holds in expectation only
    (`assert_unbiased_at_equilibrium`).

    Args:
        field: The field under test.
        anchors: Shape (N, M).
        references: Y, shape (P, M); the negatives are the same points in the opposite order.
        exclude: Int64 (N,): the reference that each anchor must not see on either side, -1 for none.
        tolerance: As in `assert_antisymmetric`.

    Raises:
        AssertionError: If the law is broken.

    Source: Generative Modeling via Drifting (arXiv 2602.04770), proposition 3.1.
    """
    negatives = references.flip(0)
    mirrored = None if exclude is None else torch.where(exclude < 0, -1, len(references) - 1 - exclude)
    cloud = Cloud(anchors, references, negatives, exclude, mirrored)
    drift = cloud.drift(field)
    compare(EQUILIBRIUM, cloud, drift, torch.zeros_like(drift), tolerance)


def assert_translation_invariant(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    exclude_positive: Tensor | None = None,
    exclude_negative: Tensor | None = None,
    *,
    shift: Tensor | float = 10.0,
    tolerance: float = TOLERANCE,
) -> None:
    r"""Assert that moving all points together changes nothing: :math:`V(x+c;\, P+c, N+c) = V(x;\, P, N)`.

    Args as in `assert_antisymmetric`; ``shift`` is c, a number or (M,).

    Raises:
        AssertionError: If the law is broken.

    Source: Generative Modeling via Drifting (arXiv 2602.04770), equation 11: the field is a mean of differences.
    """
    cloud = Cloud(anchors, positives, negatives, exclude_positive, exclude_negative)
    moved = Cloud(anchors + shift, positives + shift, negatives + shift, exclude_positive, exclude_negative)
    compare(TRANSLATION, moved, moved.drift(field), cloud.drift(field), tolerance)


def assert_rotation_equivariant(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    exclude_positive: Tensor | None = None,
    exclude_negative: Tensor | None = None,
    *,
    rotation: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    r"""Assert that turning or mirroring all points turns the drift with them: :math:`V(xR;\, PR, NR) = V(x;\, P, N)R`.

    Args as in `assert_antisymmetric`; ``rotation`` is R, orthogonal (M, M), fixed by default.

    Raises:
        AssertionError: If the law is broken.

    Source: distances are all that a radial kernel sees (arXiv 2605.19470, section 3.3).
    """
    if rotation is None:
        width = anchors.shape[1]
        seed = torch.Generator().manual_seed(width)
        rotation = torch.linalg.qr(torch.randn(width, width, generator=seed, dtype=torch.float64)).Q
    rotation = rotation.to(anchors)
    cloud = Cloud(anchors, positives, negatives, exclude_positive, exclude_negative)
    turned = cloud._replace(anchors=anchors @ rotation, positives=positives @ rotation, negatives=negatives @ rotation)
    compare(ROTATION, turned, turned.drift(field), cloud.drift(field) @ rotation, tolerance)


def assert_permutation_equivariant(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    exclude_positive: Tensor | None = None,
    exclude_negative: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Assert that reordered anchors give reordered drifts, and that the order of the references does not matter.

    Anchors are rolled by one and both reference sets reversed; exclusions follow their points.

    Args as in `assert_antisymmetric`.

    Raises:
        AssertionError: If the law is broken.

    Source: positives and negatives are sets, anchors a batch (arXiv 2605.19470, Algorithm 1).
    """

    def reordered(exclude: Tensor | None, count: int) -> Tensor | None:
        return None if exclude is None else torch.where(exclude < 0, -1, count - 1 - exclude).roll(1)

    cloud = Cloud(anchors, positives, negatives, exclude_positive, exclude_negative)
    other = Cloud(
        anchors.roll(1, dims=0),
        positives.flip(0),
        negatives.flip(0),
        reordered(exclude_positive, len(positives)),
        reordered(exclude_negative, len(negatives)),
    )
    compare(PERMUTATION, other, other.drift(field), cloud.drift(field).roll(1, dims=0), tolerance)
