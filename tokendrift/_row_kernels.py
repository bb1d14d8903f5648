"""Passes over rows of logits as Triton kernels: one launch for many rows; a row is read twice and written once.

They do what the passes in `_lift_ops` do with operators of PyTorch, which remain the reference, and do the work where
Triton is missing.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# Triton reads the annotations of kernels, and those of Python's types mean nothing to it.

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, no_type_check

import torch
from torch import Tensor

BLOCK, WARPS = 4096, 8  # entries of a row that a program handles at a time, and its warps
tl: Any = None  # the language of Triton, once it is loaded


@functools.cache
def load() -> None:
    """Turn the functions below into kernels. Until then, this module does not need Triton."""
    import triton

    globals()["tl"] = triton.language
    for function in (_logits, _softmax, _slopes):
        globals()[function.__name__] = triton.jit(function, do_not_specialize=["start"])


@no_type_check
def _logits(row, columns, size, closed):
    """Return some logits of a row in float32, minus infinity at the closed column and beyond the end."""
    x = tl.load(row + columns, mask=columns < size, other=float("-inf")).to(tl.float32)
    return tl.where(columns == closed, float("-inf"), x)


@no_type_check
def _softmax(out, rows, index, start, stride, size, closed, BLOCK: tl.constexpr):
    """Write the softmax of row index[start + i] into row i of out."""
    number = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(index + start + number) * stride
    # 1. The largest logit and the mass under it, for each lane, then for the row.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        x = _logits(row, first + tl.arange(0, BLOCK), size, closed)
        higher = tl.maximum(top, x)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf would be NaN
        mass = mass * tl.exp(top - base) + tl.exp(x - base)
        top = higher
    peak = tl.max(top, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(mass * tl.exp(top - peak), axis=0)
    # 2. The probabilities.
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        p = tl.exp(_logits(row, columns, size, closed) - peak) / total
        tl.store(out + number * size + columns, p.to(out.dtype.element_ty), mask=columns < size)


@no_type_check
def _slopes(out, slopes, rows, index, start, stride, size, closed, BLOCK: tl.constexpr):
    """Write p (s - <p, s>) into row i of out: p the softmax of row index[start + i], s row i of slopes."""
    number = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(index + start + number) * stride
    slope = slopes + number * size
    # 1. As in `_softmax`, with the sum of s weighted by p beside the mass.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = _logits(row, columns, size, closed)
        s = tl.load(slope + columns, mask=columns < size, other=0.0).to(tl.float32)
        higher = tl.maximum(top, x)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp(top - base), tl.exp(x - base)
        mass, weighted = mass * shrink + weight, weighted * shrink + weight * s
        top = higher
    peak = tl.max(top, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    share = tl.exp(top - peak)
    total = tl.sum(mass * share, axis=0)
    mean = tl.sum(weighted * share, axis=0) / total
    # 2. The gradient.
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        p = tl.exp(_logits(row, columns, size, closed) - peak) / total
        s = tl.load(slope + columns, mask=columns < size, other=0.0).to(tl.float32)
        tl.store(out + number * size + columns, (p * (s - mean)).to(out.dtype.element_ty), mask=columns < size)


def softmax_into(p: Tensor, rows: Tensor, index: Tensor | None, start: int, mask_column: int) -> None:
    """Write the softmax of ``len(p)`` rows from ``start`` on into p, with the mask column closed."""
    load()
    with _on(rows):
        _softmax[(len(p),)](p, rows, *_common(rows, index, start, mask_column), BLOCK=BLOCK, num_warps=WARPS)


def slopes_into(out: Tensor, slopes: Tensor, rows: Tensor, index: Tensor | None, start: int, mask_column: int) -> None:
    """Write the gradient of the logits, p (s - <p, s>), into out, which may be the slopes s themselves."""
    load()
    with _on(rows):
        _slopes[(len(out),)](out, slopes, rows, *_common(rows, index, start, mask_column), BLOCK=BLOCK, num_warps=WARPS)


def _common(rows: Tensor, index: Tensor | None, start: int, mask_column: int) -> tuple[Any, ...]:
    index = torch.arange(len(rows), device=rows.device) if index is None else index
    return index.contiguous(), start, rows.stride(0), rows.shape[1], mask_column


def _on(rows: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()
