"""The field of the image paper as its official code runs it."""

from __future__ import annotations

import pytest
import torch

from tokendrift import TokenDriftError
from tokendrift.testing import LAWS, check_field
from tokendrift.variants import ExtendedDriftField, ImageDriftField


@pytest.mark.parametrize("case", ["plain", "neg", "weighted"])
def test_the_field_is_that_of_the_official_code(golden, case):
    numbers = golden("drift_field")
    key, parts = f"official.{case}.", ("gen", "pos", "neg")
    generated, positives, others = (numbers[f"official.{part}"][0] for part in parts)
    weights = {part: numbers[f"official.w_{part}"][0] for part in parts}
    negatives = generated if case == "plain" else torch.cat([generated, others])
    options = {"exclude_negative": torch.arange(len(generated))}
    if case == "weighted":
        options["positive_weights"] = weights["pos"]
        options["negative_weights"] = torch.cat([weights["gen"], weights["neg"]])
    field = ImageDriftField(tuple(numbers.params["official"]["R"]))
    for dtype, suffix, tolerance in (
        (torch.float64, "_float64", None),
        (torch.float32, "", numbers.tolerance["official_float32"]),
    ):
        clouds = [cloud.to(dtype) for cloud in (generated, positives, negatives)]
        raw, unit = field.raw(*clouds, **options)
        for i in range(3):
            numbers.assert_matches(raw[i].double(), f"{key}V_raw{suffix}.{i}", tolerance=tolerance)
        drift = field(*clouds, **options) / unit
        assert drift.dtype == dtype
        numbers.assert_matches(drift.double(), f"{key}V{suffix}", tolerance=tolerance)
    scale = unit * generated.shape[1] ** 0.5
    numbers.assert_matches(scale, f"{key}scale", tolerance=numbers.tolerance["official_float32"])


def test_it_keeps_the_laws_but_excludes_by_distance():
    check_field(ImageDriftField(), skip=["exclusion_is_removal"], max_examples=15)
    with pytest.raises(AssertionError, match="exclusion is removal"):
        check_field(ImageDriftField(), skip=set(LAWS) - {"exclusion_is_removal"}, max_examples=15)


def test_without_floor_and_exclusion_it_is_a_drift_field():
    """At temperatures this high no weight is near the floor of 1e-3; the image paper measures per coordinate."""
    generator = torch.Generator().manual_seed(0)
    anchors, positives, negatives = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (4, 5, 6))
    plain = ExtendedDriftField((2.0,), kernel="laplace", normalization="two_sided", feature_scaling=True)
    drift = ImageDriftField((2.0,))(anchors, positives, negatives)
    torch.testing.assert_close(drift, plain(anchors, positives, negatives), rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperatures", [(), (0.1, -1.0), 0.1])
def test_bad_temperatures_are_refused(temperatures):
    with pytest.raises(TokenDriftError, match="temperatures"):
        ImageDriftField(temperatures)


def test_bad_clouds_are_refused():
    with pytest.raises(TokenDriftError, match="negatives has width M = 3 but anchors have M = 2"):
        ImageDriftField()(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 3))
