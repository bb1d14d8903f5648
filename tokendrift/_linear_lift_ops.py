"""The operator behind the lift of hidden states: logits exist only as one block of tokens and vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokendrift._lift_ops import product_dtype
from tokendrift._operators import register, wide_dtype


def _spans(size: int, step: int) -> Iterator[slice]:
    return (slice(low, min(low + step, size)) for low in range(0, size, step))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in the wide dtype; with out=, which autocast leaves alone."""
    product = torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))
    return product.to(wide_dtype(product.dtype))


def block_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, span: slice, mask_column: int) -> Tensor:
    """Return the logits of the vocabulary entries in span, with the mask column closed."""
    logits = _product(hidden, weight[span].to(hidden.dtype).T)
    if bias is not None:
        logits += bias[span]
    if span.start <= mask_column < span.stop:
        logits[:, mask_column - span.start].fill_(-torch.inf)
    return logits


def linear_lift_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, mask_column: int, tokens: int, block: int
) -> tuple[Tensor, Tensor]:
    """Return softmax(hidden @ weight.T + bias) @ table, (T, D); and the top logit and the mass under it, (T, 2)."""
    # The two products need not agree: bfloat16 scores of a model in mixed precision may lift a float32 embedding.
    dtype, wide = product_dtype(hidden.dtype, weight.dtype), wide_dtype(hidden.dtype)
    lift_dtype = product_dtype(hidden.dtype, table.dtype)
    out = hidden.new_zeros(len(hidden), table.shape[1], dtype=wide)
    scale = hidden.new_empty(len(hidden), 2, dtype=wide)
    for rows in _spans(len(hidden), tokens):
        inputs, sums = hidden[rows].to(dtype), out[rows]
        # Finite, so that a block without an open entry leaves 0 * exp(0) and not exp(-inf + inf).
        top = hidden.new_full((len(inputs), 1), torch.finfo(wide).min, dtype=wide)
        mass = torch.zeros_like(top)
        for span in _spans(len(table), block):
            p = block_logits(inputs, weight, bias, span, mask_column)
            higher = torch.maximum(top, p.amax(dim=1, keepdim=True))
            p.sub_(higher).exp_()
            shrink, top = (top - higher).exp_(), higher
            mass.mul_(shrink).add_(p.sum(dim=1, keepdim=True))
            sums.mul_(shrink).add_(_product(p.to(lift_dtype), table[span].to(lift_dtype)))
        sums.div_(mass)
        scale[rows] = torch.cat([top, mass], dim=1)
    return out, scale


def linear_lift_rows_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    mask_column: int,
    tokens: int,
    block: int,
    lifted: Tensor,
    scale: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """Return the gradients to hidden, weight, bias and table; those not needed are empty."""
    need_hidden, need_weight, need_bias, need_table = needed
    dtype, wide = product_dtype(hidden.dtype, weight.dtype), wide_dtype(hidden.dtype)
    lift_dtype = product_dtype(hidden.dtype, table.dtype)

    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0, dtype=wide)
    grad_weight, grad_bias, grad_table = (
        torch.empty_like(each) if need and each is not None else hidden.new_empty(0)
        for each, need in ((weight, need_weight), (bias, need_bias), (table, need_table))
    )
    top, mass = scale.split(1, dim=1)
    share = grad / mass  # divides p, once for each row
    row_term = (share * lifted).sum(dim=1, keepdim=True)
    for span in _spans(len(table), block):
        # Sums over tokens in the wide dtype, rounded once.
        size = span.stop - span.start
        weight_sum = grad.new_zeros(size if need_weight else 0, weight.shape[1])
        bias_sum = grad.new_zeros(size if need_bias else 0)
        table_sum = grad.new_zeros(size if need_table else 0, table.shape[1])
        for rows in _spans(len(hidden), tokens):
            inputs, upstream = hidden[rows].to(dtype), share[rows].to(lift_dtype)
            p = block_logits(inputs, weight, bias, span, mask_column).sub_(top[rows]).exp_()
            if need_table:
                table_sum += _product(p.to(lift_dtype).T, upstream)
            if not any(needed[:3]):
                continue
            # The gradient to the logits, and from it those to the operands of the output layer.
            slope = _product(upstream, table[span].to(lift_dtype).T).sub_(row_term[rows]).mul_(p)
            del p
            if need_bias:
                bias_sum += slope.sum(dim=0)
            slope = slope.to(dtype)
            if need_hidden:
                grad_hidden[rows] += _product(slope, weight[span].to(dtype))
            if need_weight:
                weight_sum += _product(slope.T, inputs)
        for need, gradient, total in (
            (need_weight, grad_weight, weight_sum),
            (need_bias, grad_bias, bias_sum),
            (need_table, grad_table, table_sum),
        ):
            if need:
                gradient[span] = total
    return [grad_hidden.to(hidden.dtype), grad_weight, grad_bias, grad_table]


def _result(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, mask_column: int, tokens: int, block: int
) -> tuple[Tensor, Tensor]:
    wide, count = wide_dtype(hidden.dtype), hidden.shape[0]  # len() would fix a size that is only known when run
    return hidden.new_empty(count, table.shape[1], dtype=wide), hidden.new_empty(count, 2, dtype=wide)


linear_lift = register(
    "linear_soft_token_lift",
    linear_lift_rows,
    linear_lift_rows_backward,
    result=_result,
    differentiable=4,
    keep_outputs=True,
)
