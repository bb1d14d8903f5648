"""The passes over the vocabulary behind the objectives: `torch.library` operators over rows, without checks.

A loss needs one or three numbers of each row of logits. Forward and backward run on tiles of rows that stay in the
cache, in float32 or wider, so that beside the gradient of the logits nothing of their size is ever held. First
derivatives only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokendrift._operators import register, wide_dtype

EXCLUDED = -1e6  # upstream's finite stand-in for log 0; finite so that 0 * log p stays 0
TILE = {"cpu": 2**18, "cuda": 2**23}  # elements: 1 MB for the cache of a core, 32 MB for that of an H100


def _tiles(count: int, logits: Tensor) -> Iterator[slice]:
    step = max(1, TILE.get(logits.device.type, 2**18) // logits.shape[1])
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def log_prob_rows(logits: Tensor, ids: Tensor, index: Tensor, closed: int) -> Tensor:
    """Return log p of token ids[i] in row index[i] of logits (N, V), (K,); column ``closed`` is -1e6, -1 for none."""
    out = logits.new_empty(len(index), dtype=wide_dtype(logits.dtype))
    for span in _tiles(len(index), logits):
        part = logits.index_select(0, index[span]).to(out.dtype)
        if closed >= 0:
            part[:, closed] = EXCLUDED
        out[span] = part.gather(1, ids[span, None])[:, 0] - torch.logsumexp(part, dim=1)
    return out


def log_prob_rows_backward(
    grad: Tensor, logits: Tensor, ids: Tensor, index: Tensor, closed: int, needed: list[bool]
) -> list[Tensor]:
    """Return the gradient of `log_prob_rows` to the logits (N, V)."""
    out = torch.zeros_like(logits)
    for span in _tiles(len(index), logits):
        part = logits.index_select(0, index[span]).to(grad.dtype)
        if closed >= 0:
            part[:, closed] = EXCLUDED
        slope = torch.softmax(part, dim=1).mul_(-grad[span, None])
        slope.scatter_add_(1, ids[span, None], grad[span, None])
        out.index_copy_(0, index[span], slope.to(out.dtype))
    return [out]


def uniform_rows(logits: Tensor, noisy: Tensor, clean: Tensor, kappa: Tensor) -> Tensor:
    """Return sum_j log(1 + kappa p_j), p at ``noisy`` and p at ``clean``, (3, N), of logits (N, V)."""
    out = logits.new_empty(3, len(logits), dtype=wide_dtype(logits.dtype))
    for span in _tiles(len(logits), logits):
        p = torch.softmax(logits[span], dim=1, dtype=out.dtype)
        out[1, span] = p.gather(1, noisy[span, None])[:, 0]
        out[2, span] = p.gather(1, clean[span, None])[:, 0]
        out[0, span] = p.mul_(kappa[span, None]).log1p_().sum(dim=1)
    return out


def uniform_rows_backward(
    grad: Tensor, logits: Tensor, noisy: Tensor, clean: Tensor, kappa: Tensor, needed: list[bool]
) -> list[Tensor]:
    """Return the gradient of `uniform_rows` to the logits (N, V)."""
    out = torch.empty_like(logits)
    for span in _tiles(len(logits), logits):
        p = torch.softmax(logits[span], dim=1, dtype=grad.dtype)
        # d sum_j log(1 + kappa p_j) / d p_j, then through the softmax: p (g - <p, g>)
        slope = (p * kappa[span, None]).add_(1).reciprocal_().mul_((kappa * grad[0])[span, None])
        slope.scatter_add_(1, noisy[span, None], grad[1, span, None])
        slope.scatter_add_(1, clean[span, None], grad[2, span, None])
        slope.mul_(p)
        out[span] = slope.sub_(p.mul_(slope.sum(dim=1, keepdim=True)))
    return [out]


log_prob_at = register(
    "log_prob_at",
    log_prob_rows,
    log_prob_rows_backward,
    result=lambda logits, ids, index, closed: logits.new_empty(index.shape[0], dtype=wide_dtype(logits.dtype)),
    differentiable=1,
)
uniform_terms = register(
    "uniform_terms",
    uniform_rows,
    uniform_rows_backward,
    result=lambda logits, *_: logits.new_empty(3, logits.shape[0], dtype=wide_dtype(logits.dtype)),
    differentiable=1,
)
