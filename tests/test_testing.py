"""The law assertions that users import: they pass on fields that keep the laws and name the law that is broken."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import find, given

from tokendrift import DriftField, TokenDriftError
from tokendrift.testing import LAWS, assert_antisymmetric, assert_zero_on_coinciding_sets, check_field, clouds


def separate(anchors, positives, negatives, *, exclude_positive=None, exclude_negative=None, parts=False):
    """A field of a user's own, in plain torch: softmax attraction minus softmax repulsion, never NaN."""

    def pull(references, exclude):
        logits = -(anchors[:, None] - references).square().sum(-1)
        if exclude is not None:
            logits = logits.masked_fill(torch.arange(len(references)) == exclude[:, None], -torch.inf)
        blind = logits.isinf().all(1, keepdim=True)
        return torch.where(blind, 0.0, logits).softmax(1), blind

    with torch.no_grad():
        attraction, no_positive = pull(positives, exclude_positive)
        repulsion, no_negative = pull(negatives, exclude_negative)
        if parts:
            return attraction, repulsion
        return torch.where(no_positive | no_negative, 0.0, attraction @ positives - repulsion @ negatives)


def test_a_field_of_the_users_own_that_keeps_the_laws_passes():
    check_field(separate)


def test_the_fields_of_the_package_pass():
    check_field(DriftField())


# ------------------------------------------------------------------------------------------------ broken fields


def unequal_factors(anchors, positives, negatives, **options):
    attraction, repulsion = separate(anchors, positives, negatives, parts=True, **options)
    return (1.5 * attraction @ positives - repulsion @ negatives - 0.5 * anchors).detach()


def positives_set_the_scale(anchors, positives, negatives, **options):
    return separate(anchors, positives, negatives, **options) / (1 + positives.detach().std(correction=0))


def size_one_always(anchors, positives, negatives, **options):
    drift = separate(anchors, positives, negatives, **options)
    return torch.where(drift == 0, 0.0, drift / drift.norm(dim=-1, keepdim=True))


@torch.no_grad()
def no_cross_weights(anchors, positives, negatives, *, exclude_positive=None, exclude_negative=None):
    logits = -(anchors[:, None] - torch.cat([positives, negatives])).square().sum(-1)
    for start, exclude in (
        (0, exclude_positive),
        (len(positives), exclude_negative),
    ):
        if exclude is not None:
            column = torch.arange(logits.shape[1])
            logits = logits.masked_fill((column == exclude[:, None] + start) & (exclude[:, None] >= 0), -torch.inf)
    weights = logits.softmax(1)
    split = len(positives)
    plus, minus = weights[:, :split], weights[:, split:]
    seen = (plus.sum(1, keepdim=True) > 0) & (minus.sum(1, keepdim=True) > 0)
    return torch.where(seen, plus @ positives - minus @ negatives, 0.0)


def coordinates_clipped(anchors, positives, negatives, **options):
    return separate(anchors, positives, negatives, **options).clamp(-0.1, 0.1)


def paired_by_row(anchors, positives, negatives, **options):
    drift = separate(anchors, positives, negatives, **options).clone()
    drift[0] *= 2
    return drift


def deaf_to_exclusions(anchors, positives, negatives, **_):
    return separate(anchors, positives, negatives)


def last_row_for_none(anchors, positives, negatives, *, exclude_positive=None, exclude_negative=None):
    def from_the_end(exclude, cloud):
        return None if exclude is None else exclude % len(cloud)

    return separate(
        anchors,
        positives,
        negatives,
        exclude_positive=from_the_end(exclude_positive, positives),
        exclude_negative=from_the_end(exclude_negative, negatives),
    )


def mask_in_a_fixed_slot(anchors, positives, negatives, *, exclude_positive=None, exclude_negative=None):
    return separate(anchors, positives, negatives, exclude_negative=exclude_negative)


def not_a_number_without_negatives(anchors, positives, negatives, **options):
    attraction, repulsion = separate(anchors, positives, negatives, parts=True, **options)
    drift = attraction @ positives - repulsion @ negatives
    hidden = options.get("exclude_negative")
    return drift * torch.nan if hidden is not None and len(negatives) == 1 else drift


def one_number_an_anchor(anchors, positives, negatives, **options):
    return separate(anchors, positives, negatives, **options).norm(dim=-1)


def computed_in_float32(anchors, positives, negatives, **options):
    return separate(anchors.float(), positives.float(), negatives.float(), **options)


def with_a_graph(anchors, positives, negatives, **options):
    return separate(anchors, positives, negatives, **options) + 0 * anchors


def writes_to_its_input(anchors, positives, negatives, **options):
    drift = separate(anchors, positives, negatives, **options)
    positives.data.mul_(2)
    return drift


@pytest.mark.parametrize(
    ("field", "law", "deviation"),
    [
        (unequal_factors, "anti-symmetry", True),
        (positives_set_the_scale, "anti-symmetry", True),
        (mask_in_a_fixed_slot, "anti-symmetry", True),
        (size_one_always, "zero drift on coinciding sets", True),
        (no_cross_weights, "translation invariance", True),
        (coordinates_clipped, "rotation equivariance", True),
        (paired_by_row, "permutation equivariance", True),
        (deaf_to_exclusions, r"exclusion is removal \((posi|nega)tives\)", True),
        (last_row_for_none, "permutation equivariance", True),
        (not_a_number_without_negatives, "finite drift where no negative is seen", True),
        (one_number_an_anchor, "breaks its form", False),
        (computed_in_float32, "breaks its form", False),
        (with_a_graph, "lets gradients through", False),
        (writes_to_its_input, "inputs left alone", True),
    ],
)
def test_a_broken_law_is_named_with_its_deviation_and_its_usual_cause(field, law, deviation):
    with pytest.raises(AssertionError, match=law) as caught:
        check_field(field)
    message = str(caught.value)
    assert "Usual cause: " in message
    assert not deviation or "Largest deviation " in message


def test_the_message_tells_how_far_the_law_was_missed():
    anchors, positives, negatives = torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(2, 1)
    field = lambda *_, **__: torch.tensor([[0.25]])  # noqa: E731
    with pytest.raises(AssertionError) as caught:
        assert_antisymmetric(field, anchors, positives, negatives)
    assert "anti-symmetry V(x; P, N) = -V(x; N, P)" in str(caught.value)
    assert "Largest deviation 0.5 at row 0, allowed 1e-08" in str(caught.value)


def test_a_field_that_draws_random_numbers_is_found_out():
    tosses = iter([True, True])

    def sometimes_wrong(anchors, positives, negatives, **options):
        return separate(anchors, positives, negatives, **options) + next(tosses, False)

    with pytest.raises(AssertionError, match="once and then kept it: does it draw random numbers"):
        check_field(sometimes_wrong, skip=["well_formed", "no_gradient"])


def test_a_law_that_is_not_meant_can_be_left_out():
    with pytest.raises(AssertionError, match="rotation equivariance"):
        check_field(coordinates_clipped)
    check_field(coordinates_clipped, skip=["rotation_equivariant"])


def test_leaving_out_what_is_no_law_is_refused():
    with pytest.raises(TokenDriftError, match=r"skip must be one of 'well_formed'[\s\S]*got skip str 'symmetric'"):
        check_field(separate, skip=["symmetric"])
    assert len(set(LAWS)) == 8


def test_a_field_that_rounds_inside_passes_with_its_own_tolerance():
    def rounded(*points, **options):
        return separate(*(x.float() for x in points), **options).double()

    with pytest.raises(AssertionError):
        check_field(rounded, strategy=clouds(offset=10.0))
    check_field(rounded, strategy=clouds(offset=10.0), tolerance=1e-3)


def test_coinciding_sets_need_the_mask_on_both_sides():
    points, own = torch.randn(4, 2, dtype=torch.float64), torch.arange(4)
    assert_zero_on_coinciding_sets(DriftField(), points, points, exclude=own)
    with pytest.raises(AssertionError, match="zero drift on coinciding sets"):
        assert_zero_on_coinciding_sets(
            lambda x, p, n, exclude_positive, exclude_negative: DriftField()(
                x, p, n, exclude_negative=exclude_negative
            ),
            points,
            points,
            exclude=own,
        )


# ------------------------------------------------------------------------------------------------ clouds


@pytest.mark.parametrize(
    "kind",
    [
        lambda cloud: len(cloud.positives) == 1,
        lambda cloud: len(cloud.positives) < len(cloud.negatives),
        lambda cloud: len(cloud.positives) > len(cloud.negatives),
        lambda cloud: len(cloud.anchors) == 1,
        lambda cloud: cloud.positives.unique(dim=0).shape != cloud.positives.shape,
        lambda cloud: cloud.anchors.abs().min() > 50,
        lambda cloud: cloud.anchors.abs().max() < 5,
        lambda cloud: cloud.exclude_negative is not None and torch.equal(cloud.negatives[:1], cloud.anchors[:1]),
        lambda cloud: cloud.exclude_positive is not None and (cloud.exclude_positive == -1).any(),
    ],
)
def test_clouds_hold_every_kind_of_trouble(kind):
    find(clouds(), kind)


@given(cloud=clouds(max_anchors=3, max_references=4, max_width=2, masked=False))
def test_clouds_keep_to_their_limits(cloud):
    assert len(cloud.anchors) <= 3
    assert len(cloud.positives) <= 5  # and a duplicate
    assert len(cloud.negatives) <= 3 + 5
    assert cloud.anchors.shape[1] == cloud.positives.shape[1] == cloud.negatives.shape[1] <= 2
    assert {x.dtype for x in cloud[:3]} == {torch.float64}
    assert cloud.exclude_positive is None
    assert cloud.exclude_negative is None


def test_without_hypothesis_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import tokendrift\n"
        "try:\n    import tokendrift.testing\n"
        "except ImportError as error:\n    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "tokendrift.testing needs hypothesis, which is not installed: pip install hypothesis\n"
