"""The message for a broken law: where the deviation is largest, what it means, and what usually causes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokendrift.testing.strategies import Cloud

TOLERANCE = 1e-8  # float64 clouds a hundred units from the origin, at temperatures down to 0.02


class Law(NamedTuple):
    """A law in words.

    Attributes:
        statement: Name and formula.
        meaning: What a field without it means for training.
        cause: What usually causes a violation.
    """

    statement: str
    meaning: str
    cause: str


def compare(law: Law, cloud: Cloud, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise AssertionError, with the worst anchor, where two drifts (N, M) of a cloud differ."""
    allowed = tolerance * max(1.0, expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    gap = (actual - expected).abs()
    gap = torch.where(gap.isfinite(), gap, torch.inf)  # inf - inf and NaN are no agreement
    worst = gap.max().item()
    if worst <= allowed:
        return
    row = int(gap.amax(dim=1).argmax())
    asked = numbers(expected[row]) if expected[row].isfinite().all() else "finite numbers"
    raise AssertionError(
        f"the field breaks the law: {law.statement}.\n"
        f"  Worst case: row {row} of {sizes(cloud)}, anchor at {numbers(cloud.anchors[row])}\n"
        f"    drift {numbers(actual[row])}, the law asks for {asked}\n"
        f"  Largest deviation {worst:.3g}, allowed {allowed:.3g}.\n"
        f"  What it means: {law.meaning}\n"
        f"  Usual cause: {law.cause}"
    )


def sizes(cloud: Cloud) -> str:
    """Say how large a cloud is."""
    anchors, positives, negatives = (len(points) for points in cloud[:3])
    return f"N = {anchors} anchors, P = {positives}, Q = {negatives}, width M = {cloud.anchors.shape[1]}"


def numbers(row: Tensor, most: int = 4) -> str:
    """Write the first coordinates of a point."""
    shown = ", ".join(f"{value:.4g}" for value in row[:most].tolist())
    return f"({shown}{', ...' if len(row) > most else ''})"
