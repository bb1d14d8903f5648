"""Laws of the drift field: symmetry, invariance, scales, memory, numerics, expectation at equilibrium."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes

from tokendrift import DriftField, TokenDriftError, kernels
from tokendrift.kernels import exact_matmul, squared_distances
from tokendrift.testing import (
    assert_antisymmetric,
    assert_equilibrium,
    assert_rotation_equivariant,
    assert_translation_invariant,
    check_field,
    clouds,
)
from tokendrift.variants import ExtendedDriftField, ImageDriftField

KERNELS = ("gaussian", "laplace", "sharp_laplace")
NORMALIZATIONS = ("joint", "separate", "two_sided", "sinkhorn")
FORMS = list(itertools.product(KERNELS, NORMALIZATIONS))
EVERY_FORM = pytest.mark.parametrize(("kernel", "normalization"), FORMS)
SOME = list(zip(KERNELS * 2, NORMALIZATIONS, strict=False))  # every kernel and every normalization, not every pair
SOME_FORMS = pytest.mark.parametrize(
    ("kernel", "normalization"), [pytest.param(*form, marks=[pytest.mark.slow] * (form not in SOME)) for form in FORMS]
)


def points(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def make_field(temperatures=(0.02, 0.05, 0.2), **options):
    """The field of the core, or the one of the study where the options need it, with a short transport plan."""
    if options.get("normalization") == "sinkhorn":
        options = {"sinkhorn_iterations": 4} | options
    core = {field.name for field in dataclasses.fields(DriftField)}
    plain = options.keys() <= core and options.get("kernel") != "sharp_laplace"
    return (DriftField if plain and options.get("normalization") != "sinkhorn" else ExtendedDriftField)(
        temperatures, **options
    )


def raw_field(kernel="gaussian", normalization="joint", tau=1.0, **options):
    return make_field((tau,), kernel=kernel, normalization=normalization, rms_normalize=False, **options)


def log_kernel(kernel, x, y, tau):
    squared = (x[:, None] - y).square().sum(-1)
    if kernel == "gaussian":
        return -squared / tau
    ratio = squared.sqrt() / tau
    return torch.log((1 + ratio) * torch.exp(-ratio)) if kernel == "sharp_laplace" else -ratio


def plan(kernel, weights, iterations=4):
    """Sinkhorn's algorithm as it stands in textbooks, rows of the plan brought to sum one."""
    column_sum, row_sum = weights / weights.sum(), torch.full((len(kernel),), 1 / len(kernel)).double()
    u = torch.ones_like(row_sum)
    for _ in range(iterations):
        v = column_sum / (u @ kernel)
        u = row_sum / (kernel @ v)
    transport = u[:, None] * kernel * v
    return transport / transport.sum(1, keepdim=True)


def dense(kernel, normalization, anchors, positives, negatives, tau, weights=None):
    """The raw drift from the full matrix of kernel values, written down as the formulas have it."""
    points, count = torch.cat([positives, negatives]), len(positives)
    weights = torch.ones(len(points)).double() if weights is None else weights
    values = log_kernel(kernel, anchors, points, tau).exp()
    steps = points - anchors[:, None]
    if kernel == "sharp_laplace":
        steps = steps / (1 + steps.norm(dim=-1, keepdim=True) / tau)
    weighted, plus, minus = values * weights, slice(None, count), slice(count, None)
    if normalization in ("separate", "sinkhorn"):
        shares = [
            (plan(values[:, side], weights[side]) if normalization == "sinkhorn" else weighted[:, side])
            for side in (plus, minus)
        ]
        shares = [share / share.sum(1, keepdim=True) for share in shares]
        return (shares[0][..., None] * steps[:, plus]).sum(1) - (shares[1][..., None] * steps[:, minus]).sum(1)
    if normalization == "joint":
        a = weighted / weighted.sum(1, keepdim=True)
    else:  # copies of a point have a column each, so its weight is no part of its column's sum
        a = weights * (values / weighted.sum(1, keepdim=True) * values / values.sum(0)).sqrt()
    cross = torch.cat(
        [a[:, plus] * a[:, minus].sum(1, keepdim=True), -a[:, minus] * a[:, plus].sum(1, keepdim=True)], dim=1
    )
    return (cross[..., None] * steps).sum(1)


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("block_size", [3, 8192])
@pytest.mark.parametrize("case", ["unit", "generic"])
@pytest.mark.parametrize("exclusion", ["self_excluded", "self_and_pair_excluded", "no_mask"])
@pytest.mark.parametrize(
    ("normalization", "form"), [("joint", "joint_row"), ("separate", "separate"), ("two_sided", "joint_row_col")]
)
def test_the_field_has_the_golden_values(golden, case, normalization, form, exclusion, block_size):
    numbers = golden("drift_field")
    key = f"tokendrift.{case}."
    anchors, positives, negatives = (numbers[key + name] for name in ("h", "positives", "negatives"))
    own = torch.arange(len(anchors))
    options = {
        "exclude_positive": own if exclusion == "self_and_pair_excluded" else None,
        "exclude_negative": None if exclusion == "no_mask" else own,
    }
    field = DriftField(tuple(numbers[key + "tau"].tolist()), normalization=normalization, block_size=block_size)
    raw, _ = field.raw(anchors, positives, negatives, **options)
    for i in range(3):
        numbers.assert_matches(raw[i], f"{key}{form}.{exclusion}.V_tau.{i}")
    drift, diagnostics = field.diagnose(anchors, positives, negatives, **options)
    numbers.assert_matches(drift, f"{key}{form}.{exclusion}.V")
    numbers.assert_matches((diagnostics.rms.square() + field.eps).sqrt(), f"{key}{form}.{exclusion}.s")
    torch.testing.assert_close(field(anchors, positives, negatives, **options), drift, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["unit", "generic"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_algorithm_2_of_generative_modeling_via_drifting_is_a_special_case(golden, case, level):
    numbers = golden("drift_field")
    key = f"alg2.{case}."
    x, positives = numbers[key + "x"], numbers[key + "y_pos"]
    field = raw_field("laplace", "two_sided", numbers[key + "tau"][level].item())
    own = torch.arange(len(x))
    numbers.assert_matches(field(x, positives, numbers[key + "y_neg"]), f"{key}V.{level}")
    numbers.assert_matches(field(x, positives, numbers[key + "y_neg_self"]), f"{key}V_selfunmasked.{level}")
    numbers.assert_matches(
        field(x, positives, numbers[key + "y_neg_self"], exclude_negative=own), f"{key}V_selfmask.{level}"
    )


# ------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize(
    ("kernel", "normalization", "examples"),
    [(*form, 8) for form in SOME] + [pytest.param(*form, 40, marks=pytest.mark.slow) for form in FORMS],
)
def test_every_form_keeps_every_law(kernel, normalization, examples):
    check_field(make_field(kernel=kernel, normalization=normalization), max_examples=examples)


@pytest.mark.parametrize(
    ("kernel", "normalization", "examples"),
    [(*form, 8) for form in SOME] + [pytest.param(*form, 40, marks=pytest.mark.slow) for form in FORMS],
)
def test_every_raw_form_keeps_every_law(kernel, normalization, examples):
    check_field(make_field(kernel=kernel, normalization=normalization, rms_normalize=False), max_examples=examples)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_unequal_pull_and_push_break_the_swap_and_nothing_else(normalization):
    field = make_field(normalization=normalization, attraction=2.0)
    check_field(field, skip=["antisymmetric", "equilibrium"], max_examples=8)
    with pytest.raises(AssertionError, match=r"anti-symmetry V\("):
        assert_antisymmetric(field, points(4, 3), points(6, 3, seed=1), points(5, 3, seed=2))
    with pytest.raises(AssertionError, match=r"equilibrium V\("):
        assert_equilibrium(field, points(4, 3), points(6, 3, seed=1))


@EVERY_FORM
@given(cloud=clouds(offset=0.0))
@settings(max_examples=10)
def test_swapped_sets_give_the_opposite_drift_to_the_last_digits(kernel, normalization, cloud):
    field = raw_field(kernel, normalization, 0.2)
    # Around the origin nothing cancels, so 1e-12 is asked for here; check_field allows for far clouds.
    assert_antisymmetric(
        field,
        cloud.anchors,
        cloud.positives,
        cloud.negatives,
        exclude_positive=cloud.exclude_positive,
        exclude_negative=cloud.exclude_negative,
        tolerance=1e-12,
    )


@EVERY_FORM
def test_a_mask_left_in_the_negative_slot_breaks_the_swap(kernel, normalization):
    field, anchors, positives = raw_field(kernel, normalization), points(4, 3), points(5, 3, seed=1)
    negatives, own = torch.cat([anchors, points(2, 3, seed=2)]), torch.arange(4)
    forth = field(anchors, positives, negatives, exclude_negative=own)
    travelled = field(anchors, negatives, positives, exclude_positive=own)
    left = field(anchors, negatives, positives, exclude_negative=own)
    torch.testing.assert_close(forth, -travelled, rtol=0, atol=1e-14)
    assert (forth + left).norm() > 0.05 * forth.norm()


@EVERY_FORM
def test_coinciding_sets_give_zero_unless_only_one_side_is_masked(kernel, normalization):
    field, anchors, own = raw_field(kernel, normalization), points(6, 3), torch.arange(6)
    assert_equilibrium(field, anchors, anchors, tolerance=1e-14)
    assert_equilibrium(field, anchors, anchors, exclude=own, tolerance=1e-14)
    twice = torch.cat([anchors, anchors])  # as a multiset of weights the same: Q = 2P
    torch.testing.assert_close(field(anchors, anchors, twice), torch.zeros_like(anchors), rtol=0, atol=1e-14)
    one_sided = field(anchors, anchors, anchors, exclude_negative=own)
    assert one_sided.norm(dim=-1).min() > 1e-3


@given(cloud=clouds(offset=0.0), shift=st.floats(-100, 100))
def test_the_joint_field_does_not_know_the_origin(cloud, shift):
    assert_translation_invariant(
        raw_field(tau=0.2), *cloud[:3], shift=shift, exclude_negative=cloud.exclude_negative, tolerance=1e-10
    )


@given(cloud=clouds(offset=0.0), seed=st.integers(0, 2**31 - 1))
def test_the_drift_turns_with_its_points(cloud, seed):
    width = cloud.anchors.shape[1]
    rotation = torch.linalg.qr(points(width, width, seed=seed)).Q
    assert_rotation_equivariant(raw_field(tau=0.2), *cloud[:3], rotation=rotation, tolerance=1e-11)


@EVERY_FORM
@given(  # kernel values of an outlier underflow where the formula is written down without logarithms
    cloud=clouds(offset=0.0, masked=False, shapes=("ball", "line", "sphere", "point")),
    seed=st.none() | st.integers(0, 99),
)
@settings(max_examples=10)
def test_every_form_is_its_formula(kernel, normalization, cloud, seed):
    anchors, positives, negatives = cloud[:3]
    weights, sides = None, {}
    if seed is not None:
        weights = points(len(positives) + len(negatives), seed=seed).abs() + 0.1
        count = len(positives)
        sides = {"positive_weights": weights[:count], "negative_weights": weights[count:]}
    actual = raw_field(kernel, normalization, 0.7)(anchors, positives, negatives, **sides)
    expected = dense(kernel, normalization, anchors, positives, negatives, 0.7, weights)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@EVERY_FORM
@given(cloud=clouds(offset=0.0), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_a_weight_is_a_number_of_copies(kernel, normalization, cloud, seed):
    """Zero copies included: then the reference might as well not be there."""
    generator = torch.Generator().manual_seed(seed)
    copies = [torch.randint(0, 4, (len(side),), generator=generator) for side in cloud[1:3]]
    copies[0][0] = max(1, copies[0][0])
    # An exclusion hides all copies; with single points it can only name one.
    hidden = cloud.exclude_negative
    if hidden is not None:
        copies[1][hidden] = 1
    new_place = copies[1].cumsum(0) - copies[1]
    field = raw_field(kernel, normalization, 0.7)
    weighted = field(
        *cloud[:3],
        exclude_negative=hidden,
        positive_weights=copies[0].double(),
        negative_weights=copies[1].double(),
    )
    copied = field(
        cloud.anchors,
        cloud.positives.repeat_interleave(copies[0], dim=0),
        cloud.negatives.repeat_interleave(copies[1], dim=0),
        exclude_negative=None if hidden is None else new_place[hidden],
    )
    torch.testing.assert_close(weighted, copied, rtol=0, atol=1e-11)


def finite_difference(function, x, step=1e-5):
    """Gradient (N, M) of a function (N, M) -> (N,) by central differences."""
    columns = []
    for axis in range(x.shape[1]):
        offset = torch.zeros(x.shape[1], dtype=x.dtype)
        offset[axis] = step
        columns.append((function(x + offset) - function(x - offset)) / (2 * step))
    return torch.stack(columns, dim=1)


def test_the_separate_gaussian_field_is_a_difference_of_scores():
    """V = (tau/2) grad log(p/q) of the two kernel density estimates (T12)."""
    x, positives, negatives, tau = points(4, 3), points(7, 3, seed=1), points(5, 3, seed=2), 0.8

    def log_ratio(x):
        def log_density(y):
            return log_kernel("gaussian", x, y, tau).logsumexp(1)

        return log_density(positives) - log_density(negatives)

    drift = raw_field("gaussian", "separate", tau)(x, positives, negatives)
    torch.testing.assert_close(drift, tau / 2 * finite_difference(log_ratio, x), rtol=0, atol=1e-8)


def test_the_joint_gaussian_field_climbs_the_discriminator():
    """V = (tau/2) grad a+, a+ the kernel weight on positives (T14)."""
    x, positives, negatives, tau = points(4, 3), points(7, 3, seed=1), points(5, 3, seed=2), 0.8

    def positive_mass(x):
        logits = log_kernel("gaussian", x, torch.cat([positives, negatives]), tau)
        return logits.softmax(1)[:, : len(positives)].sum(1)

    drift, diagnostics = raw_field("gaussian", "joint", tau).diagnose(x, positives, negatives)
    torch.testing.assert_close(drift, tau / 2 * finite_difference(positive_mass, x), rtol=0, atol=1e-8)
    torch.testing.assert_close(diagnostics.positive_mass[0], positive_mass(x).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kernel", "conservative"), [("gaussian", True), ("laplace", False), ("sharp_laplace", True)])
def test_the_gaussian_and_the_sharp_kernel_are_conservative_and_plain_laplace_is_not(kernel, conservative):
    x, positives, negatives = points(1, 3), points(7, 3, seed=1), points(5, 3, seed=2)
    field = raw_field(kernel, "separate", 0.8)
    columns = [finite_difference(lambda x, i=i: field(x, positives, negatives)[:, i], x)[0] for i in range(3)]
    jacobian = torch.stack(columns)
    asymmetry = (jacobian - jacobian.T).abs().max().item()
    assert asymmetry < 1e-8 if conservative else asymmetry > 0.01


def test_sides_that_weigh_nothing_against_each_other_still_count_where_they_are_normalised_alone():
    anchors, positives, negatives = torch.zeros(1, 1), torch.full((1, 1), 9.0), torch.full((1, 1), 0.1)
    for normalization in ("separate", "sinkhorn"):
        drift = raw_field(normalization=normalization, tau=0.01)(anchors, positives, negatives)
        torch.testing.assert_close(drift, torch.full((1, 1), 8.9))


def test_the_joint_field_saturates_where_only_positives_are():
    anchors, positives, negatives = torch.zeros(1, 1), torch.full((1, 1), 0.1), torch.full((1, 1), 3.0)
    separate = raw_field(normalization="separate")(anchors, positives, negatives)
    joint = raw_field(normalization="joint")(anchors, positives, negatives)
    assert separate.abs() > 1
    assert joint.abs() < 1e-3


@EVERY_FORM
@pytest.mark.parametrize("tau", [1e-4, 1e-2, 1.0])
def test_weights_far_below_underflow_still_give_finite_drifts(kernel, normalization, tau):
    # Distances of 1 at tau = 1e-4: exp(-1e4) is zero in every dtype.
    anchors, positives, negatives = torch.zeros(2, 2), torch.eye(2), -torch.eye(2)
    assert raw_field(kernel, normalization, tau)(anchors, positives, negatives).isfinite().all()
    drift = raw_field(kernel, normalization, tau)(anchors.double(), positives.double(), negatives.double())
    # By symmetry half of the weight lies on either side: gap (1/2, 1/2) - (-1/2, -1/2). Every anchor is the same,
    # so two_sided has all weights 1/sqrt(4 * 2), masses 2/sqrt(8).
    factor = {"joint": 0.25, "separate": 1.0, "two_sided": 0.5, "sinkhorn": 1.0}[normalization]
    if kernel == "sharp_laplace":
        factor /= 1 + 1 / tau
    torch.testing.assert_close(drift, torch.full((2, 2), factor, dtype=torch.float64), rtol=1e-9, atol=0)


def test_far_and_near_references_keep_their_ratio_at_d_over_tau_of_ten_thousand():
    tau = 1e-4
    anchors = torch.zeros(1, 1, dtype=torch.float64)
    positives = torch.tensor([[1.0]], dtype=torch.float64)
    negatives = torch.tensor([[-((1.0 + 2e-4) ** 0.5)]], dtype=torch.float64)  # exponents differ by exactly 2
    _, diagnostics = raw_field(tau=tau).diagnose(anchors, positives, negatives)
    torch.testing.assert_close(diagnostics.positive_mass[0], torch.tensor(2.0).double().sigmoid(), rtol=1e-9, atol=0)


@EVERY_FORM
@given(block_size=st.integers(1, 11), scaled=st.booleans(), cloud=clouds(max_references=10), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_the_block_size_changes_nothing(kernel, normalization, block_size, scaled, cloud, seed):
    weights = points(len(cloud.negatives), seed=seed).clamp_min(0)
    options = {
        "exclude_positive": cloud.exclude_positive,
        "exclude_negative": cloud.exclude_negative,
        "negative_weights": weights,
        "pairs": torch.arange(len(cloud.anchors)) % len(cloud.positives),
    }
    extended = {"feature_scaling": True, "subtract_noise": True} if scaled else {}
    form = {"kernel": kernel, "normalization": normalization, "rms_normalize": False} | extended
    whole, blocks = (make_field((0.05, 0.5), **form, block_size=size) for size in (None, block_size))
    expected, diagnostics = whole.diagnose(*cloud[:3], **options)
    actual, streamed = blocks.diagnose(*cloud[:3], **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    for one, other in zip(streamed, diagnostics, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, equal_nan=True)


@EVERY_FORM
def test_a_first_block_that_an_anchor_must_not_see_leaves_no_trace(kernel, normalization):
    """Nothing seen so far means a peak of -inf, and -inf minus -inf would be NaN for the rest of the stream."""
    anchors, positives, negatives = points(2, 3), points(3, 3, seed=1), points(3, 3, seed=2)
    hidden = torch.tensor([0, -1])
    whole, streamed = (
        raw_field(kernel, normalization, block_size=size)(anchors, positives, negatives, exclude_positive=hidden)
        for size in (8192, 1)
    )
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-14)
    assert (whole.norm(dim=-1) > 0).all()


def test_one_anchor_doubles_the_temperature_of_the_two_sided_form():
    """With a single anchor the column softmax is one, so A is the root of the row softmax (T9)."""
    anchors, positives, negatives = points(1, 3), points(4, 3, seed=1), points(5, 3, seed=2)
    two_sided = raw_field(normalization="two_sided", tau=0.5)(anchors, positives, negatives)
    joint = raw_field(normalization="joint", tau=1.0)(anchors, positives, negatives)
    cosine = torch.nn.functional.cosine_similarity(two_sided, joint)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("count", "width", "block"), [(2, 16, 8192), (8, 1536, 672), (2, 8192, 256)])
def test_a_block_by_default_stays_in_the_cache_of_a_cpu(count, width, block):
    """About a million numbers, references and weights, between 256 references and 8192."""
    references, peaks = torch.zeros(3 * block, width), []
    for size in (None, block):
        with LiveBytes() as memory:
            DriftField(block_size=size)(torch.zeros(count, width), references, references)
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1]


@SOME_FORMS
def test_memory_does_not_grow_with_the_number_of_references(kernel, normalization):
    field, anchors = make_field(kernel=kernel, normalization=normalization, block_size=16), points(4, 8)
    peaks = []
    for count in (32, 64):
        sides = [points(count, 8, seed=seed) for seed in (1, 2)]
        weights = torch.ones(count).double()
        with LiveBytes() as memory:
            field(anchors, *sides, negative_weights=weights)
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1] > 16 * 8 * 8  # a block at least was seen


def test_references_of_width_1536_need_less_than_a_quarter_of_a_gibibyte_however_many_they_are():
    """Counted on shapes alone, with 8 anchors and the default block of an accelerator."""
    peaks = []
    for count in (20_000, 40_000):
        with torch.device("meta"):
            anchors, references, own = torch.empty(8, 1536), torch.empty(count, 1536), torch.arange(8)
            with LiveBytes() as memory:
                drift = DriftField()(anchors, references, references, exclude_negative=own)
        assert drift.shape == (8, 1536)
        peaks.append(memory.peak)
    assert 2**20 < peaks[0] == peaks[1] < 2**28


# ---------------------------------------------------------------------------------- temperatures and size


def test_each_temperature_is_divided_by_its_batch_rms_and_then_averaged():
    clouds = points(4, 3), points(6, 3, seed=1), points(5, 3, seed=2)
    temperatures = (0.3, 1.0, 4.0)
    raw = torch.stack([raw_field(tau=tau)(*clouds) for tau in temperatures])
    unit = raw / raw.square().sum(-1).mean(-1).sqrt()[:, None, None]
    torch.testing.assert_close(DriftField(temperatures)(*clouds), unit.mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(DriftField(temperatures, aggregate="sum")(*clouds), unit.sum(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        DriftField(temperatures, rms_normalize=False)(*clouds), raw.mean(0), rtol=1e-12, atol=1e-15
    )


def test_a_temperature_that_is_all_rounding_contributes_zero():
    anchors = points(3, 2)
    noise = torch.cat([anchors, anchors + 1e-9 * points(3, 2, seed=1)])
    drift = DriftField((1.0,))(anchors, noise, anchors)
    assert torch.equal(drift, torch.zeros_like(drift))
    assert DriftField((1.0,), eps=1e-30)(anchors, noise, anchors).norm(dim=-1).max() > 0.1


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_pull_and_push_can_be_weighed_against_each_other(normalization):
    anchors, positives, negatives = points(4, 3), points(5, 3, seed=1), points(6, 3, seed=2)

    def field(attraction, repulsion):
        options = {"attraction": attraction, "repulsion": repulsion}
        return raw_field("laplace", normalization, **options)(anchors, positives, negatives)

    pull, push = field(1, 0), field(0, 1)
    assert pull.norm() > 0.01
    assert push.norm() > 0.01
    torch.testing.assert_close(field(2, 1), 2 * pull + push, rtol=0, atol=1e-14)
    torch.testing.assert_close(field(1, 1), pull + push, rtol=0, atol=1e-14)
    if normalization == "separate":
        expected = log_kernel("laplace", anchors, positives, 1.0).softmax(1) @ positives - anchors
        torch.testing.assert_close(pull, expected, rtol=0, atol=1e-12)


def test_a_kernel_of_the_users_own_takes_the_place_of_a_named_one():
    clouds = points(3, 2), points(4, 2, seed=1), points(5, 2, seed=2)
    mine = DriftField(kernel=lambda squared, tau: -squared / tau)
    torch.testing.assert_close(mine(*clouds), DriftField()(*clouds), rtol=1e-9, atol=1e-12)


def test_diagnostics_of_uniform_weights_are_counts():
    """At a very high temperature every reference weighs the same."""
    anchors, positives, negatives = points(3, 2), points(4, 2, seed=1), points(6, 2, seed=2)
    _, found = DriftField((1e9,)).diagnose(anchors, positives, negatives, pairs=torch.arange(3))
    assert found.positive_mass.item() == pytest.approx(4 / 10)
    assert found.effective_references.item() == pytest.approx(10)
    assert found.pair_weight.item() == pytest.approx(1 / 4)


def test_the_pair_weight_is_the_share_of_the_own_positive():
    anchors, positives, negatives = points(3, 2), points(4, 2, seed=1), points(6, 2, seed=2)
    _, found = DriftField((0.5,)).diagnose(anchors, positives, negatives, pairs=torch.arange(3))
    weights = log_kernel("gaussian", anchors, positives, 0.5).softmax(1)
    torch.testing.assert_close(found.pair_weight[0], weights.diagonal().mean(), rtol=1e-9, atol=0)


def test_the_pair_weight_follows_normalisation_and_weights():
    anchors, positives, negatives = points(3, 2), points(4, 2, seed=1), points(6, 2, seed=2)
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0]).double()
    values = log_kernel("gaussian", anchors, positives, 0.5).exp()
    for normalization, shares in {
        "separate": values * weights,
        "two_sided": values * weights / values.sum(0).sqrt(),
        "sinkhorn": plan(values, weights),
    }.items():
        field = make_field((0.5,), normalization=normalization)
        pairs = torch.arange(3)
        _, found = field.diagnose(anchors, positives, negatives, positive_weights=weights, pairs=pairs)
        expected = (shares / shares.sum(1, keepdim=True)).diagonal().mean()
        torch.testing.assert_close(found.pair_weight[0], expected, rtol=1e-9, atol=0)


def test_the_pair_weight_of_positives_that_weigh_nothing_against_the_negatives_is_their_share_among_positives():
    anchors = torch.tensor([[1.0, 0.0], [1.0, 1e-3], [1.0, -1e-3]])
    own = torch.arange(3)
    # On the unit sphere: squared distances of 4 and a weight of exp(-200) at the lowest temperature.
    _, found = DriftField().diagnose(anchors, -anchors, anchors, exclude_negative=own, pairs=own)
    torch.testing.assert_close(found.pair_weight, torch.full((3,), 1 / 3), atol=1e-3, rtol=0)


def test_the_field_computes_in_float32_at_least_even_under_autocast():
    anchors, positives, negatives = (x.float() for x in (points(3, 64), points(4, 64, seed=1), points(5, 64, seed=2)))
    anchors, positives, negatives = (torch.nn.functional.normalize(x) for x in (anchors, positives, negatives))
    expected = DriftField()(anchors, positives, negatives)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = DriftField()(anchors, positives, negatives)
    assert torch.equal(inside, expected)
    rounded = [x.bfloat16() for x in (anchors, positives, negatives)]
    assert DriftField()(*rounded).dtype == torch.float32
    torch.testing.assert_close(DriftField()(*rounded), DriftField()(*(x.float() for x in rounded)), rtol=0, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_is_close_to_float64_far_from_the_origin(kernel):
    clouds64 = [x + 50 for x in (points(4, 8), points(9, 8, seed=1), points(7, 8, seed=2))]
    field = raw_field(kernel, tau=4.0)
    # Coordinates near 50 are themselves rounded by 2e-6; the field adds little to that.
    torch.testing.assert_close(field(*(x.float() for x in clouds64)).double(), field(*clouds64), rtol=0, atol=3e-5)


def collinear(count, seed, width=1536):
    """Unit vectors about a common direction, a mean squared distance of 0.117 apart, as pooled features are."""
    common = torch.nn.functional.normalize(points(width), dim=0)
    return torch.nn.functional.normalize(common + 0.25 * points(count, width, seed=seed) / width**0.5, dim=-1)


def plain_field(anchors, positives, negatives, tau):
    """The joint field as one would write it down, in the dtype of the features."""
    logits = -torch.cdist(anchors, torch.cat([positives, negatives])).square() / tau
    plus, minus = logits.softmax(1).split([len(positives), len(negatives)], dim=1)
    drift = plus * minus.sum(1, keepdim=True) @ positives - minus * plus.sum(1, keepdim=True) @ negatives
    return drift / drift.square().sum(-1).mean().sqrt()


def test_logits_of_nearly_collinear_unit_vectors_are_exact_in_float32():
    """Distances by products of vectors with a common offset lose what the offset takes; centred ones do not."""
    anchors, positives = collinear(8, 1), collinear(256, 2)
    exact = torch.cdist(anchors, positives, compute_mode="donot_use_mm_for_euclid_dist").square() / 0.02
    x, y = anchors.float(), positives.float()
    centre = y.mean(dim=0)
    centred, raw = (
        (squared_distances(*clouds).double() / 0.02 - exact).abs().max()
        for clouds in ((x - centre, y - centre), (x, y))
    )
    assert centred < 6e-6  # rounding of squared lengths of 0.06 over tau, times ten
    assert raw > 2 * centred


def test_under_autocast_the_field_is_as_exact_as_the_plain_form_in_float32():
    clouds64 = collinear(8, 1), collinear(256, 2), collinear(300, 3)
    clouds32 = [x.float() for x in clouds64]
    exact = plain_field(*clouds64, 0.02)

    def error(drift):
        return (drift.double() - exact).norm(dim=-1).max().item()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, plain_inside = error(DriftField((0.02,))(*clouds32)), error(plain_field(*clouds32, 0.02))
    assert inside <= error(plain_field(*clouds32, 0.02)) + 1e-6
    assert plain_inside > 1e-3  # autocast would have reached it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY_FORM
def test_features_in_half_precision_give_the_drift_of_the_rounded_features(kernel, normalization, dtype):
    halves = [x.to(dtype) for x in (collinear(4, 1, 64), collinear(9, 2, 64), collinear(7, 3, 64))]
    field = make_field(kernel=kernel, normalization=normalization)
    drift = field(*halves, exclude_negative=torch.arange(4), negative_weights=torch.ones(7, dtype=dtype))
    wide = field(*(x.float() for x in halves), exclude_negative=torch.arange(4))
    assert drift.dtype == torch.float32
    torch.testing.assert_close(drift, wide, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_point_that_occurs_a_hundred_times_is_one_with_the_weight_of_a_hundred(kernel):
    """Duplicates of an anchor too, at a temperature where everything else has underflowed."""
    anchors = points(3, 4).float()
    positives, negatives = torch.cat([anchors, points(2, 4, seed=1).float()]), points(6, 4, seed=2).float()
    field = make_field((1e-4, 1.0), kernel=kernel)
    many = field(anchors, positives.repeat(100, 1), torch.cat([negatives, anchors]))
    one = field(
        anchors, positives, torch.cat([negatives, anchors]), positive_weights=torch.full((len(positives),), 100.0)
    )
    assert one.norm(dim=-1).min() > 0.01
    torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_compiled_field_equals_eager():
    compare_with_compiled(DriftField(), backend="aot_eager")


COMPILED = [
    {"kernel": "gaussian", "normalization": "joint"},
    {"kernel": "laplace", "normalization": "two_sided"},
    {"kernel": "sharp_laplace", "normalization": "sinkhorn"},
    {"feature_scaling": True},
    {"subtract_noise": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", COMPILED, ids=lambda options: "-".join(map(str, options.values())))
def test_the_field_compiled_by_inductor_equals_eager(options):
    compare_with_compiled(make_field(**options), backend="inductor")


def compare_with_compiled(field, backend):
    """Also where references are added, so that shapes change, and some are nearer than the others."""
    torch.compiler.reset()
    compiled = torch.compile(field.__call__, backend=backend)
    anchors = points(4, 3)
    for count in (5, 7):
        references = torch.cat([anchors + 1e-6, points(count, 3, seed=1)]), torch.cat([anchors, points(3, 3, seed=2)])
        for own in (None, torch.arange(4)):
            expected = field(anchors, *references, exclude_negative=own)
            actual = compiled(anchors, *references, exclude_negative=own)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


class OlderMatmul:
    """What torch.backends.cuda.matmul was before it had precisions of its own."""


@pytest.mark.parametrize("interface", ["old", "new", "older"])
@pytest.mark.parametrize("raises", [False, True])
def test_tf32_is_off_inside_and_afterwards_as_it_was(monkeypatch, interface, raises):
    """Settings are global and need no accelerator; reading them through the wrong interface raises."""
    cuda, matmul = torch.backends.cuda, torch.backends.cuda.matmul
    if interface == "older":
        monkeypatch.setattr(cuda, "matmul", OlderMatmul())
    elif not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the old interface alone")
    try:
        if interface == "new":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        with contextlib.suppress(ZeroDivisionError), exact_matmul(torch.device("cuda")):
            inside = torch.get_float32_matmul_precision() if interface == "older" else matmul.fp32_precision
            assert inside in ("highest", "ieee")
            _ = 1 / 0 if raises else 0
        assert matmul.fp32_precision == "tf32" if interface == "new" else matmul.allow_tf32  # readable as before
    finally:
        torch.set_float32_matmul_precision("highest")
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "none"


def test_a_device_without_autocast_needs_none_switched_off():
    with torch.device("meta"):
        assert DriftField()(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(5, 3)).shape == (2, 3)


def test_distances_within_clusters_take_no_more_memory_than_others(monkeypatch):
    """Nearly all pairs are refined there: their differences, 8 * 512 * 64 numbers, must not exist at once."""
    spread = points(8, 64), points(512, 64, seed=1)
    clustered = [torch.where(torch.arange(len(x))[:, None] % 2 == 0, 1.0, -1.0) + 1e-6 * x for x in spread]
    expected = squared_distances(*clustered, refine=True)
    monkeypatch.setattr(kernels, "REFINED_NUMBERS", 64 * 16)
    peaks = []
    for pair in (spread, clustered):
        with LiveBytes() as memory:
            actual = squared_distances(*pair, refine=True)
        peaks.append(memory.peak)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    pairs = 2 * 8 * 8 * 512  # two indices each
    assert peaks[1] < peaks[0] + pairs + 5 * 8 * kernels.REFINED_NUMBERS


@given(cloud=clouds(masked=False), refine=st.booleans())
def test_squared_distances_are_those_of_the_differences(cloud, refine):
    x, y = cloud.anchors - cloud.anchors.mean(0), cloud.negatives - cloud.anchors.mean(0)
    expected = (x[:, None] - y).square().sum(-1)
    actual = squared_distances(x, y, refine=refine)
    assert (actual >= 0).all()
    size = x.square().sum(-1, keepdim=True) + y.square().sum(-1)
    assert ((actual - expected).abs() <= 1e-14 * size).all()
    if refine:  # a root is taken of these: coinciding points must be exactly zero apart
        assert torch.equal(actual[expected == 0], expected[expected == 0])


# ------------------------------------------------------------------------------------------ expectation


@pytest.mark.statistical
def test_the_joint_drift_is_zero_in_expectation_at_equilibrium():
    """Real and generated points of one law, P = 9 against Q = 4, the anchors among the negatives and masked."""
    generator = torch.Generator().manual_seed(1)
    repeats, field = 6000, raw_field(tau=1.0)
    total = {"masked": [], "unmasked": []}
    for _ in range(repeats):
        cloud = torch.randn(13, 2, generator=generator, dtype=torch.float64)
        anchors, positives, own = cloud[:4], cloud[4:], torch.arange(4)
        # The drift has no preferred direction; its projection on the anchor has, if anchors repel themselves.
        for name, exclude in (("masked", own), ("unmasked", None)):
            drift = field(anchors, positives, anchors, exclude_negative=exclude)
            total[name].append(torch.stack([drift.mean(), (drift * anchors).sum(-1).mean()]))
    z = {}
    for name, values in total.items():
        stacked = torch.stack(values)
        z[name] = stacked.mean(0) / stacked.std(0) * repeats**0.5
    assert z["masked"][0].abs() < 4
    assert z["unmasked"][1].abs() > 10  # the experiment is able to see a bias


@pytest.mark.statistical
def test_the_expected_drift_at_a_fixed_point_is_zero_for_unequal_counts():
    """Joint: unbiased for any P and Q. Separate: biased if they differ (T5)."""
    generator = torch.Generator().manual_seed(2)
    anchor = torch.tensor([[1.5, 0.0]], dtype=torch.float64)
    found = {}
    for normalization in ("joint", "separate"):
        field = raw_field(normalization=normalization, tau=1.0)
        values = []
        for _ in range(8000):
            cloud = torch.randn(24, 2, generator=generator, dtype=torch.float64)
            values.append(field(anchor, cloud[:21], cloud[21:])[0, 0])
        values = torch.stack(values)
        found[normalization] = (values.mean() / values.std() * len(values) ** 0.5).item()
    assert abs(found["joint"]) < 4
    assert abs(found["separate"]) > 10


@pytest.mark.statistical
def test_the_raw_rms_falls_like_the_root_of_the_number_of_references():
    generator = torch.Generator().manual_seed(3)
    anchors = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([64, 256, 1024, 4096])
    field, means = DriftField((1.0,)), []
    for size in sizes.tolist():
        values = []
        for _ in range(40):
            cloud = torch.randn(2 * size, 2, generator=generator, dtype=torch.float64)
            drift, found = field.diagnose(anchors, cloud[:size], cloud[size:])
            values.append(found.rms.square())
            assert drift.square().sum(-1).mean().item() == pytest.approx(1)  # normalised, it hides equilibrium
        means.append(torch.cat(values).mean().sqrt())
    log_size, log_rms = sizes.double().log(), torch.stack(means).log()
    slope = torch.linalg.lstsq(torch.stack([log_size, torch.ones(4).double()], 1), log_rms[:, None]).solution[0].item()
    assert slope == pytest.approx(-0.5, abs=0.05)


# ------------------------------------------------------------------------------------------ edges and errors


@EVERY_FORM
def test_an_empty_side_gives_zero_drift(kernel, normalization):
    field = make_field(kernel=kernel, normalization=normalization)
    anchors, positives = points(2, 3), points(4, 3, seed=1)
    nothing = torch.zeros(0, 3, dtype=torch.float64)
    assert torch.equal(field(anchors, positives, nothing), torch.zeros_like(anchors))
    alone = field(anchors[:1], positives, anchors[:1], exclude_negative=torch.tensor([0]))
    assert torch.equal(alone, torch.zeros_like(alone))
    only = torch.tensor([0, -1])
    drift = raw_field(kernel, normalization)(anchors, positives[:1], anchors, exclude_positive=only)
    assert torch.equal(drift[0], torch.zeros(3).double())
    assert drift[1].norm() > 0
    _, diagnostics = field.diagnose(anchors[:1], positives, nothing)
    assert all(part.isfinite().all() for part in diagnostics[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": ()}, r"temperatures must be a tuple of numbers above 0\.\n  got temperatures tuple \(\)"),
        ({"temperatures": (0.1, -1.0)}, r"temperatures \(each tau\) must be a finite number above 0"),
        ({"temperatures": (0.1, 0)}, r"temperatures \(each tau\) must be a finite number above 0"),
        ({"temperatures": ("0.1",)}, r"temperatures \(each tau\) must be a finite number above 0"),
        ({"temperatures": (float("nan"),)}, r"temperatures \(each tau\) must be a finite number above 0"),
        ({"temperatures": (float("inf"),)}, r"temperatures \(each tau\) must be a finite number above 0"),
        ({"temperatures": 0.1}, "temperatures must be a tuple of numbers above 0"),
        ({"kernel": "rbf"}, "kernel must be one of 'gaussian', 'laplace'.\n  got kernel str 'rbf'"),
        ({"normalization": "row"}, "normalization must be one of 'joint', 'separate', 'two_sided'"),
        ({"aggregate": "max"}, "aggregate must be one of 'mean', 'sum'"),
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
        ({"eps": -1.0}, "eps must be a finite number above 0"),
        ({"attraction": -1.0}, "attraction must be a finite number of at least 0"),
        ({"repulsion": float("nan")}, "repulsion must be a finite number of at least 0"),
        ({"attraction": 0.0, "repulsion": 0.0}, "attraction and repulsion are both 0"),
        ({"normalization": "sinkhorn"}, "normalization must be one of 'joint', 'separate', 'two_sided'"),
    ],
)
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(TokenDriftError, match=message):
        DriftField(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchors": torch.zeros(3)}, r"anchors must have shape \(N, M\), but it has 1 axes"),
        ({"anchors": torch.zeros(0, 3)}, "anchors is empty: N is 0"),
        ({"anchors": [[0.0]]}, r"anchors must be a tensor of shape \(N, M\)"),
        ({"anchors": torch.zeros(2, 3, dtype=torch.int64)}, "anchors must be floating point"),
        ({"positives": torch.zeros(0, 3)}, "positives is empty: P is 0"),
        ({"positives": torch.zeros(2, 4)}, "positives has width M = 4 but anchors have M = 3"),
        ({"negatives": torch.zeros(2, 4)}, "negatives has width M = 4 but anchors have M = 3"),
        ({"negatives": torch.zeros(3)}, r"negatives must be a tensor of shape \(Q, M\)"),
        ({"negatives": None}, r"negatives must be a tensor of shape \(Q, M\)"),
        ({"negatives": torch.zeros(2, 3, dtype=torch.int64)}, "negatives must be floating point"),
        ({"positives": torch.zeros(2, 3, device="meta")}, "positives is on meta but anchors is on cpu"),
        ({"negatives": torch.zeros(2, 3, device="meta")}, "negatives is on meta but anchors is on cpu"),
        ({"exclude_negative": torch.zeros(2, dtype=torch.int32)}, r"exclude_negative must be int64 of shape \(N,\)"),
        ({"exclude_negative": torch.zeros(3, dtype=torch.int64)}, r"exclude_negative must be int64 of shape \(N,\)"),
        ({"exclude_positive": torch.zeros(2)}, r"exclude_positive must be int64 of shape \(N,\)"),
        ({"exclude_positive": [0, 1]}, r"exclude_positive must be int64 of shape \(N,\)"),
        ({"exclude_positive": torch.tensor([0, 4])}, r"from 0 to 4, but there are P = 4 references \(0 to 3; -1 for"),
        (
            {"exclude_negative": torch.tensor([5, -1])},
            r"exclude_negative has indices from -1 to 5, but there are Q = 5",
        ),
        (
            {"exclude_negative": torch.tensor([-2, 0])},
            r"from -2 to 0[\s\S]*the first negative is 0, whatever the number",
        ),
        ({"positive_weights": torch.ones(3)}, r"positive_weights must be floating point of shape \(P,\)"),
        ({"negative_weights": torch.ones(5).long()}, r"negative_weights must be floating point of shape \(Q,\)"),
        ({"negative_weights": [1.0] * 5}, r"negative_weights must be floating point of shape \(Q,\)"),
        ({"negative_weights": -torch.ones(5)}, "negative_weights must not contain negative numbers"),
        ({"positive_weights": torch.full((4,), torch.nan)}, "positive_weights must not contain negative numbers"),
        ({"positive_weights": torch.ones(4, device="meta")}, "positive_weights is on meta but anchors is on cpu"),
    ],
)
def test_bad_clouds_are_refused_with_what_came(arguments, message):
    good = {"anchors": torch.zeros(2, 3), "positives": torch.zeros(4, 3), "negatives": torch.zeros(5, 3)}
    with pytest.raises(TokenDriftError, match=message) as caught:
        DriftField()(**(good | arguments))
    assert "got " in str(caught.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["positives", "negatives"])
@pytest.mark.parametrize(
    "field",
    [
        *(DriftField(normalization=each) for each in ("joint", "separate", "two_sided")),
        ExtendedDriftField(normalization="sinkhorn"),
        ExtendedDriftField(subtract_noise=True, feature_scaling=True),
        ImageDriftField(),
    ],
)
def test_a_reference_that_is_not_finite_never_looks_like_equilibrium(field, side, bad):
    clouds = {name: torch.randn(5, 3) for name in ("positives", "negatives")}
    clouds[side][2, 1] = bad
    anchors = torch.randn(4, 3)
    assert field(anchors, **clouds).isnan().all()
    if isinstance(field, DriftField):
        assert field.diagnose(anchors, **clouds)[1].rms.isnan().all()


@pytest.mark.parametrize("size", [1e18, 1e30])
def test_features_whose_squares_overflow_never_look_like_equilibrium(size):
    anchors, positives, negatives = size * torch.randn(3, 4, 3)
    assert DriftField()(anchors, positives, negatives).isnan().all()
