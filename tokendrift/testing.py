r"""Laws of drift fields, to be tested on any field with the signature of `tokendrift.field.Field`.

One line checks a field of your own over many drawn clouds::

    from tokendrift.testing import check_field

    def test_my_field_keeps_the_laws():
        check_field(my_field)

Each law is also a plain function, to be called with clouds of your own or from `clouds` inside
``hypothesis.given``. This module needs hypothesis, which is no dependency of the package.

The laws are those under which the drifting loss makes sense (arXiv 2605.19470, appendix C; 2602.04770, section
3): swapped sets give the opposite drift, equal sets give none, and neither the origin, nor the axes, nor the
order of the points matter. Deviations are measured against ``tolerance * max(1, largest drift)``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import check_choice
from tokendrift.field import Field

try:
    from hypothesis import Phase, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("tokendrift.testing needs hypothesis, which is not installed: pip install hypothesis") from error

__all__ = [
    "LAWS",
    "Cloud",
    "assert_antisymmetric",
    "assert_exclusion_is_removal",
    "assert_no_gradient",
    "assert_permutation_equivariant",
    "assert_rotation_equivariant",
    "assert_translation_invariant",
    "assert_well_formed",
    "assert_zero_on_coinciding_sets",
    "check_field",
    "clouds",
]

TOLERANCE = 1e-8  # float64 clouds a hundred units from the origin, at temperatures down to 0.02


class Cloud(NamedTuple):
    """One input of a field: the points, and which reference each anchor must not see.

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


@st.composite
def clouds(
    draw: st.DrawFn,
    *,
    max_anchors: int = 5,
    max_references: int = 8,
    max_width: int = 6,
    offset: float = 100.0,
    masked: bool = True,
) -> Cloud:
    """Draw anchors, positives and negatives that fields tend to trip over.

    One reference or many, P = Q or not, duplicated points, points shared by all three sets, clouds far from
    the origin, clouds wide or narrow against the temperatures, and anchors that stand among the negatives and
    exclude themselves, as in training.

    Args:
        draw: Supplied by hypothesis.
        max_anchors: Largest N.
        max_references: Largest P, and largest Q beside the anchors.
        max_width: Largest M.
        offset: Distance from the origin of the clouds that lie far from it; 0 for none of those.
        masked: Draw exclusions as well. Without them, anchors that stand among the negatives see themselves.

    Returns:
        A strategy of `Cloud`.

    >>> cloud = clouds(max_anchors=2).example()  # doctest: +SKIP
    """
    sizes = st.integers(1, max_anchors), st.integers(1, max_references), st.integers(1, max_references)
    anchor_count, positive_count, negative_count = (draw(size) for size in sizes)
    width = draw(st.integers(1, max_width))
    spread = draw(st.sampled_from((1.0, 0.2, 0.03)))
    shift = draw(st.sampled_from((0.0, offset)))
    # A seed and not single numbers: drawing is fast, and the sizes and flags still shrink.
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))

    def points(count: int) -> Tensor:
        return torch.randn(count, width, generator=generator, dtype=torch.float64) * spread + shift

    anchors, positives, negatives = points(anchor_count), points(positive_count), points(negative_count)
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


def assert_antisymmetric(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    exclude_positive: Tensor | None = None,
    exclude_negative: Tensor | None = None,
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
    forth = field(anchors, positives, negatives, exclude_positive=exclude_positive, exclude_negative=exclude_negative)
    back = field(anchors, negatives, positives, exclude_positive=exclude_negative, exclude_negative=exclude_positive)
    _compare(
        "anti-symmetry V(x; P, N) = -V(x; N, P)",
        forth,
        -back,
        tolerance,
        "positives and negatives do not get the same treatment: a scale or normaliser computed from one of them "
        "only, different factors on attraction and repulsion, or an exclusion applied to a fixed slot.",
    )


def assert_zero_on_coinciding_sets(
    field: Field,
    anchors: Tensor,
    references: Tensor,
    *,
    exclude: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    r"""Assert that nothing moves where positives and negatives are the same set.

    .. math:: V(x;\, Y, Y) = 0

    With an exclusion the law needs it on both sides. On the negatives alone the sets no longer coincide, and the
    drift is rightly not zero: that is the state of training, where the law holds in expectation only.

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
    mirrored = None if exclude is None else torch.where(exclude < 0, -1, len(references) - 1 - exclude)
    drift = field(anchors, references, references.flip(0), exclude_positive=exclude, exclude_negative=mirrored)
    _compare(
        "zero drift on coinciding sets V(x; Y, Y) = 0",
        drift,
        torch.zeros_like(drift),
        tolerance,
        "either the field is not anti-symmetric, or a division by its own size blows rounding up to size one: let "
        "a drift below some eps count as zero (DriftField.eps).",
    )


def assert_translation_invariant(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    shift: Tensor | float = 10.0,
    tolerance: float = TOLERANCE,
    **exclusions: Tensor | None,
) -> None:
    r"""Assert that moving all points together changes nothing: :math:`V(x+c;\, P+c, N+c) = V(x;\, P, N)`.

    Args as in `assert_antisymmetric`, exclusions included; ``shift`` is c, a number or (M,).

    Raises:
        AssertionError: If the law is broken.

    Source: Generative Modeling via Drifting (arXiv 2602.04770), equation 11: the field is a mean of differences.
    """
    _compare(
        "translation invariance V(x + c; P + c, N + c) = V(x; P, N)",
        field(anchors + shift, positives + shift, negatives + shift, **exclusions),
        field(anchors, positives, negatives, **exclusions),
        tolerance,
        "the weights of the positives do not add up to those of the negatives, so the position of the origin enters "
        "(a joint softmax without cross-weights does this), or distances are not taken on centred points.",
    )


def assert_rotation_equivariant(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    rotation: Tensor | None = None,
    tolerance: float = TOLERANCE,
    **exclusions: Tensor | None,
) -> None:
    r"""Assert that turning or mirroring all points turns the drift with them: :math:`V(xR;\, PR, NR) = V(x;\, P, N)R`.

    Args as in `assert_antisymmetric`, exclusions included; ``rotation`` is R, orthogonal (M, M), fixed by default.

    Raises:
        AssertionError: If the law is broken.

    Source: distances are all that a radial kernel sees (arXiv 2605.19470, section 3.3).
    """
    if rotation is None:
        width = anchors.shape[1]
        seed = torch.Generator().manual_seed(width)
        square = torch.randn(width, width, generator=seed, dtype=torch.float64)
        rotation = torch.linalg.qr(square).Q.to(anchors)
    _compare(
        "rotation equivariance V(xR; PR, NR) = V(x; P, N)R",
        field(anchors @ rotation, positives @ rotation, negatives @ rotation, **exclusions),
        field(anchors, positives, negatives, **exclusions) @ rotation.to(anchors),
        tolerance,
        "single coordinates are scaled, clipped or compared. If that is meant, leave this law out: "
        "check_field(field, skip=['rotation_equivariant']).",
    )


def assert_permutation_equivariant(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    exclude_positive: Tensor | None = None,
    exclude_negative: Tensor | None = None,
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

    _compare(
        "permutation equivariance",
        field(
            anchors.roll(1, dims=0),
            positives.flip(0),
            negatives.flip(0),
            exclude_positive=reordered(exclude_positive, len(positives)),
            exclude_negative=reordered(exclude_negative, len(negatives)),
        ),
        field(anchors, positives, negatives, exclude_positive=exclude_positive, exclude_negative=exclude_negative).roll(
            1, dims=0
        ),
        tolerance,
        "rows are matched by position (anchor i with reference i) where only exclude_positive and exclude_negative "
        "may tell which reference belongs to which anchor.",
    )


def assert_exclusion_is_removal(
    field: Field, anchors: Tensor, positives: Tensor, negatives: Tensor, *, tolerance: float = TOLERANCE
) -> None:
    """Assert that a reference which every anchor excludes might as well not be there, and that -1 excludes none.

    Tried on the last positive and the last negative, where at least one other remains.

    Args as in `assert_antisymmetric`.

    Raises:
        AssertionError: If the law is broken.

    Source: arXiv 2605.19470, Algorithm 1: the anchor is removed from its negatives.
    """

    def everyone(index: int) -> Tensor:
        return torch.full(anchors.shape[:1], index, dtype=torch.int64, device=anchors.device)

    none = everyone(-1)
    cases: list[tuple[str, dict[str, Any], Tensor, Tensor]] = [
        ("-1 means none", {"exclude_positive": none, "exclude_negative": none}, positives, negatives)
    ]
    if len(negatives) > 1:
        cases.append(("negatives", {"exclude_negative": everyone(len(negatives) - 1)}, positives, negatives[:-1]))
    if len(positives) > 1:
        cases.append(("positives", {"exclude_positive": everyone(len(positives) - 1)}, positives[:-1], negatives))
    for name, exclusions, fewer_positives, fewer_negatives in cases:
        _compare(
            f"exclusion is removal ({name})",
            field(anchors, positives, negatives, **exclusions),
            field(anchors, fewer_positives, fewer_negatives),
            tolerance,
            "exclude_positive or exclude_negative is ignored, taken for the other side, read at -1 as the last row, "
            "or applied after a normaliser that had already seen the reference.",
        )


def assert_well_formed(
    field: Field, anchors: Tensor, positives: Tensor, negatives: Tensor, **exclusions: Tensor | None
) -> None:
    """Assert one finite drift an anchor, in the dtype of the anchors, also for anchors that see no negative.

    A first training step with one sequence and empty queues is such a case: the only negative is the anchor.

    Args as in `assert_antisymmetric`, exclusions included.

    Raises:
        AssertionError: If shape, dtype, device or values are not as promised.
    """
    drift = field(anchors, positives, negatives, **exclusions)
    if drift.shape != anchors.shape or drift.dtype != anchors.dtype or drift.device != anchors.device:
        raise AssertionError(
            f"the field breaks its form: for anchors {tuple(anchors.shape)} {anchors.dtype} on {anchors.device} it "
            f"returned {tuple(drift.shape)} {drift.dtype} on {drift.device}.\n"
            "  Usual cause: a reduction over the wrong axis, or a conversion inside the field that is not undone."
        )
    hidden = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    alone = field(anchors, positives, negatives[:1], exclude_negative=hidden)
    for case, value in (("", drift), (" where no negative is seen", alone)):
        _compare(
            f"finite drift{case}",
            value,
            value,
            0.0,
            "0 / 0 of weights that all underflowed or are all excluded: work with log-weights and guard empty rows.",
        )


def assert_no_gradient(
    field: Field, anchors: Tensor, positives: Tensor, negatives: Tensor, **exclusions: Tensor | None
) -> None:
    r"""Assert that no gradient flows through the drift and that the inputs are left as they were.

    The target of the loss is :math:`\mathrm{sg}(h + \alpha V)`, and gradients through weights or references would
    turn the drift into another objective.

    Args as in `assert_antisymmetric`, exclusions included.

    Raises:
        AssertionError: If the drift requires grad or an input was written to.

    Source: TokenDrift (arXiv 2605.19470), section 3.3.
    """
    copies = [x.detach().clone().requires_grad_() for x in (anchors, positives, negatives)]
    drift = field(copies[0], copies[1], copies[2], **exclusions)
    if drift.requires_grad:
        raise AssertionError(
            "the field lets gradients through: its drift requires grad.\n"
            "  Usual cause: no torch.no_grad() around the field. The loss detaches its target, so nothing breaks, but "
            "the graph of the weights is built and kept for nothing."
        )
    before = {"anchors": anchors, "positives": positives, "negatives": negatives}
    for (name, value), after in zip(before.items(), copies, strict=True):
        _compare(f"inputs left alone ({name})", after.detach(), value, 0.0, "an in-place operation on an argument.")


def check_field(
    field: Field,
    *,
    strategy: st.SearchStrategy[Cloud] | None = None,
    skip: Collection[str] = (),
    tolerance: float = TOLERANCE,
    max_examples: int = 60,
) -> None:
    """Check all laws on clouds drawn by hypothesis, the same ones in every run.

    Args:
        field: Any callable with the signature of `tokendrift.field.Field`.
        strategy: Where clouds come from; `clouds` by default.
        skip: Names from `LAWS` that the field need not keep.
        tolerance: Largest deviation, times the largest drift where that is above 1. A field that works in
            float32 inside needs about 1e-4.
        max_examples: Number of clouds.

    Raises:
        AssertionError: With the law that is broken, the largest deviation and what usually breaks it. Hypothesis
            adds the smallest cloud it found.
        TokenDriftError: If ``skip`` names no law.

    Source: the laws and their exact conditions follow arXiv 2602.04770, section 3, and 2605.19470, appendix C.

    >>> from tokendrift import DriftField
    >>> check_field(DriftField(), max_examples=5)
    """
    for name in skip:
        check_choice("skip", name, LAWS)

    laws = [name for name in LAWS if name not in skip]
    broken: set[str] = set()

    def note_broken_laws(cloud: Cloud) -> None:
        for name in laws:
            try:
                _CHECKS[name](field, cloud, tolerance)
            except AssertionError:
                broken.add(name)
                return  # without its form, a drift cannot be asked for the other laws

    strategy = clouds() if strategy is None else strategy
    _search(note_broken_laws, strategy, max_examples)
    for name in laws:  # one broken law often breaks others: report the first, on its smallest cloud
        if name in broken:
            _search(lambda cloud: _CHECKS[name](field, cloud, tolerance), strategy, max_examples)  # noqa: B023
            raise AssertionError(f"the field broke the law {name} once and then kept it: does it draw random numbers?")


def _search(check: Callable[[Cloud], None], strategy: st.SearchStrategy[Cloud], max_examples: int) -> None:
    """Run a check over drawn clouds, the same ones every time, and shrink what fails."""
    phases = (Phase.generate, Phase.shrink)

    @settings(max_examples=max_examples, deadline=None, derandomize=True, database=None, phases=phases)
    @given(cloud=strategy)
    def search(cloud: Cloud) -> None:
        check(cloud)

    search()


def _masks(cloud: Cloud) -> dict[str, Any]:
    return {"exclude_positive": cloud.exclude_positive, "exclude_negative": cloud.exclude_negative}


_CHECKS: dict[str, Callable[[Field, Cloud, float], None]] = {
    "well_formed": lambda field, c, tol: assert_well_formed(field, *c[:3], **_masks(c)),
    "no_gradient": lambda field, c, tol: assert_no_gradient(field, *c[:3], **_masks(c)),
    "antisymmetric": lambda field, c, tol: assert_antisymmetric(field, *c[:3], **_masks(c), tolerance=tol),
    "zero_on_coinciding_sets": lambda field, c, tol: assert_zero_on_coinciding_sets(
        field, c.anchors, c.negatives, exclude=c.exclude_negative, tolerance=tol
    ),
    "translation_invariant": lambda field, c, tol: assert_translation_invariant(
        field, *c[:3], **_masks(c), tolerance=tol
    ),
    "rotation_equivariant": lambda field, c, tol: assert_rotation_equivariant(
        field, *c[:3], **_masks(c), tolerance=tol
    ),
    "permutation_equivariant": lambda field, c, tol: assert_permutation_equivariant(
        field, *c[:3], **_masks(c), tolerance=tol
    ),
    "exclusion_is_removal": lambda field, c, tol: assert_exclusion_is_removal(field, *c[:3], tolerance=tol),
}
LAWS: tuple[str, ...] = tuple(_CHECKS)
"""Names of the laws, for the ``skip`` of `check_field`."""


def _compare(law: str, actual: Tensor, expected: Tensor, tolerance: float, cause: str) -> None:
    """Raise AssertionError with law, largest deviation and usual cause where two drifts differ."""
    allowed = tolerance * max(1.0, expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    gap = (actual - expected).abs()
    gap = torch.where(gap.isfinite(), gap, torch.inf)  # inf - inf and NaN are no agreement
    worst = gap.max().item()
    if worst > allowed:
        row = int(gap.amax(dim=1).argmax())
        raise AssertionError(
            f"the field breaks the law: {law}.\n"
            f"  Largest deviation {worst:.3g} at row {row}, allowed {allowed:.3g}.\n"
            f"  Usual cause: {cause}"
        )
