r"""The soft-token lift: logits, or hidden states, to expected embeddings; exact and without a kept softmax.

:math:`e = \mathrm{softmax}(\ell)\,E`. The plain form keeps the softmax (B, L, V) for its backward and needs a
second tensor of that size there. Here rows are lifted in chunks; the backward recomputes the softmax of
a few rows at a time, and with it

.. math:: \partial\ell = p \odot \big(E\,\partial e - \langle e, \partial e\rangle\big),

so that the gradient of the logits is all that the backward holds of that size. `linear_soft_token_lift` does not
hold even the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import (
    check_corrupted,
    check_count,
    check_floating,
    check_mask_id,
    check_one_vocabulary,
    check_positive,
    check_same_device,
    check_tensor,
    fail,
)
from tokendrift._lift_ops import LEAST_ROWS, product_dtype, soft_lift
from tokendrift._linear_lift_ops import linear_lift
from tokendrift._operators import wide_dtype


class LinearLogits(NamedTuple):
    r"""Logits given by the input and the weights of the output layer, :math:`\ell = W h + b`, which are not computed.

    Pass this to `TokenDriftLoss` instead of the logits. The loss then uses `linear_soft_token_lift`: no tensor (B, L,
    V) is created, and hidden, weight and bias receive the same gradients as through the logits.
    ``torch.nn.functional.linear(*logits)`` is the logits themselves.

    Attributes:
        hidden: Input of the output layer, after its norm, (B, L, H); float64, float32, bfloat16 or float16.
        weight: W, (V, H). The product takes bfloat16 operands where hidden and weight both are.
        bias: b, (V,), or None.

    >>> output = torch.nn.Linear(3, 2)
    >>> torch.nn.functional.linear(*LinearLogits(torch.zeros(1, 1, 3), output.weight, output.bias)).shape
    torch.Size([1, 1, 2])
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


def soft_token_lift(
    logits: Tensor,
    embedding: Tensor,
    *,
    noisy_ids: Tensor | None = None,
    predicted: Tensor | None = None,
    mask_id: int | None = None,
    workspace_mib: float = 128.0,
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
        workspace_mib: Scratch memory of the forward in MiB; rows are lifted in chunks that fit into it (64 at
            least). The backward needs a few per cent of the logits beside their gradient.

    Returns:
        Shape (B, L, D), in float32 (float64 for float64 logits) whatever the dtype of the logits.
        Differentiable to logits and, if it requires grad, to the embedding; not twice.

    Logits in bfloat16 or float16 get a float32 softmax and float32 products. If the embedding is bfloat16 too, softmax
    and products have the precision of the plain form: sums in float32, operands and results rounded to bfloat16. Pass
    ``embedding.float()`` if precision matters more than speed.

    Raises:
        TokenDriftError: If shapes, dtypes or devices do not fit, ids are out of range, or observed
            positions come without noisy_ids.

    Source: TokenDrift (arXiv 2605.19470), section 3.1.

    >>> soft_token_lift(torch.zeros(1, 1, 2), torch.tensor([[1.0], [3.0]]))
    tensor([[[2.]]])
    """
    check_floating("embedding", check_tensor("embedding", embedding, ("V", "D")))
    check_one_vocabulary(logits, embedding)
    check_same_device("embedding", embedding, logits=logits)
    check_mask_id(mask_id, logits.shape[-1])
    check_positive("workspace_mib", workspace_mib)
    batch, length, vocab = logits.shape
    dtype = product_dtype(logits.dtype, embedding.dtype)
    rows = logits.reshape(batch * length, vocab)
    table = embedding.to(dtype)
    chunk = max(LEAST_ROWS, int(workspace_mib * 2**20 / (vocab * dtype.itemsize)))
    mask_column = -1 if mask_id is None else mask_id
    index, noisy_ids = _predicted_rows("logits", logits, embedding, noisy_ids, predicted)
    return _among_observed(soft_lift(rows, table, index, mask_column, chunk), table, index, noisy_ids, (batch, length))


def linear_soft_token_lift(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    *,
    noisy_ids: Tensor | None = None,
    predicted: Tensor | None = None,
    mask_id: int | None = None,
    workspace_mib: float = 128.0,
    vocab_block: int | None = None,
) -> Tensor:
    r"""Lift hidden states to soft-token embeddings without storing their logits.

    .. math:: e_{bl} = \mathrm{softmax}(W h_{bl} + b)\,E

    This is equivalent to `soft_token_lift` of ``torch.nn.functional.linear(hidden, weight, bias)``, with a fifth more
    work in matrix products and without the two tensors (B, L, V). The logits of one block of the vocabulary after the
    other are computed under a running maximum, and again in the backward pass. Use it if nothing else needs the logits.

    Args:
        hidden: Input of the output layer, (B, L, H); float64, float32, bfloat16 or float16.
        weight: W, (V, H).
        bias: b, (V,), or None.
        embedding: E, the input embedding of the frozen encoder, (V, D).
        noisy_ids: x_t, integer ids (B, L): what stands at positions that are not predicted.
        predicted: M, bool (B, L); every position when omitted. Gradients elsewhere are exactly zero.
        mask_id: Vocabulary entry to take out of the softmax, as SUBS does.
        workspace_mib: Scratch memory in MiB: two blocks of tokens times vocabulary entries fit into it.
        vocab_block: Vocabulary entries in a block. The default keeps a block in the cache of a CPU, or fills
            an accelerator.

    Returns:
        Shape (B, L, D), in float32 (float64 for float64 hidden states). Differentiable to hidden, weight, bias and
        embedding; not twice. The product of the output layer takes bfloat16 operands where hidden and weight both are
        bfloat16, that of the lift where hidden and embedding both are.

    Raises:
        TokenDriftError: As `soft_token_lift`, and if hidden, weight and bias do not fit.

    Source: TokenDrift (arXiv 2605.19470), section 3.1; the running maximum is that of arXiv 1805.02867.

    >>> linear_soft_token_lift(torch.zeros(1, 1, 3), torch.ones(2, 3), None, torch.tensor([[1.0], [3.0]]))
    tensor([[[2.]]])
    """
    check_floating("embedding", check_tensor("embedding", embedding, ("V", "D")))
    check_linear(LinearLogits(hidden, weight, bias), embedding)
    check_mask_id(mask_id, len(embedding))
    check_positive("workspace_mib", workspace_mib)
    on_cpu = hidden.device.type == "cpu"
    block = (1024 if on_cpu else 8192) if vocab_block is None else check_count("vocab_block", vocab_block, least=1)
    block = min(block, len(embedding))
    tokens = int(workspace_mib * 2**20 / (2 * block * wide_dtype(hidden.dtype).itemsize))
    tokens = max(LEAST_ROWS, min(tokens, 2**21 // block) if on_cpu else tokens)
    index, noisy_ids = _predicted_rows("hidden", hidden, embedding, noisy_ids, predicted)
    rows = hidden.reshape(-1, hidden.shape[-1])
    rows = rows if index is None else rows.index_select(0, index)
    lifted, _ = linear_lift(rows, weight, bias, embedding, -1 if mask_id is None else mask_id, tokens, block)
    return _among_observed(lifted, embedding, index, noisy_ids, (hidden.shape[0], hidden.shape[1]))


def straight_through_lift(
    logits: Tensor,
    embedding: Tensor,
    *,
    noisy_ids: Tensor | None = None,
    predicted: Tensor | None = None,
    mask_id: int | None = None,
    workspace_mib: float = 128.0,
) -> Tensor:
    r"""Look up the likeliest token, with the gradient of the soft lift (an ablation of the paper, which collapses).

    .. math:: y = \mathrm{onehot}(\arg\max p) - \mathrm{sg}(p) + p,\qquad e = y\,E

    The value is an embedding row, the gradient to the logits that of :math:`pE`, the gradient to the embedding
    that of the row. In the paper, models trained through it repeat a few tokens (sample entropy below 1.7 nats,
    Table 3); use `soft_token_lift` unless this is what you want to show.

    Arguments, result and errors are those of `soft_token_lift`.

    Source: TokenDrift (arXiv 2605.19470), Table 3.

    >>> straight_through_lift(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1.0], [3.0]]))
    tensor([[[3.]]])
    """
    soft = soft_token_lift(
        logits,
        embedding.detach() if isinstance(embedding, Tensor) else embedding,
        noisy_ids=noisy_ids,
        predicted=predicted,
        mask_id=mask_id,
        workspace_mib=workspace_mib,
    )
    with torch.no_grad():
        ids = _likeliest(logits, mask_id)
        if predicted is not None and noisy_ids is not None:
            ids = torch.where(predicted.bool(), ids, noisy_ids.long())
    return torch.nn.functional.embedding(ids, embedding).to(soft.dtype) + (soft - soft.detach())


def _likeliest(logits: Tensor, mask_id: int | None) -> Tensor:
    """Return the argmax over the entries that are open, (B, L), without a copy of the logits."""
    if mask_id is None:
        return logits.argmax(dim=-1)
    first, second = logits.topk(2, dim=-1).indices.unbind(dim=-1)
    return torch.where(first == mask_id, second, first)


def _predicted_rows(
    name: str, data: Tensor, embedding: Tensor, noisy_ids: Tensor | None, predicted: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return ascending indices of the predicted rows, and the ids at the others; None if all are predicted."""
    noisy_ids, predicted = check_corrupted(noisy_ids, predicted, mask_id=None, vocab_size=len(embedding), like=data)
    if predicted is None:
        return None, None
    check_same_device(name, data, predicted=predicted, noisy_ids=noisy_ids)
    # This waits for an accelerator, once a call: the number of predicted rows is the size of the products.
    return predicted.reshape(-1).nonzero()[:, 0], noisy_ids


def _among_observed(
    lifted: Tensor, table: Tensor, index: Tensor | None, noisy_ids: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """Return the lifted rows, (B, L, D), among the embeddings of what stands at the other positions."""
    if index is None or noisy_ids is None:
        return lifted.view(*shape, -1)
    observed = torch.nn.functional.embedding(noisy_ids.long().reshape(-1), table).to(lifted.dtype)
    return observed.index_copy_(0, index, lifted).view(*shape, -1)


def close_entry(logits: Tensor, entry: int | None) -> Tensor:
    """Return logits (..., V) with one vocabulary entry at minus infinity; the logits themselves for None."""
    if entry is None:
        return logits
    # Filled on the device: a tensor of a number of the host would be copied, and an accelerator waited for.
    return logits.index_fill(-1, torch.full((1,), entry, device=logits.device), -torch.inf)


def of_positions(logits: Tensor | LinearLogits) -> Tensor:
    """Return what has a row for each position, (B, L, ...): the hidden states, or the logits themselves."""
    return logits.hidden if isinstance(logits, LinearLogits) else logits


def check_linear(logits: LinearLogits, embedding: Tensor) -> None:
    """Require hidden states, weight and bias that go together, and a row of weight for every row of the embedding."""
    hidden, weight, bias = logits
    check_floating("hidden", check_tensor("hidden", hidden, ("B", "L", "H")))
    check_floating("weight", check_tensor("weight", weight, ("V", "H")))
    if hidden.shape[-1] != weight.shape[1]:
        raise fail(
            f"hidden has width {hidden.shape[-1]} (H) but weight has {weight.shape[1]} columns (H).",
            "Pass the input of the output layer, after its norm, and the weight of that layer in the shape of "
            "nn.Linear.",
            hidden=hidden,
            weight=weight,
        )
    if weight.shape[0] != embedding.shape[0]:
        raise fail(
            f"weight has {weight.shape[0]} rows (V) but embedding has {embedding.shape[0]} rows (V).",
            "Denoiser and frozen encoder must share one vocabulary.",
            weight=weight,
            embedding=embedding,
        )
    if bias is not None:
        check_floating("bias", check_tensor("bias", bias, ("V",)))
        if len(bias) != len(weight):
            raise fail(f"bias must have V = {len(weight)} entries, one for each row of weight.", bias=bias)
    check_same_device("hidden", hidden, weight=weight, bias=bias, embedding=embedding)
