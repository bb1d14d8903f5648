r"""Laws of drift fields, to be tested on any field with the signature of `tokendrift.field.Field`.

One line checks a field of your own over many drawn clouds::

    from tokendrift.testing import check_field

    def test_my_field_keeps_the_laws():
        check_field(my_field)

Each law is also a plain function, to be called with clouds of your own or from `clouds` inside
``hypothesis.given``: ``assert_antisymmetric(my_field, *cloud)``. This module needs hypothesis, which is no dependency
of the package.

The laws are those under which the drifting loss makes sense (arXiv 2605.19470, appendix C; 2602.04770, section
3): swapped sets give the opposite drift, equal sets give none, and neither the origin, nor the axes, nor the
order of the points matter. Two more hold for some good fields and not for others, and stand outside `check_field`:
`assert_score_identity` and `assert_unbiased_at_equilibrium`.

Deviations are measured against ``tolerance * max(1, largest drift)``.
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError("tokendrift.testing needs hypothesis, which is not installed: pip install hypothesis") from error

from tokendrift.testing.check import LAWS, check_field
from tokendrift.testing.claims import POTENTIALS, assert_score_identity, assert_unbiased_at_equilibrium
from tokendrift.testing.form import assert_exclusion_is_removal, assert_no_gradient, assert_well_formed
from tokendrift.testing.laws import (
    assert_antisymmetric,
    assert_equilibrium,
    assert_permutation_equivariant,
    assert_rotation_equivariant,
    assert_translation_invariant,
)
from tokendrift.testing.strategies import Cloud, clouds

__all__ = [
    "LAWS",
    "POTENTIALS",
    "Cloud",
    "assert_antisymmetric",
    "assert_equilibrium",
    "assert_exclusion_is_removal",
    "assert_no_gradient",
    "assert_permutation_equivariant",
    "assert_rotation_equivariant",
    "assert_score_identity",
    "assert_translation_invariant",
    "assert_unbiased_at_equilibrium",
    "assert_well_formed",
    "check_field",
    "clouds",
]
