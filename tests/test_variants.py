"""Laws of the field variants that the study tried: transport plans, sharp kernels, noise and scale of the features."""

from __future__ import annotations

import pytest
import torch
from test_field import KERNELS, NORMALIZATIONS, finite_difference, log_kernel, plan, points, raw_field

from tokendrift import DriftField, TokenDriftError
from tokendrift.testing import check_field
from tokendrift.variants import ExtendedDriftField, build_field


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_field_is_built_from_the_names_of_its_kernel_and_normalisation(kernel, normalization):
    field = build_field((0.3,), kernel=kernel, normalization=normalization)
    extended = kernel == "sharp_laplace" or normalization == "sinkhorn"
    assert type(field) is (ExtendedDriftField if extended else DriftField)
    assert (field.temperatures, field.kernel, field.normalization) == ((0.3,), kernel, normalization)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
@pytest.mark.parametrize("normalization", ["joint", "separate", "two_sided"])
def test_without_its_options_the_extended_field_is_the_plain_one(kernel, normalization):
    clouds = points(4, 3), points(5, 3, seed=1), points(6, 3, seed=2)
    plain, extended = (cls(kernel=kernel, normalization=normalization) for cls in (DriftField, ExtendedDriftField))
    assert torch.equal(extended(*clouds), plain(*clouds))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "rbf"}, "kernel must be one of 'gaussian', 'laplace', 'sharp_laplace'"),
        ({"normalization": "row"}, "normalization must be one of 'joint', 'separate', 'two_sided', 'sinkhorn'"),
    ],
)
def test_an_unknown_kernel_or_normalisation_is_refused(options, message):
    for build in (build_field, ExtendedDriftField):
        with pytest.raises(TokenDriftError, match=message):
            build(**options)


def test_a_plan_needs_a_step():
    with pytest.raises(TokenDriftError, match="sinkhorn_iterations must be an integer of at least 1"):
        ExtendedDriftField(sinkhorn_iterations=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("options", [{"feature_scaling": True}, {"subtract_noise": True}], ids=lambda o: next(iter(o)))
def test_no_option_breaks_a_law(normalization, options):
    field = ExtendedDriftField(normalization=normalization, **({"sinkhorn_iterations": 4} | options))
    check_field(field, max_examples=8)


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_the_sharp_laplace_field_is_a_gradient(normalization):
    """V = tau^2 grad log(p/q), or tau^2 grad a+, of densities smoothed by (1 + d/tau) exp(-d/tau) (T12b)."""
    x, positives, negatives, tau = points(4, 3), points(7, 3, seed=1), points(5, 3, seed=2), 0.8

    def potential(x):
        sides = [log_kernel("sharp_laplace", x, y, tau).logsumexp(1) for y in (positives, negatives)]
        return sides[0] - sides[1] if normalization == "separate" else (sides[0] - sides[1]).sigmoid()

    drift = raw_field("sharp_laplace", normalization, tau)(x, positives, negatives)
    torch.testing.assert_close(drift, tau**2 * finite_difference(potential, x), rtol=0, atol=1e-8)


def test_a_transport_plan_shares_out_the_positives_where_a_softmax_crowds():
    """Both anchors are nearest to the first positive; at low temperature the plan still pairs them off."""
    anchors = torch.tensor([[0.0], [1.0]]).double()
    positives, negatives = torch.tensor([[0.0], [-5.0]]).double(), torch.tensor([[0.0], [0.0]]).double()
    expected = {"separate": [[0.0], [0.0]], "sinkhorn": [[-5.0], [0.0]]}
    for normalization, drift in expected.items():
        options = {"sinkhorn_iterations": 2000} if normalization == "sinkhorn" else {}
        found = raw_field("gaussian", normalization, 1.0, **options)(anchors, positives, negatives)
        torch.testing.assert_close(found, torch.tensor(drift).double(), rtol=0, atol=0.05)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("factor", [1e-3, 40.0])
def test_scaled_features_give_a_drift_scaled_alike(kernel, factor):
    clouds = points(4, 3), points(5, 3, seed=1), points(6, 3, seed=2)
    field = ExtendedDriftField((0.1, 0.4), kernel=kernel, feature_scaling=True)
    drift = field(*clouds)
    torch.testing.assert_close(field(*(factor * x for x in clouds)), factor * drift, rtol=1e-9, atol=0)
    assert (ExtendedDriftField((0.1, 0.4), kernel=kernel)(*(factor * x for x in clouds)) / factor - drift).norm() > 0.1


def test_feature_scaling_is_that_of_the_image_paper():
    """Features over S = mean distance / sqrt(C), temperatures tau sqrt(C), drift over its RMS per channel (A.6)."""
    clouds, own = (points(4, 9), points(5, 9, seed=1), torch.cat([points(4, 9), points(6, 9, seed=2)])), torch.arange(4)
    distances = torch.cat([torch.cdist(clouds[0], y) for y in clouds[1:]], dim=1)
    unit = distances.sum() / (distances.numel() - 4)  # the anchors themselves are not seen
    scale = unit / 3
    scaled = [x / scale for x in clouds]
    drift = sum(
        raw / (raw.square().sum(-1) / 9).mean().sqrt()
        for raw in (raw_field("laplace", tau=3 * tau)(*scaled, exclude_negative=own) for tau in (0.05, 0.2))
    )
    field = ExtendedDriftField((0.05, 0.2), kernel="laplace", feature_scaling=True, aggregate="sum")
    torch.testing.assert_close(field(*clouds, exclude_negative=own), scale * drift, rtol=1e-9, atol=0)


def test_points_that_all_coincide_have_no_mean_distance_and_no_drift():
    point = torch.ones(3, 2)
    assert torch.equal(ExtendedDriftField(feature_scaling=True)(point, point, point), torch.zeros(3, 2))


@pytest.mark.parametrize("normalization", ["joint", "separate", "two_sided"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_signal_is_the_square_without_repeated_references(kernel, normalization):
    """Sum over four references that are two different positives and two different negatives."""
    anchors, positives, negatives, tau = points(3, 2), points(4, 2, seed=1), points(5, 2, seed=2), 0.8
    field = raw_field(kernel, normalization, tau, attraction=1.5, subtract_noise=False)
    _, found = field.diagnose(anchors, positives, negatives)
    signal = field.signal(anchors, positives, negatives)
    log_weights = log_kernel(kernel, anchors, torch.cat([positives, negatives]), tau)
    weights = log_weights.softmax(1)
    if normalization == "two_sided":
        weights = (weights * log_weights.softmax(0)).sqrt()
    plus, minus = weights[:, :4], weights[:, 4:]
    if normalization == "separate":
        plus, minus = plus / plus.sum(1, keepdim=True), minus / minus.sum(1, keepdim=True)
    steps = [y - anchors[:, None] for y in (positives, negatives)]
    if kernel == "sharp_laplace":
        steps = [step / (1 + step.norm(dim=-1, keepdim=True) / tau) for step in steps]
    gaps = 1.5 * steps[0][:, :, None] - steps[1][:, None]  # (N, P, Q, M)
    terms = plus[:, :, None, None] * minus[:, None, :, None] * gaps
    products = torch.einsum("ipqm, irsm -> iprqs", terms, terms)
    different = (1 - torch.eye(4))[:, :, None, None] * (1 - torch.eye(5))
    expected = (products * different).sum((1, 2, 3, 4)).mean()
    torch.testing.assert_close(signal[0], expected, rtol=1e-10, atol=1e-14)
    assert found.rms.square()[0] > 1.2 * expected


def test_a_drift_keeps_the_share_of_its_square_that_is_signal():
    clouds = points(6, 2), points(40, 2, seed=1) + 1, points(50, 2, seed=2)
    plain, shrunk = (ExtendedDriftField((0.3, 1.0), subtract_noise=subtract) for subtract in (False, True))
    (raw, _), (_, found) = shrunk.raw(*clouds), plain.diagnose(*clouds)
    share = plain.signal(*clouds) / found.rms.square()
    assert ((share > 0.03) & (share < 0.99)).all()
    expected = (share[:, None, None] * raw / found.rms[:, None, None]).mean(0)
    torch.testing.assert_close(shrunk(*clouds), expected, rtol=1e-9, atol=0)
    one_of_each = points(6, 2), points(1, 2, seed=1), points(1, 2, seed=2)  # nothing but repeated references
    assert torch.equal(shrunk(*one_of_each), torch.zeros(6, 2).double())


def test_the_diagnostics_of_a_plan_are_those_of_kernel_and_plan():
    anchors, positives, negatives = points(3, 2), points(4, 2, seed=1), points(6, 2, seed=2)
    _, found = ExtendedDriftField((0.5,), normalization="sinkhorn", sinkhorn_iterations=4).diagnose(
        anchors, positives, negatives
    )
    values = [log_kernel("gaussian", anchors, y, 0.5).exp() for y in (positives, negatives)]
    mass = [value.sum(1) for value in values]
    torch.testing.assert_close(found.positive_mass[0], (mass[0] / (mass[0] + mass[1])).mean(), rtol=1e-9, atol=0)
    squares = [plan(value, torch.ones(value.shape[1]).double()).square().sum(1) for value in values]
    torch.testing.assert_close(found.effective_references[0], (4 / (squares[0] + squares[1])).mean(), rtol=1e-9, atol=0)


@pytest.mark.statistical
@pytest.mark.parametrize("normalization", ["joint", "two_sided"])
def test_the_signal_is_zero_in_expectation_at_equilibrium_and_not_away_from_it(normalization):
    generator = torch.Generator().manual_seed(4)
    field, repeats, z, share = raw_field(normalization=normalization, tau=0.3, subtract_noise=False), 1500, {}, {}
    for shift in (0.0, 1.5):
        signals, squares = [], []
        for _ in range(repeats):
            anchors = torch.randn(8, 2, generator=generator, dtype=torch.float64)
            cloud = torch.randn(36, 2, generator=generator, dtype=torch.float64)
            clouds = anchors, cloud[:24] + shift, cloud[24:]
            signals.append(field.signal(*clouds)[0])
            squares.append(field.diagnose(*clouds)[1].rms[0] ** 2)
        signal, square = torch.stack(signals), torch.stack(squares)
        z[shift] = (signal.mean() / signal.std() * repeats**0.5).item()
        share[shift] = (signal.mean() / square.mean()).item()
    assert abs(z[0.0]) < 4
    assert abs(share[0.0]) < 0.05  # while the raw square is all noise
    assert z[1.5] > 10
    assert share[1.5] > 0.1


@pytest.mark.statistical
def test_the_signal_is_near_the_square_of_the_population_drift():
    generator = torch.Generator().manual_seed(5)
    field, anchors = (
        raw_field(tau=0.3, subtract_noise=False),
        torch.randn(16, 2, generator=generator, dtype=torch.float64),
    )

    def draw(count):
        cloud = torch.randn(2 * count, 2, generator=generator, dtype=torch.float64)
        clouds = anchors, cloud[:count] + 1, cloud[count:]
        return field.signal(*clouds), field.diagnose(*clouds)[1].rms.square()

    population = draw(200_000)[1].item()
    signal, square = (torch.cat(found).mean().item() for found in zip(*(draw(64) for _ in range(400)), strict=True))
    assert abs(signal - population) < 0.3 * population
    assert square > 2 * population
