"""The law assertions that users import: they pass on fields that keep the laws and name the law that is broken."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from forked import run_code
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from tokendrift import DriftField, TokenDriftError, barycentres
from tokendrift.testing import (
    LAWS,
    POTENTIALS,
    Cloud,
    assert_antisymmetric,
    assert_equilibrium,
    assert_score_identity,
    assert_unbiased_at_equilibrium,
    check_field,
    clouds,
)
from tokendrift.variants import ImageDriftField

PAGE = Path(__file__).parents[1] / "docs" / "api" / "testing.md"


def one_cloud(anchors):
    return st.just(Cloud(anchors, anchors + 1, anchors - 1))


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
        (size_one_always, "equilibrium", True),
        (no_cross_weights, "translation invariance", True),
        (coordinates_clipped, "rotation equivariance", True),
        (paired_by_row, "permutation equivariance", True),
        (deaf_to_exclusions, r"exclusion is removal \((posi|nega)tives\)", True),
        (last_row_for_none, "permutation equivariance", True),
        (not_a_number_without_negatives, "finite drift where no negative is seen", True),
        (one_number_an_anchor, "returned a drift of the wrong shape, dtype or device", False),
        (computed_in_float32, "returned a drift of the wrong shape, dtype or device", False),
        (with_a_graph, "lets gradients through", False),
        (writes_to_its_input, "inputs left alone", True),
    ],
)
def test_a_broken_law_is_named_with_its_deviation_and_its_usual_cause(field, law, deviation):
    with pytest.raises(AssertionError, match=law) as caught:
        check_field(field, max_examples=20)
    message = str(caught.value)
    assert "What it means: " in message
    assert "Usual cause: " in message
    assert not deviation or "Largest deviation " in message


def test_the_message_shows_the_worst_case_and_what_it_means():
    anchors, positives, negatives = torch.tensor([[0.0], [7.0]]), torch.ones(1, 1), torch.zeros(3, 1)
    field = lambda *_, **__: torch.tensor([[0.0], [0.25]])  # noqa: E731
    with pytest.raises(AssertionError) as caught:
        assert_antisymmetric(field, anchors, positives, negatives)
    lines = str(caught.value).splitlines()
    assert lines[:4] == [
        "the field breaks the law: anti-symmetry V(x; P, N) = -V(x; N, P).",
        "  Worst case: row 1 of N = 2 anchors, P = 1, Q = 3, width M = 1, anchor at (7)",
        "    drift (0.25), the law asks for (-0.25)",
        "  Largest deviation 0.5, allowed 1e-08.",
    ]
    assert lines[4].startswith("  What it means: ")
    assert lines[5].startswith("  Usual cause: ")
    assert len(lines) == 6


def test_a_drift_that_is_no_number_is_shown_as_it_is():
    field = lambda x, *_, **__: x * torch.tensor([1.0] + [torch.nan] * 5)  # noqa: E731
    with pytest.raises(AssertionError, match=r"drift \(1, nan, nan, nan, \.\.\.\), the law asks for finite numbers"):
        check_field(field, strategy=one_cloud(torch.ones(1, 6)))


def test_a_field_that_draws_random_numbers_is_found_out():
    tosses = iter([True, True])

    def sometimes_wrong(anchors, positives, negatives, **options):
        return separate(anchors, positives, negatives, **options) + next(tosses, False)

    with pytest.raises(AssertionError, match="once and then kept it: does it draw random numbers"):
        check_field(sometimes_wrong, skip=["well_formed", "no_gradient"], max_examples=5)


def test_a_law_that_is_not_meant_can_be_left_out():
    """With it, the clipped coordinates are found out, see above."""
    check_field(coordinates_clipped, skip=["rotation_equivariant"], max_examples=20)


def test_leaving_out_what_is_no_law_is_refused():
    with pytest.raises(TokenDriftError, match=r"skip must be one of 'well_formed'[\s\S]*got skip str 'symmetric'"):
        check_field(separate, skip=["symmetric"])
    assert len(set(LAWS)) == 8


def test_a_field_that_rounds_inside_passes_with_its_own_tolerance():
    def rounded(*points, **options):
        return separate(*(x.float() for x in points), **options).double()

    with pytest.raises(AssertionError):
        check_field(rounded, strategy=clouds(offset=10.0), max_examples=20)
    check_field(rounded, strategy=clouds(offset=10.0), tolerance=1e-3, max_examples=20)


def test_coinciding_sets_need_the_mask_on_both_sides():
    points, own = torch.randn(4, 2, dtype=torch.float64), torch.arange(4)
    assert_equilibrium(DriftField(), points, points, exclude=own)
    with pytest.raises(AssertionError, match="equilibrium"):
        assert_equilibrium(
            lambda x, p, n, exclude_positive, exclude_negative: DriftField()(
                x, p, n, exclude_negative=exclude_negative
            ),
            points,
            points,
            exclude=own,
        )


# ------------------------------------------------------------------------------- mutations of our own field

RAW = {"temperatures": (0.5,), "rms_normalize": False}
SEPARATE = RAW | {"normalization": "separate"}


def mask_left_in_the_negative_slot(anchors, positives, negatives, *, exclude_positive=None, exclude_negative=None):
    return DriftField()(anchors, positives, negatives, exclude_negative=exclude_negative)


def scale_from_the_positives_alone(anchors, positives, negatives, **options):
    unit = torch.cdist(anchors, positives).mean().clamp_min(1e-3)
    return unit * DriftField()(anchors / unit, positives / unit, negatives / unit, **options)


def temperatures_that_differ_by_side(*points, **options):
    pull = DriftField(**SEPARATE, repulsion=0.0)(*points, **options)
    return pull + DriftField(**(SEPARATE | {"temperatures": (0.6,)}), attraction=0.0)(*points, **options)


class NaiveJoint(DriftField):
    """W = A: the softmax over both sides, without cross-weights."""

    power = 0, 0

    def _drift(self, view, pos, neg):
        _, sums = super()._drift(view, pos, neg)
        total = pos.mass + neg.mass
        pull, push = (
            (side.moment + side.mass[..., None] * view.centre) / total[..., None] * (other.mass / total)[..., None] ** k
            for side, other, k in ((pos, neg, self.power[0]), (neg, pos, self.power[1]))
        )
        seen = ((pos.mass > 0) & (neg.mass > 0))[..., None]
        return torch.where(seen, pull - push, 0.0), sums


class OneSidedCross(NaiveJoint):
    """W+ = A+ * sum A-, but W- = A-."""

    power = 1, 0


def projected_to_the_sphere(anchors, *references, **options):
    drift, up = DriftField()(anchors, *references, **options), normalize(anchors, dim=-1)
    return drift - (drift * up).sum(-1, keepdim=True) * up


def an_rms_for_each_coordinate(*points, **options):
    drift = DriftField(**RAW)(*points, **options)
    return drift / drift.square().mean(dim=0).add(1e-12).sqrt()


def axes_brought_to_unit_spread(anchors, positives, negatives, **options):
    unit = torch.cat([positives, negatives]).std(dim=0).clamp_min(1e-3)
    return unit * DriftField()(anchors / unit, positives / unit, negatives / unit, **options)


def with_distances(function):
    def field(*points, **options):
        with patch.object(barycentres, "squared_distances", function):
            return DriftField()(*points, **options)

    return field


def city_block(x, y, **_):
    return torch.cdist(x, y, p=1.0).square()


def asymmetric(x, y, **_):
    """References ahead on the first axis weigh less: k(x, y) is not k(y, x)."""
    return torch.cdist(x, y).square() + (y[:, 0] - x[:, :1]).clamp_min(0)


def row_number_for_exclusion(anchors, positives, negatives, **_):
    own = torch.arange(len(anchors))
    return DriftField()(anchors, positives, negatives, exclude_negative=torch.where(own < len(negatives), own, -1))


def a_scale_that_runs_along_the_batch(anchors, positives, negatives, **options):
    drift = DriftField(**RAW)(anchors, positives, negatives, **options)
    size = drift.square().sum(-1).cumsum(0) / torch.arange(1, len(drift) + 1)
    return drift / size.add(1e-12).sqrt()[:, None]


def exclusions_ignored(anchors, positives, negatives, **_):
    return DriftField(**RAW)(anchors, positives, negatives)


def no_exclusion_read_as_the_last(anchors, positives, negatives, *, exclude_positive=None, exclude_negative=None):
    sides = {"exclude_positive": (exclude_positive, positives), "exclude_negative": (exclude_negative, negatives)}
    read = {name: None if index is None else index % len(cloud) for name, (index, cloud) in sides.items()}
    return DriftField()(anchors, positives, negatives, **read)


def weights_without_logarithms(anchors, positives, negatives, **options):
    drift = DriftField((1e-3,))(anchors, positives, negatives, **options)
    mass = (-torch.cdist(anchors, positives).square() / 1e-3).exp().sum(1, keepdim=True)
    return drift * (mass / mass)


def drift_in_single_precision(*points, **options):
    return DriftField()(*points, **options).float()


def graph_of_the_anchors_kept(anchors, *references, **options):
    return anchors + DriftField()(anchors, *references, **options) - anchors.detach()


def centred_in_place(anchors, positives, negatives, **options):
    for points in (anchors, positives, negatives):
        points.data -= 1.0
    return DriftField()(anchors, positives, negatives, **options)


def anchors_among_the_positives(anchors, positives, negatives, **options):
    return DriftField(**RAW)(anchors, torch.cat([anchors, positives]), negatives, **options)


# Law, what is wrong with the field, the field.
MUTATIONS = [
    ("antisymmetric", "exclusion applied to the wrong side", mask_left_in_the_negative_slot),
    ("antisymmetric", "attraction 1.5 times as strong as repulsion", DriftField(attraction=1.5)),
    ("antisymmetric", "scale computed from the positives alone", scale_from_the_positives_alone),
    ("antisymmetric", "different temperatures for the two sides", temperatures_that_differ_by_side),
    ("antisymmetric", "cross-weights on one side only", OneSidedCross()),
    ("equilibrium", "repulsion alone", DriftField(attraction=0.0)),
    ("equilibrium", "RMS without an epsilon", DriftField(eps=1e-300)),
    ("translation_invariant", "no cross-weights", NaiveJoint()),
    ("translation_invariant", "drift projected to the unit sphere", projected_to_the_sphere),
    ("rotation_equivariant", "a separate RMS for each coordinate", an_rms_for_each_coordinate),
    ("rotation_equivariant", "coordinates scaled to unit variance", axes_brought_to_unit_spread),
    ("rotation_equivariant", "city-block distance", with_distances(city_block)),
    ("rotation_equivariant", "an anisotropic kernel", with_distances(asymmetric)),
    ("permutation_equivariant", "row numbers used as exclusions", row_number_for_exclusion),
    ("permutation_equivariant", "a scale that changes along the batch", a_scale_that_runs_along_the_batch),
    ("exclusion_is_removal", "exclusions ignored", exclusions_ignored),
    ("exclusion_is_removal", "-1 interpreted as the last reference", no_exclusion_read_as_the_last),
    ("exclusion_is_removal", "exclusion by adding a large finite distance", ImageDriftField()),
    ("well_formed", "weights computed without logarithms", weights_without_logarithms),
    ("well_formed", "a float32 drift for float64 anchors", drift_in_single_precision),
    ("no_gradient", "a drift with a gradient to the anchors", graph_of_the_anchors_kept),
    ("no_gradient", "inputs modified in place", centred_in_place),
    ("score_identity", "temperature with the wrong sign", DriftField(**SEPARATE, kernel=lambda d2, tau: d2 / tau)),
    ("score_identity", "tau used as the variance", DriftField(**SEPARATE, kernel=lambda d2, tau: -d2 / (2 * tau))),
    ("score_identity", "distance used instead of its square", DriftField(**SEPARATE, kernel="laplace")),
    ("score_identity", "weights of the joint form", DriftField(**RAW)),
    ("score_identity", "division by the RMS", DriftField(**(SEPARATE | {"rms_normalize": True}))),
    ("unbiased_at_equilibrium", "exclusions ignored", exclusions_ignored),
    ("unbiased_at_equilibrium", "each side normalised by itself with unequal P and Q", DriftField(**SEPARATE)),
    ("unbiased_at_equilibrium", "no cross-weights", NaiveJoint(**RAW)),
    ("unbiased_at_equilibrium", "anchors among the positives", anchors_among_the_positives),
]


def check_law(law, field, draws=400):
    if law == "score_identity":
        points = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert_score_identity(field, *points, temperature=0.5)
    elif law == "unbiased_at_equilibrium":
        assert_unbiased_at_equilibrium(field, draws=draws)
    else:
        check_field(field, skip=[name for name in LAWS if name != law], max_examples=15)


STATEMENTS = {
    "antisymmetric": "anti-symmetry V(x; P, N) = -V(x; N, P)",
    "equilibrium": "equilibrium V(x; Y, Y) = 0",
    "translation_invariant": "translation invariance",
    "rotation_equivariant": "rotation equivariance",
    "permutation_equivariant": "permutation equivariance",
    "exclusion_is_removal": "exclusion is removal",
    "well_formed": "(finite drift|returned a drift of the wrong shape, dtype or device)",
    "no_gradient": "(lets gradients through|inputs left alone)",
    "score_identity": "score identity V = grad log_ratio",
    "unbiased_at_equilibrium": "no bias at equilibrium, E V = 0 at p = q",
}


@pytest.mark.parametrize(("law", "mutation", "field"), MUTATIONS, ids=lambda value: value if type(value) is str else "")
def test_each_mutation_of_our_field_is_caught_by_the_law_that_names_it(law, mutation, field):
    statement = STATEMENTS[law] if law in ("well_formed", "no_gradient") else re.escape(STATEMENTS[law])
    with pytest.raises(AssertionError, match=statement) as caught:
        check_law(law, field, draws=150)
    assert "What it means: " in str(caught.value)


@pytest.mark.parametrize("law", STATEMENTS)
def test_without_a_mutation_our_field_keeps_the_law(law):
    options = {"score_identity": SEPARATE, "unbiased_at_equilibrium": RAW}
    check_law(law, DriftField(**options.get(law, {})))


def test_the_manual_lists_exactly_these_laws_and_mutations():
    rows = re.findall(r"^\| `assert_(\w+)` \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    listed = [(law, mutation) for law, cell in rows for mutation in cell.split("; ")]
    assert sorted(listed) == sorted((law, mutation) for law, mutation, _ in MUTATIONS)
    assert {law for law, _ in rows} == set(LAWS) | {"score_identity", "unbiased_at_equilibrium"}


# ------------------------------------------------------------------------------------------------ claims


@pytest.mark.parametrize(("normalization", "potential"), [("separate", "log_ratio"), ("joint", "discriminator")])
@given(cloud=clouds(masked=False))
@settings(max_examples=10)
def test_the_gaussian_forms_climb_their_potentials(normalization, potential, cloud):
    field = DriftField((0.2,), normalization=normalization, rms_normalize=False)
    assert_score_identity(field, *cloud[:3], temperature=0.2, potential=potential)


def test_a_potential_of_the_users_own_is_climbed_or_not():
    points = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def height(x, positives, negatives):
        return sum(sign * (-torch.cdist(x, y)).exp().mean(1) for sign, y in ((1, positives), (-1, negatives)))

    def climb(x, positives, negatives):
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(height(leaf, positives, negatives).sum(), leaf)[0]

    assert_score_identity(climb, *points, potential=height)
    with pytest.raises(AssertionError, match="score identity V = grad of your potential"):
        assert_score_identity(lambda *clouds: 1.01 * climb(*clouds), *points, potential=height)


@pytest.mark.parametrize("normalization", ["joint", "two_sided"])
def test_raw_joint_forms_are_unbiased_for_other_counts_widths_and_distributions(normalization):
    field = DriftField((1.0,), normalization=normalization, rms_normalize=False)
    assert_unbiased_at_equilibrium(field, anchors=1, positives=3, negatives=5, width=3)
    assert_unbiased_at_equilibrium(
        field, sample=lambda count, generator: torch.rand(count, 1, generator=generator, dtype=torch.float64) ** 2
    )


def test_each_side_alone_is_unbiased_where_the_counts_agree():
    field = DriftField(**SEPARATE)
    assert_unbiased_at_equilibrium(field, anchors=1, positives=5, negatives=6)
    with pytest.raises(AssertionError, match=r"mean drift along the anchor <V, x>.*standard errors from zero"):
        assert_unbiased_at_equilibrium(field, anchors=1, positives=25, negatives=3)


def test_a_drift_that_is_always_zero_is_unbiased_and_one_that_is_always_one_is_not():
    assert_unbiased_at_equilibrium(lambda x, *_, **__: torch.zeros_like(x))
    with pytest.raises(AssertionError, match="mean drift along axis 0 1, inf standard errors"):
        assert_unbiased_at_equilibrium(lambda x, *_, **__: torch.ones_like(x))


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (lambda: assert_score_identity(separate, *torch.zeros(3, 2, 1), potential="kl"), "potential must be one of"),
        (lambda: assert_score_identity(separate, *torch.zeros(3, 2, 1), temperature=0), r"temperature \(tau\) must be"),
        (lambda: assert_unbiased_at_equilibrium(separate, draws=1), "draws must be an integer of at least 2"),
        (lambda: assert_unbiased_at_equilibrium(separate, anchors=0), "anchors must be an integer of at least 1"),
        (lambda: assert_unbiased_at_equilibrium(separate, positives=0), "positives must be an integer of at least 1"),
        (lambda: assert_unbiased_at_equilibrium(separate, negatives=3), "negatives must be an integer of at least 4"),
    ],
)
def test_claims_that_make_no_sense_are_refused(claim, message):
    with pytest.raises(TokenDriftError, match=message):
        claim()
    assert len(POTENTIALS) == 2


# ------------------------------------------------------------------------------------------------ clouds


def rank(points):
    return torch.linalg.matrix_rank(points - points.mean(0), atol=1e-9)


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
        lambda cloud: (cloud.anchors == cloud.positives[:1]).all() and (cloud.negatives == cloud.positives[:1]).all(),
        lambda cloud: len(cloud.anchors) > 2 and cloud.anchors.shape[1] > 2 and rank(cloud.anchors) == 1,
        lambda cloud: cloud.positives[-1].norm() > 100 * cloud.negatives.norm(dim=-1).max(),
        lambda cloud: cloud.anchors.shape[1] > 2 and (cloud.positives.norm(dim=-1) - 1).abs().max() < 1e-9,
    ],
)
def test_clouds_hold_every_kind_of_trouble(kind):
    find(clouds(), kind, settings=settings(max_examples=2000, derandomize=True, database=None, phases=[Phase.generate]))


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
        "for name in [name for name in sys.modules if name.startswith('tokendrift.testing')]:\n"
        "    del sys.modules[name]\n"
        "try:\n    import tokendrift.testing\n"
        "except ImportError as error:\n    print(error)"
    )
    assert run_code(code) == "tokendrift.testing needs hypothesis, which is not installed: pip install hypothesis\n"
