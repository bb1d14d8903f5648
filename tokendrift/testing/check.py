"""All laws of a field at once, on drawn clouds."""

from __future__ import annotations

from collections.abc import Callable, Collection

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tokendrift._checks import check_choice
from tokendrift.field import Field
from tokendrift.testing._report import TOLERANCE
from tokendrift.testing.form import assert_exclusion_is_removal, assert_no_gradient, assert_well_formed
from tokendrift.testing.laws import (
    assert_antisymmetric,
    assert_equilibrium,
    assert_permutation_equivariant,
    assert_rotation_equivariant,
    assert_translation_invariant,
)
from tokendrift.testing.strategies import Cloud, clouds

_CHECKS: dict[str, Callable[[Field, Cloud, float], None]] = {
    "well_formed": lambda field, cloud, _: assert_well_formed(field, *cloud),
    "no_gradient": lambda field, cloud, _: assert_no_gradient(field, *cloud),
    "antisymmetric": lambda field, cloud, tol: assert_antisymmetric(field, *cloud, tolerance=tol),
    "equilibrium": lambda field, cloud, tol: assert_equilibrium(
        field, cloud.anchors, cloud.negatives, cloud.exclude_negative, tolerance=tol
    ),
    "translation_invariant": lambda field, cloud, tol: assert_translation_invariant(field, *cloud, tolerance=tol),
    "rotation_equivariant": lambda field, cloud, tol: assert_rotation_equivariant(field, *cloud, tolerance=tol),
    "permutation_equivariant": lambda field, cloud, tol: assert_permutation_equivariant(field, *cloud, tolerance=tol),
    "exclusion_is_removal": lambda field, cloud, tol: assert_exclusion_is_removal(field, *cloud[:3], tolerance=tol),
}
LAWS: tuple[str, ...] = tuple(_CHECKS)
"""Names of the laws, for the ``skip`` of `check_field`."""


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
        AssertionError: With the law that is broken, the worst anchor, what it means and what usually breaks it.
            Hypothesis adds the smallest cloud it found.
        TokenDriftError: If ``skip`` names no law.

    Source: the laws and their exact conditions follow arXiv 2602.04770, section 3, and 2605.19470, appendix C.

    >>> from tokendrift import DriftField
    >>> check_field(DriftField(), max_examples=5)
    """
    for name in skip:
        check_choice("skip", name, LAWS)

    strategy = clouds() if strategy is None else strategy
    laws = [name for name in LAWS if name not in skip]
    if len(laws) == 1:  # no other law could be broken by the same fault
        _search(lambda cloud: _CHECKS[laws[0]](field, cloud, tolerance), strategy, max_examples)
        return
    broken: set[str] = set()

    def note_broken_laws(cloud: Cloud) -> None:
        for name in laws:
            try:
                _CHECKS[name](field, cloud, tolerance)
            except AssertionError:
                broken.add(name)
                return  # without its form, a drift cannot be asked for the other laws

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
