"""Laws about what a field takes and gives: exclusions, finite numbers, no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tokendrift.field import Field
from tokendrift.testing._report import TOLERANCE, Law, compare
from tokendrift.testing.strategies import Cloud

REMOVAL = Law(
    "exclusion is removal ({case})",
    "an anchor meets a reference that it must not see, as a rule itself, and is pushed away from where it is.",
    "exclude_positive or exclude_negative is ignored, taken for the other side, read at -1 as the last row, "
    "or applied after a normaliser that had already seen the reference.",
)
FINITE = Law(
    "finite drift{case}",
    "the first such batch writes NaN into every weight of the model.",
    "0 / 0 of weights that all underflowed or are all excluded: work with log-weights and guard empty rows.",
)
INPUTS = Law(
    "inputs left alone ({case})",
    "features that the loss still needs, or the queues, change under its hands.",
    "an in-place operation on an argument.",
)


def assert_exclusion_is_removal(
    field: Field, anchors: Tensor, positives: Tensor, negatives: Tensor, *, tolerance: float = TOLERANCE
) -> None:
    """Assert that a reference which every anchor excludes has no effect, and that -1 excludes none.

    Tried on the last positive and the last negative, where at least one other remains.

    Args as in `assert_antisymmetric`, without exclusions.

    Raises:
        AssertionError: If the law is broken.

    Source: arXiv 2605.19470, Algorithm 1: the anchor is removed from its negatives.
    """

    def everyone(index: int) -> Tensor:
        return torch.full(anchors.shape[:1], index, dtype=torch.int64, device=anchors.device)

    cases = [("-1 means none", Cloud(anchors, positives, negatives, everyone(-1), everyone(-1)), positives, negatives)]
    if len(negatives) > 1:
        last = everyone(len(negatives) - 1)
        cases.append(("negatives", Cloud(anchors, positives, negatives, None, last), positives, negatives[:-1]))
    if len(positives) > 1:
        last = everyone(len(positives) - 1)
        cases.append(("positives", Cloud(anchors, positives, negatives, last, None), positives[:-1], negatives))
    for case, cloud, fewer_positives, fewer_negatives in cases:
        law = REMOVAL._replace(statement=REMOVAL.statement.format(case=case))
        fewer = Cloud(anchors, fewer_positives, fewer_negatives)
        compare(law, cloud, cloud.drift(field), fewer.drift(field), tolerance)


def assert_well_formed(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    exclude_positive: Tensor | None = None,
    exclude_negative: Tensor | None = None,
) -> None:
    """Assert one finite drift for each anchor, in the dtype of the anchors, also for anchors that see no negative.

    A first training step with one sequence and empty queues is such a case: the only negative is the anchor.

    Args as in `assert_antisymmetric`.

    Raises:
        AssertionError: If shape, dtype, device or values are not as promised.
    """
    cloud = Cloud(anchors, positives, negatives, exclude_positive, exclude_negative)
    drift = cloud.drift(field)
    if drift.shape != anchors.shape or drift.dtype != anchors.dtype or drift.device != anchors.device:
        raise AssertionError(
            f"the field returned a drift of the wrong shape, dtype or device: for anchors {tuple(anchors.shape)} "
            f"{anchors.dtype} on {anchors.device} it returned "
            f"{tuple(drift.shape)} {drift.dtype} on {drift.device}.\n"
            "  What it means: the loss adds the drift to the features, so it must have their shape, dtype and device.\n"
            "  Usual cause: a reduction over the wrong axis, or a conversion inside the field that is not reversed."
        )
    hidden = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    blind = Cloud(anchors, positives, negatives[:1], None, hidden)
    for case, seen, value in (("", cloud, drift), (" where no negative is seen", blind, blind.drift(field))):
        compare(FINITE._replace(statement=FINITE.statement.format(case=case)), seen, value, value, 0.0)


def assert_no_gradient(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    exclude_positive: Tensor | None = None,
    exclude_negative: Tensor | None = None,
) -> None:
    r"""Assert that no gradient flows through the drift and that the inputs are left as they were.

    The target of the loss is :math:`\mathrm{sg}(h + \alpha V)`, and gradients through weights or references would
    turn the drift into another objective.

    Args as in `assert_antisymmetric`.

    Raises:
        AssertionError: If the drift requires grad or an input was written to.

    Source: TokenDrift (arXiv 2605.19470), section 3.3.
    """
    before = Cloud(anchors, positives, negatives, exclude_positive, exclude_negative)
    copies = [points.detach().clone().requires_grad_() for points in before[:3]]
    drift = Cloud(copies[0], copies[1], copies[2], exclude_positive, exclude_negative).drift(field)
    if drift.requires_grad:
        raise AssertionError(
            "the field lets gradients through: its drift requires grad.\n"
            "  What it means: weights and references would be trained along with the features. The loss detaches its "
            "target, so this does not happen, but the graph of the weights is built and kept without need.\n"
            "  Usual cause: no torch.no_grad() around the field."
        )
    for name, value, after in zip(Cloud._fields, before[:3], copies, strict=False):
        law = INPUTS._replace(statement=INPUTS.statement.format(case=name))
        compare(law, before._replace(anchors=value), after.detach(), value, 0.0)
