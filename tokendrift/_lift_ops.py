"""The operators behind the lifts: `torch.library` operators over rows, without checks.

Matrix products are as large as they can be; the passes over the vocabulary between them run on tiles of a few rows,
which stay in the cache. Beside the gradient of the logits, which serves as scratch until its values are final, only a
tile or two is held.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from tokendrift import _row_kernels
from tokendrift._checks import warn_user
from tokendrift._operators import register, wide_dtype

LEAST_ROWS = 64  # below this the matrix products of a chunk are too thin to be efficient
LEAST_TILE = 16  # rows of a pass that is no product


def product_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of the operands of the products: bfloat16 if all are, else that of the result."""
    return torch.bfloat16 if set(dtypes) == {torch.bfloat16} else wide_dtype(dtypes[0])


def _tile(rows: Tensor, count: int, chunk: int) -> int:
    # On a GPU a tile has to be worth its launches, on a CPU it should stay in the cache.
    return max(LEAST_TILE, min(chunk, count // (32 if rows.is_cuda else 128)))


def _kernels(rows: Tensor) -> Any:
    """Return the module of kernels for rows of logits, or None where the operators of PyTorch do the work."""
    narrow = rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not rows.is_cuda or not narrow or rows.stride(1) != 1 or not _kernels_work(rows.device):
        return None
    return _row_kernels


@functools.cache
def _kernels_work(device: torch.device) -> bool:
    """Return whether Triton is there, compiles for a device, and gives what PyTorch gives. This waits for it, once."""
    if importlib.util.find_spec("triton") is None:
        return False
    rows, p = torch.arange(6.0, device=device).view(2, 3), torch.zeros(2, 3, device=device)
    try:
        _row_kernels.softmax_into(p, rows, None, 0, -1)
        return bool(torch.allclose(p, rows.softmax(dim=1), atol=1e-5))
    except Exception as error:  # whatever a compiler on this machine may lack, the result is the same without it
        warn_user(f"the Triton kernels do not run here, and PyTorch's operators are used: {error}")
        return False


def _scratch(rows: Tensor, index: Tensor | None, mask_column: int, dtype: torch.dtype, tile: int) -> Tensor | None:
    """Return a tile for logits that must be gathered, closed or widened before their softmax; None if none must."""
    if index is None and mask_column < 0 and rows.dtype == dtype:
        return None
    return rows.new_empty(tile, rows.shape[1], dtype=dtype)


def _softmax_into(
    p: Tensor, rows: Tensor, index: Tensor | None, start: int, mask_column: int, tile: int, scratch: Tensor | None
) -> None:
    """Write the softmax of ``len(p)`` rows from ``start`` on into p, with the mask column closed."""
    kernels = _kernels(rows)
    if kernels is not None:
        kernels.softmax_into(p, rows, index, start, mask_column)
        return
    for low in range(0, len(p), tile):
        high = min(low + tile, len(p))
        span = slice(start + low, start + high)
        if scratch is None:
            part = rows[span]
        elif index is None:
            part = scratch[: high - low].copy_(rows[span])
        elif rows.dtype == scratch.dtype:
            part = torch.index_select(rows, 0, index[span], out=scratch[: high - low])
        else:
            part = scratch[: high - low].copy_(rows.index_select(0, index[span]))
        if mask_column >= 0:
            part[:, mask_column].fill_(-torch.inf)
        torch.softmax(part, dim=-1, out=p[low:high])  # accumulates in float32 whatever the dtype


def lift_rows(rows: Tensor, table: Tensor, index: Tensor | None, mask_column: int, chunk: int) -> Tensor:
    """Return softmax(rows[index]) @ table, (len(index), D)."""
    count = len(rows) if index is None else len(index)
    # A buffer wider than the logits could hold more bytes than their gradient will: half the rows do.
    chunk = min(chunk, max(1, count if table.dtype == rows.dtype else max(LEAST_ROWS, count // 2)))
    chunk = max(1, -(-count // max(1, -(-count // chunk))))  # equal chunks: a short last product is slow
    out = rows.new_empty(count, table.shape[1], dtype=wide_dtype(rows.dtype))
    tile = _tile(rows, count, chunk)
    buffer = table.new_empty(chunk, table.shape[0])
    scratch = _scratch(rows, index, mask_column, table.dtype, tile)
    for start in range(0, count, chunk):
        target = out[start : start + chunk]
        p = buffer[: len(target)]
        _softmax_into(p, rows, index, start, mask_column, tile, scratch)
        if table.dtype == out.dtype:
            torch.mm(p, table, out=target)
        else:
            target.copy_(torch.mm(p, table))
    return out


def lift_rows_backward(
    grad: Tensor,
    rows: Tensor,
    table: Tensor,
    index: Tensor | None,
    mask_column: int,
    chunk: int,
    needed: list[bool],
) -> list[Tensor]:
    """Return the gradients of `lift_rows` to rows and table; those not needed are empty. ``index`` must ascend."""
    need_rows, need_table = needed
    count = len(grad)
    narrow = grad.to(table.dtype)
    # The gradient of the logits holds the products where it has their dtype; else a buffer of some rows does.
    in_place = rows.dtype == table.dtype
    step = max(count, 1) if in_place else max(LEAST_ROWS, min(chunk, count // 24))
    grad_rows = rows.new_empty(rows.shape if need_rows or in_place else 0)
    grad_table = torch.zeros_like(table) if need_table else table.new_empty(0)
    buffer = grad_rows[:count] if in_place else table.new_empty(min(step, count), table.shape[0])
    tile = _tile(rows, count, chunk)
    kernels = _kernels(rows)
    p_tile = table.new_empty(tile if need_rows and kernels is None else 0, table.shape[0])
    scratch = _scratch(rows, index, mask_column, table.dtype, tile)
    # Downwards: product i lies in row i until it moves to row index[i] >= i, over products that are done with.
    for start in reversed(range(0, count, step)):
        stop = min(start + step, count)
        product, upstream = buffer[: stop - start], narrow[start:stop]
        # The gradient to the table: p, then one product.
        if need_table:
            _softmax_into(product, rows, index, start, mask_column, tile, scratch)
            grad_table.addmm_(product.T, upstream)
        if not need_rows:
            continue
        # The gradient to the logits: E de, then p times what it exceeds its mean by, a tile at a time.
        torch.mm(upstream, table.T, out=product)
        for low in reversed(range(start, stop, tile)):
            high = min(low + tile, stop)
            p, dp = p_tile[: high - low], product[low - start : high - start]
            # In the cache, with sums in float32: the row term costs no pass over the vocabulary in memory. Rows that
            # move go through scratch, whose logits are done with: their new place may overlap this tile.
            gradient = dp if index is None or scratch is None else scratch[: high - low]
            if kernels is None:
                _softmax_into(p, rows, index, low, mask_column, tile, scratch)
                torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=gradient)
            else:
                kernels.slopes_into(gradient, dp, rows, index, low, mask_column)
            if index is not None:
                grad_rows.index_copy_(0, index[low:high], gradient.to(rows.dtype))
            elif not in_place:
                grad_rows[low:high].copy_(gradient)
    # Rows that are not predicted have no gradient.
    if index is not None and need_rows:
        predicted = torch.zeros(len(rows), dtype=torch.int8, device=rows.device).index_fill_(0, index, 1)
        grad_rows.index_fill_(0, predicted.argsort()[: len(rows) - count], 0.0)  # their number is known: no sync
    return [grad_rows if need_rows else rows.new_empty(0), grad_table]


def _result(rows: Tensor, table: Tensor, index: Tensor | None, mask_column: int, chunk: int) -> Tensor:
    count = rows.shape[0] if index is None else index.shape[0]  # len() would fix a size that is only known when run
    return rows.new_empty(count, table.shape[1], dtype=wide_dtype(rows.dtype))


soft_lift = register("soft_token_lift", lift_rows, lift_rows_backward, result=_result, differentiable=2)
