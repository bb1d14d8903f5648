"""A drift field of your own, property-tested for its laws, then used in the loss.

The field here is the gradient of a kernel mean discrepancy: every reference pulls (or pushes) with a force that fades
with distance. A second version with attraction one and a half times as strong looks harmless; the test finds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from torch import Tensor

import tokendrift as td
from tokendrift.testing import Cloud, assert_antisymmetric, check_field, clouds


@dataclass(frozen=True)
class DiscrepancyField:
    """V(x) = mean_j k(x, u_j) (u_j - x) - mean_k k(x, v_k) (v_k - x), with k = exp(-d^2 / tau)."""

    temperature: float = 0.2
    attraction: float = 1.0  # anything but 1 breaks anti-symmetry

    @torch.no_grad()
    def __call__(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor,
        *,
        exclude_positive: Tensor | None = None,
        exclude_negative: Tensor | None = None,
    ) -> Tensor:
        pull, sees_positive = self.force(anchors, positives, exclude_positive)
        push, sees_negative = self.force(anchors, negatives, exclude_negative)
        # Attraction without repulsion is not anti-symmetric: an anchor that sees one side only stays where it is.
        return torch.where(sees_positive & sees_negative, self.attraction * pull - push, 0.0)

    def force(self, anchors: Tensor, cloud: Tensor, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
        gap = cloud - anchors[:, None]  # (N, P, M); fine for a few thousand references
        seen = torch.ones(gap.shape[:2], dtype=torch.bool)
        if excluded is not None:
            seen = torch.arange(len(cloud)) != excluded[:, None]
        weight = torch.where(seen, (-gap.square().sum(-1) / self.temperature).exp(), 0.0)
        count = seen.sum(dim=1, keepdim=True)
        return (weight[..., None] * gap).sum(dim=1) / count.clamp_min(1), count > 0


# One law, on clouds that hypothesis draws: duplicates, far from the origin, P unlike Q, anchors among the negatives.
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(cloud=clouds())
def test_swapping_the_sets_flips_the_drift(cloud: Cloud) -> None:
    assert_antisymmetric(
        DiscrepancyField(),
        cloud.anchors,
        cloud.positives,
        cloud.negatives,
        exclude_positive=cloud.exclude_positive,
        exclude_negative=cloud.exclude_negative,
    )


def test_all_laws() -> None:
    check_field(DiscrepancyField(), max_examples=30)


if __name__ == "__main__":
    torch.set_num_threads(1)  # at this size, threads would only wait for one another
    test_swapping_the_sets_flips_the_drift()
    print("anti-symmetry holds on 50 drawn clouds")
    test_all_laws()
    print("so do the other laws: equal sets, translation, rotation, order, exclusion")

    one, other = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        assert_antisymmetric(DiscrepancyField(attraction=1.5), one, one.flip(0) + 0.1, other)
    except AssertionError as error:
        print("attraction of 1.5 is caught:", *str(error).splitlines()[:2], sep="\n  ")
    else:
        raise SystemExit("a field that is not anti-symmetric passed")

    loss = td.TokenDriftLoss(torch.eye(5), lambda embeds: embeds.mean(dim=1), field=DiscrepancyField())
    logits = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss(logits, torch.randint(5, (4, 8))).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    print("and the loss takes it: field=DiscrepancyField()\nok")
