"""Embeddings of distributions over the vocabulary, the soft inputs of DUO's curriculum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendrift._checks import check_ids, fail


def soft_embedding(soft: Tensor, weights: Tensor | None, embedding: Tensor) -> Tensor:
    """Return the mean embedding of a distribution at each position.

    Args:
        soft: Logits (B, L, V) of a float dtype, whose softmax is embedded; with weights, ids (B, L, K).
        weights: Weight of each of the K ids of a position, floating point (B, L, K), used as given; or None.
        embedding: Embedding matrix (V, D).

    Returns:
        Shape (B, L, D), in the dtype of the embedding.

    Raises:
        TokenDriftError: If the shapes or dtypes do not fit together, or an id is outside the vocabulary.

    Source: DUO (arXiv 2506.10892), models/dit.py; the sum over K ids is that of its efficient curriculum.

    >>> soft_embedding(torch.tensor([[[0, 2]]]), torch.tensor([[[0.5, 0.5]]]), torch.eye(3))
    tensor([[[0.5000, 0.0000, 0.5000]]])
    """
    if weights is None:
        if soft.ndim != 3 or not soft.is_floating_point() or soft.shape[-1] != len(embedding):
            raise fail(
                f"soft must be float logits (B, L, V) with V = {len(embedding)}.",
                "Ids (B, L, K) need their weights (B, L, K)." if soft.ndim == 3 else "",
                soft=soft,
            )
        wide = torch.promote_types(soft.dtype, torch.float32)
        return torch.softmax(soft, dim=-1, dtype=wide).to(embedding.dtype) @ embedding
    if soft.ndim != 3 or soft.is_floating_point() or weights.shape != soft.shape or not weights.is_floating_point():
        raise fail(
            "weights must be floating point of shape (B, L, K), one for each of the integer ids soft (B, L, K).",
            soft=soft,
            weights=weights,
        )
    check_ids("soft", soft.flatten(1), len(embedding))
    flat, share = soft.flatten(0, -2), weights.flatten(0, -2).to(embedding.dtype)
    bag = F.embedding_bag(flat, embedding, per_sample_weights=share, mode="sum")
    return bag.unflatten(0, soft.shape[:-1])
