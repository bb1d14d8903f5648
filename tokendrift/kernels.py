"""Kernels: the weight of a reference for an anchor as a function of their distance and a temperature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from tokendrift.modes import without_autocast

Kernel = Callable[[Tensor, float], Tensor]
"""Squared distances and temperature to log-weights, elementwise."""

REFINED_NUMBERS = 2**22  # coordinates at a time in `squared_distances`: 16 MiB of float32 in each of three tensors


def gaussian(squared: Tensor, temperature: float) -> Tensor:
    """Log of exp(-d^2 / tau): TokenDrift's kernel, a Gaussian of variance tau/2."""
    return squared / -temperature


def laplace(squared: Tensor, temperature: float) -> Tensor:
    """Log of exp(-d / tau): the kernel of Generative Modeling via Drifting (arXiv 2602.04770), equation 12."""
    return squared.sqrt() / -temperature


KERNELS: dict[str, Kernel] = {"gaussian": gaussian, "laplace": laplace}


def squared_distances(x: Tensor, y: Tensor, *, refine: bool = False) -> Tensor:
    """Return squared Euclidean distances (N, P) of centred clouds, never below zero.

    They are NaN for a point whose squared norm is above 2^-24 of the largest number of its dtype: a sum of squares
    over all coordinates and points would be infinite, and a point that is infinitely far away would not count.

    One matrix product; ``refine`` computes the pairs that nearly coincide from their difference, some at a time: in
    tight clusters these are nearly all pairs.
    """
    # Norms, unlike squares, need no second copy of the references.
    sizes = [torch.linalg.vector_norm(cloud, dim=-1).square() for cloud in (x, y)]
    own, other = (torch.where(size <= torch.finfo(size.dtype).max * 2.0**-24, size, torch.nan) for size in sizes)
    size = own[:, None] + other
    squared = torch.addmm(size, x, y.T, alpha=-2).clamp_min_(0)
    if refine:
        # This waits for an accelerator, once a block: how many pairs there are decides the sizes of what follows.
        for pairs in (squared < 1e-3 * size).nonzero().split(max(1, REFINED_NUMBERS // x.shape[1])):
            row, column = pairs.unbind(dim=1)
            squared[row, column] = (x[row] - y[column]).square().sum(-1)
    return squared


@contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off inside the block, whichever of PyTorch's two interfaces TF32 was switched on with.

    In a compiled graph TF32 stays as it is set: the switch is not a part of graphs.
    """
    with without_autocast(device):
        if device.type != "cuda" or torch.compiler.is_compiling():
            yield
            return
        matmul = torch.backends.cuda.matmul
        switch: Callable[[str], object] = torch.set_float32_matmul_precision
        if hasattr(matmul, "fp32_precision"):  # from torch 2.9; knows what was set through the older functions as well
            before, exact, switch = matmul.fp32_precision, "ieee", partial(setattr, matmul, "fp32_precision")
        else:
            before, exact = torch.get_float32_matmul_precision(), "highest"
        switch(exact)
        try:
            yield
        finally:
            switch(before)
