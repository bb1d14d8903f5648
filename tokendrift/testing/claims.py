"""Laws that a field may claim: a potential that it climbs, no bias where real and generated features agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokendrift._checks import check_count, check_positive, fail
from tokendrift.field import Field
from tokendrift.testing._report import TOLERANCE, Law, compare
from tokendrift.testing.strategies import Cloud

SCORE = Law(
    "score identity V = grad {potential}",
    "the drift does not climb what it is said to climb, so where it comes to rest says nothing about it.",
    "a temperature taken for another (tau is twice the variance of the Gaussian), the plain distance for its square, "
    "a sign, or the weights of one form with the potential of the other. A drift divided by its RMS is no gradient "
    "either: pass the raw field (rms_normalize=False).",
)

Potential = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Points (N, M), positives and negatives to one number a point, (N,), differentiable in the points."""


def _log_ratio(x: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Return the log of the ratio of the sums of exp(-d^2 / tau) over positives and over negatives, (N,)."""
    scaled = (-(x[:, None] - cloud).square().sum(-1) / temperature for cloud in (positives, negatives))
    above, below = (each.logsumexp(dim=1) for each in scaled)
    return above - below


POTENTIALS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "log_ratio": lambda x, positives, negatives, tau: tau / 2 * _log_ratio(x, positives, negatives, tau),
    "discriminator": lambda x, positives, negatives, tau: tau / 2 * _log_ratio(x, positives, negatives, tau).sigmoid(),
}
"""Named potentials of `assert_score_identity`."""


def assert_score_identity(
    field: Field,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    temperature: float = 1.0,
    potential: str | Potential = "log_ratio",
    tolerance: float = TOLERANCE,
) -> None:
    r"""Assert that the drift is the gradient of a potential.

    With :math:`\hat p, \hat q` the sums of :math:`e^{-d^2/\tau}` over positives and negatives, densities smoothed by a
    Gaussian of variance :math:`\tau/2`:

    * ``"log_ratio"``: :math:`V = \frac\tau2 \nabla \log(\hat p/\hat q)`, a difference of scores. This is the field with
      the Gaussian kernel and each side normalised alone.
    * ``"discriminator"``: :math:`V = \frac\tau2 \nabla a^+,\ a^+ = \hat p/(\hat p+\hat q)`. This is the joint field.

    The gradient is taken by autograd, so that the law is exact.

    Args:
        field: The field under test, raw: neither divided by its RMS nor averaged over temperatures.
        anchors: Shape (N, M).
        positives: Shape (P, M).
        negatives: Shape (Q, M).
        temperature: tau of a named potential.
        potential: A name from `POTENTIALS`, or your own: (points (N, M), positives, negatives) to (N,).
        tolerance: As in `assert_antisymmetric`.

    Raises:
        AssertionError: If the drift is another.
        TokenDriftError: If there is no potential of that name.

    Source: arXiv 2603.07514 and 2603.09936 for the difference of scores; the joint form is derived in the manual,
    page "The method".

    >>> from tokendrift import DriftField
    >>> field = DriftField(temperatures=(0.5,), normalization="separate", rms_normalize=False)
    >>> assert_score_identity(field, *torch.randn(3, 4, 2, dtype=torch.float64), temperature=0.5)
    """
    if not callable(potential) and potential not in POTENTIALS:
        raise fail(f"potential must be one of {', '.join(map(repr, POTENTIALS))}, or a callable.", potential=potential)
    check_positive("temperature", temperature, symbol="tau")
    with torch.enable_grad():
        x = anchors.detach().clone().requires_grad_()
        if callable(potential):
            name, height = "of your potential", potential(x, positives, negatives)
        else:
            name, height = potential, POTENTIALS[potential](x, positives, negatives, temperature)
        (gradient,) = torch.autograd.grad(height.sum(), x)
    law = SCORE._replace(statement=SCORE.statement.format(potential=name))
    drift = field(anchors, positives, negatives)
    compare(law, Cloud(anchors, positives, negatives), drift, gradient, tolerance)


def assert_unbiased_at_equilibrium(
    field: Field,
    *,
    anchors: int = 4,
    positives: int = 9,
    negatives: int = 4,
    width: int = 2,
    sample: Callable[[int, torch.Generator], Tensor] | None = None,
    draws: int = 400,
    limit: float = 5.0,
    seed: int = 0,
) -> None:
    r"""Assert that the drift is zero in expectation where real and generated features have one distribution.

    This is the state that training should come to rest in: finite sets, different on both sides, anchors that stand
    among the negatives and exclude themselves. Over many draws, the mean of the drift and of its part along the anchor,
    :math:`\langle V_i, x_i \rangle`, must be zero within their standard errors.

    Not every good field claims this. The raw joint field does, for any P and Q; with each side normalised alone, P and
    Q - 1 have to be equal (``positives=negatives - 1``); dividing by the RMS of the batch adds a small bias.

    Args:
        field: The field under test, raw.
        anchors: N.
        positives: P.
        negatives: Q, at least N: the anchors are the first of them.
        width: M of the default distribution, a standard normal.
        sample: Another distribution: (count, generator) to points (count, M), float64.
        draws: Number of draws. A bias of one standard deviation in 20 is found with 10,000 of them.
        limit: Largest mean, in standard errors. At 5, one right field in some hundred thousand fails; the draws
            are the same in every run.
        seed: Of the draws.

    Raises:
        AssertionError: If a mean is further from zero.
        TokenDriftError: If a number is out of range.

    Source: exchangeable references, as in a two-sample U-statistic; the biased forms are listed in the manual, page
    "The method".

    >>> from tokendrift import DriftField
    >>> assert_unbiased_at_equilibrium(DriftField((1.0,), rms_normalize=False), draws=50)
    """
    check_count("draws", draws, least=2)
    for name, count in (("anchors", anchors), ("positives", positives), ("width", width)):
        check_count(name, count, least=1)
    check_count("negatives", negatives, least=anchors)
    generator, own = torch.Generator().manual_seed(seed), torch.arange(anchors)
    found = []
    for _ in range(draws):
        count = positives + negatives
        if sample is None:
            points = torch.randn(count, width, generator=generator, dtype=torch.float64)
        else:
            points = sample(count, generator)
        generated, real = points[:negatives], points[negatives:]
        drift = field(generated[:anchors], real, generated, exclude_negative=own)
        along = (drift * generated[:anchors]).sum(dim=-1, keepdim=True)
        found.append(torch.cat([drift, along], dim=1).mean(dim=0))
    mean, error = torch.stack(found).mean(dim=0), torch.stack(found).std(dim=0) / draws**0.5
    z = torch.where(mean == 0, 0.0, mean / error).abs()
    if z.max() <= limit:
        return
    worst = int(z.argmax())
    names = [f"drift along axis {axis}" for axis in range(len(mean) - 1)] + ["drift along the anchor <V, x>"]
    raise AssertionError(
        "the field breaks the law: no bias at equilibrium, E V = 0 at p = q.\n"
        f"  Worst case: mean {names[worst]} {mean[worst]:.3g}, {z[worst]:.1f} standard errors from zero, allowed "
        f"{limit:g} (N = {anchors} anchors among Q = {negatives}, P = {positives}, {draws} draws).\n"
        "  What it means: a model that already matches real text is driven away from it, on average.\n"
        "  Usual cause: anchors that do not exclude themselves from the negatives, positives that belong to an anchor "
        "and are not excluded, sides normalised separately with different numbers of references, or division by RMS."
    )
