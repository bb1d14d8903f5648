"""Diagnostics that a loss returns in addition to its value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import check_mask, check_mask_id, check_tensor
from tokendrift._lift_ops import LEAST_ROWS, product_dtype
from tokendrift._linear_lift_ops import block_logits
from tokendrift._operators import wide_dtype
from tokendrift.field import FieldDiagnostics
from tokendrift.lift import LinearLogits, close_entry, of_positions


class Diagnostics(NamedTuple):
    """Diagnostics of one call of the loss: detached tensors on the device of the logits.

    Attributes:
        field: Raw RMS, positive mass, effective references and own-pair weight for each temperature; None for a field
            of your own, or if there were no references yet.
        token_entropy: Mean entropy of p over predicted positions, nats, scalar.
        queue_real: Real features in the queue before this step's push.
        queue_generated: The same for generated features.
    """

    field: FieldDiagnostics | None
    token_entropy: Tensor
    queue_real: int
    queue_generated: int


class LossOutput(NamedTuple):
    """The loss, with gradient, and its diagnostics, without."""

    loss: Tensor
    diagnostics: Diagnostics


@torch.no_grad()
def token_entropy(logits: Tensor | LinearLogits, predicted: Tensor | None = None, mask_id: int | None = None) -> Tensor:
    """Return the mean entropy in nats of softmax(logits) over predicted positions, a scalar.

    Computed a few rows at a time, so no tensor of the size of the logits is made.

    Args:
        logits: Shape (B, L, V), any float dtype; or `LinearLogits`, which are multiplied here.
        predicted: Positions that count, bool (B, L); all by default.
        mask_id: Entry without probability.

    Returns:
        A float32 (or wider) scalar; zero where no position counts.

    Raises:
        TokenDriftError: If shapes do not fit, or the vocabulary has no entry ``mask_id``.

    >>> float(token_entropy(torch.zeros(1, 1, 2)))
    0.6931471824645996
    """
    positions = check_tensor("logits", of_positions(logits), ("B", "L", "V"))
    check_mask_id(mask_id, len(logits.weight) if isinstance(logits, LinearLogits) else positions.shape[-1])
    if predicted is not None:
        predicted = check_mask("predicted", predicted, positions.shape[:2])
    rows = positions.flatten(0, 1)
    # With ``predicted``, this waits for an accelerator: diagnostics cost a wait, the loss alone does not need it.
    index = torch.arange(len(rows), device=rows.device) if predicted is None else predicted.flatten().nonzero()[:, 0]
    total = rows.new_zeros((), dtype=wide_dtype(rows.dtype))
    for part in index.split(LEAST_ROWS):
        log_p = _open_logits(rows[part], logits, mask_id).log_softmax(dim=-1)
        total += torch.special.entr(log_p.exp()).sum()
    return total / max(1, len(index))


def _open_logits(rows: Tensor, logits: Tensor | LinearLogits, mask_id: int | None) -> Tensor:
    """Return the logits of rows taken from ``logits``, in the wide dtype, with the mask closed."""
    closed = -1 if mask_id is None else mask_id
    if isinstance(logits, LinearLogits):
        dtype = product_dtype(rows.dtype, logits.weight.dtype)
        return block_logits(rows.to(dtype), logits.weight, logits.bias, slice(0, len(logits.weight)), closed)
    return close_entry(rows.to(wide_dtype(rows.dtype)), mask_id)
