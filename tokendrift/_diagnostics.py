"""How a step of the loss went: what is returned beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokendrift.field import FieldDiagnostics


class Diagnostics(NamedTuple):
    """How a step of the loss went; detached, on the device of the logits (no sync until read).

    Attributes:
        field: Raw RMS, positive mass, effective references and own-pair weight for each temperature; None
            for a field of the user's own, and where there was nothing to refer to yet.
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
def token_entropy(logits: Tensor, predicted: Tensor | None = None, mask_id: int | None = None) -> Tensor:
    """Return the mean entropy in nats of softmax(logits) over predicted positions, a scalar.

    Args:
        logits: Shape (B, L, V).
        predicted: Positions that count, bool (B, L); all by default.
        mask_id: Entry without probability.
    """
    rows = logits.reshape(-1, logits.shape[-1]) if predicted is None else logits[predicted]
    rows = rows.to(torch.promote_types(logits.dtype, torch.float32))
    if mask_id is not None:
        rows = rows.index_fill(-1, torch.tensor(mask_id, device=rows.device), -torch.inf)
    log_p = rows.log_softmax(dim=-1)
    entropy = torch.special.entr(log_p.exp()).sum(dim=-1)
    return entropy.mean() if len(entropy) else entropy.sum()
