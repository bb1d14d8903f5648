r"""The soft-token lift: logits to expected embeddings, exact and without a kept softmax.

:math:`e = \mathrm{softmax}(\ell)\,E`. The plain form keeps the softmax (B, L, V) for its backward and needs a
second tensor of that size there. Here rows are lifted in chunks; the backward recomputes the softmax of
a chunk and takes the row term from the output,

.. math:: \partial\ell = p \odot \big(E\,\partial e - \langle e, \partial e\rangle\big),

so that beside logits and their gradient only one chunk is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokendrift._checks import (
    check_floating,
    check_ids,
    check_mask,
    check_positive,
    check_same_device,
    check_tensor,
    fail,
)

LEAST_ROWS = 64  # below this the matrix products of a chunk are too thin to be efficient


def soft_token_lift(
    logits: Tensor,
    embedding: Tensor,
    *,
    noisy_ids: Tensor | None = None,
    predicted: Tensor | None = None,
    mask_id: int | None = None,
    workspace_mib: float = 256.0,
) -> Tensor:
    r"""Lift logits to soft-token embeddings.

    .. math::
        e_{bl} = \mathrm{softmax}(\ell_{bl})\,E \quad (l \in M_b),\qquad e_{bl} = E[x_{t,bl}] \quad\text{otherwise}

    Args:
        logits: Raw denoiser output (B, L, V); float64, float32, bfloat16 or float16.
        embedding: E, the input embedding of the frozen encoder, (V, D).
        noisy_ids: x_t, integer ids (B, L): what stands at positions that are not predicted.
        predicted: M, bool (B, L); every position when omitted. Gradients elsewhere are exactly zero.
        mask_id: Vocabulary entry to take out of the softmax, as SUBS does; logits are not copied.
        workspace_mib: Scratch memory in MiB; rows are lifted in chunks that fit into it (64 at least).

    Returns:
        Shape (B, L, D), in float32 (float64 for float64 logits) whatever the dtype of the logits.
        Differentiable to logits and, if it requires grad, to the embedding; not twice.

    Raises:
        TokenDriftError: If shapes, dtypes or devices do not fit, ids are out of range, or observed
            positions come without noisy_ids.

    Source: TokenDrift (arXiv 2605.19470), section 3.1.

    >>> soft_token_lift(torch.zeros(1, 1, 2), torch.tensor([[1.0], [3.0]]))
    tensor([[[2.]]])
    """
    _check_lift(logits, embedding, mask_id)
    check_positive("workspace_mib", workspace_mib)
    batch, length, vocab = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.reshape(batch * length, vocab)
    table = embedding.to(dtype)
    chunk = max(LEAST_ROWS, int(workspace_mib * 2**20 / (2 * vocab * dtype.itemsize)))
    mask_column = -1 if mask_id is None else mask_id
    if predicted is None:
        lifted = _lift(rows, table, None, mask_column, chunk)
        return lifted.view(batch, length, -1)
    predicted = check_mask("predicted", predicted, logits.shape[:2])
    if noisy_ids is None:
        raise fail(
            "predicted was given without noisy_ids: what stands at the other positions is unknown.",
            "Pass noisy_ids=x_t, or leave predicted out to lift every position.",
        )
    noisy_ids = check_ids("noisy_ids", noisy_ids, embedding.shape[0], like=logits)
    check_same_device("logits", logits, predicted=predicted, noisy_ids=noisy_ids)
    index = predicted.reshape(-1).nonzero()[:, 0]
    lifted = _lift(rows, table, index, mask_column, chunk)
    observed = torch.nn.functional.embedding(noisy_ids.long(), table)
    return observed.view(batch * length, -1).index_copy(0, index, lifted).view(batch, length, -1)


def _check_lift(logits: Tensor, embedding: Tensor, mask_id: int | None) -> None:
    check_floating("logits", check_tensor("logits", logits, ("B", "L", "V")))
    check_floating("embedding", check_tensor("embedding", embedding, ("V", "D")))
    if logits.shape[-1] != embedding.shape[0]:
        raise fail(
            f"logits has {logits.shape[-1]} columns (V) but embedding has {embedding.shape[0]} rows (V).",
            "Denoiser and frozen encoder must share one vocabulary. If only one of them has an entry for the mask, "
            "drop that column of the logits or append a row to the embedding.",
            logits=logits,
            embedding=embedding,
        )
    if logits.device != embedding.device:
        raise fail(
            f"logits is on {logits.device} but embedding is on {embedding.device}.",
            "Move the embedding (or the whole loss with loss.to(device)).",
            logits=logits,
            embedding=embedding,
        )
    if mask_id is not None and not 0 <= mask_id < logits.shape[-1]:
        raise fail(f"mask_id must lie in [0, V) with V = {logits.shape[-1]}.", mask_id=mask_id)


def _softmax(rows: Tensor, index: Tensor | None, start: int, stop: int, mask_column: int, dtype: torch.dtype) -> Tensor:
    """Return the softmax of one chunk of rows, (c, V), with the mask column closed."""
    part = rows[start:stop] if index is None else rows.index_select(0, index[start:stop])
    if mask_column >= 0:
        part = part.to(dtype, copy=index is None)
        part[:, mask_column] = -torch.inf
    return torch.softmax(part, dim=-1, dtype=dtype)


@torch.library.custom_op("tokendrift::soft_token_lift", mutates_args=())
def _lift(rows: Tensor, table: Tensor, index: Tensor | None, mask_column: int, chunk: int) -> Tensor:
    count = len(rows) if index is None else len(index)
    out = table.new_empty(count, table.shape[1])
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        torch.mm(_softmax(rows, index, start, stop, mask_column, table.dtype), table, out=out[start:stop])
    return out


@_lift.register_fake
def _(rows: Tensor, table: Tensor, index: Tensor | None, mask_column: int, chunk: int) -> Tensor:
    return table.new_empty(len(rows) if index is None else len(index), table.shape[1])


@torch.library.custom_op("tokendrift::soft_token_lift_backward", mutates_args=())
def _lift_backward(
    grad: Tensor,
    rows: Tensor,
    table: Tensor,
    lifted: Tensor,
    index: Tensor | None,
    mask_column: int,
    chunk: int,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    count = len(lifted)
    grad_rows = torch.empty_like(rows) if index is None else torch.zeros_like(rows)
    grad_table = torch.zeros_like(table) if need_table else table.new_empty(0)
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        p = _softmax(rows, index, start, stop, mask_column, table.dtype)
        grad_e = grad[start:stop]
        if need_table:
            grad_table.addmm_(p.T, grad_e)
        row_term = (grad_e * lifted[start:stop]).sum(dim=-1, keepdim=True)
        if index is None and rows.dtype == table.dtype:
            target = grad_rows[start:stop]
            torch.mm(grad_e, table.T, out=target)
            target.sub_(row_term).mul_(p)
            continue
        part = (grad_e @ table.T).sub_(row_term).mul_(p)
        if index is None:
            grad_rows[start:stop] = part
        else:
            grad_rows.index_copy_(0, index[start:stop], part.to(rows.dtype))
    return grad_rows, grad_table


@_lift_backward.register_fake
def _(
    grad: Tensor,
    rows: Tensor,
    table: Tensor,
    lifted: Tensor,
    index: Tensor | None,
    mask_column: int,
    chunk: int,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(table) if need_table else table.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rows, table, index, mask_column, chunk = inputs
    ctx.save_for_backward(rows, table, output, *(() if index is None else (index,)))
    ctx.mask_column, ctx.chunk = mask_column, chunk


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    rows, table, lifted, *index = ctx.saved_tensors
    need_rows, need_table = ctx.needs_input_grad[:2]
    grad_rows, grad_table = _lift_backward(
        grad.contiguous(), rows, table, lifted, index[0] if index else None, ctx.mask_column, ctx.chunk, need_table
    )
    return grad_rows if need_rows else None, grad_table if need_table else None, None, None, None


_lift.register_autograd(_backward, setup_context=_setup_context)
