"""Registration of operators with `torch.library`: fake kernel and gradient in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
"""The function behind each registered operator, for tools that watch what it does inside."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of softmax and result: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., list[Tensor]],
    *,
    result: Callable[..., Any],
    differentiable: int,
    keep_outputs: bool = False,
) -> Any:
    """Register ``tokendrift::name`` and ``tokendrift::name_backward``; return the first.

    Both are opaque to the compiler, run without autograd inside, and are differentiable once.

    Args:
        name: Name of the operator.
        forward: The operator. Its first output may receive a gradient.
        backward: Its gradient: called with the gradient of the first output, all inputs, all outputs if
            ``keep_outputs``, and which gradients are needed. Returns one tensor for each differentiable input, empty
            where it is not needed.
        result: Called with the inputs; returns empty tensors of the form of the outputs.
        differentiable: Number of inputs, from the first on, that gradients flow to.
        keep_outputs: Save the outputs for the backward as well as the inputs.
    """
    operator = torch.library.custom_op(f"tokendrift::{name}", forward, mutates_args=())
    # The gradient takes what the operator takes; its schema is written out, since it is the same for all.
    declared = operator._opoverload._schema
    parts = ["Tensor grad", str(declared).partition("(")[2].rpartition(") ->")[0]]
    parts += [f"Tensor output{number}" for number in range(len(declared.returns))] if keep_outputs else []
    schema = f"({', '.join(parts)}, bool[] needed) -> Tensor[]"
    gradient = torch.library.custom_op(f"tokendrift::{name}_backward", backward, mutates_args=(), schema=schema)
    operator.register_fake(result)

    def fake_gradient(grad: Tensor, *arguments: Any) -> list[Tensor]:
        inputs, needed = arguments[:differentiable], arguments[-1]
        return [
            each.new_empty(each.shape) if need else grad.new_empty(0) for each, need in zip(inputs, needed, strict=True)
        ]

    gradient.register_fake(fake_gradient)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs[1:])
        kept = (*inputs, *outputs) if keep_outputs else inputs
        ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in kept))
        ctx.others, ctx.inputs = [None if isinstance(each, Tensor) else each for each in kept], len(inputs)

    def apply_gradient(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = (
            other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        )
        needed = list(ctx.needs_input_grad[:differentiable])
        found = gradient(grad.contiguous(), *arguments, needed)
        kept = (each if need else None for each, need in zip(found, needed, strict=True))
        return *kept, *(None for _ in range(ctx.inputs - differentiable))

    operator.register_autograd(apply_gradient, setup_context=setup_context)
    IMPLEMENTATIONS[operator._opoverload] = forward
    IMPLEMENTATIONS[gradient._opoverload] = backward
    return operator
