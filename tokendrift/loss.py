"""The drifting losses: logits, embedding matrix and frozen feature map in, one differentiable number out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from tokendrift._checks import check_choice, check_positive, fail
from tokendrift._diagnostics import Diagnostics, LossOutput, token_entropy
from tokendrift._objective import DriftObjective, mean_over_windows
from tokendrift.features import FeatureMap, PooledFeatures
from tokendrift.lift import LinearLogits, of_positions

__all__ = ["Diagnostics", "LossOutput", "MirrorTeacherLoss", "TokenDriftLoss", "token_entropy"]


class TokenDriftLoss(DriftObjective):
    r"""The TokenDrift loss: distance of generated features to where an anti-symmetric field pulls them.

    .. math:: \mathcal L = \frac{1}{2B}\sum_i \lVert h_i - \mathrm{sg}(h_i + \alpha V_i)\rVert^2

    h are features of the lifted logits, V the drift toward features of real text and away from
    generated ones (this batch and two queues). The gradient is :math:`-\alpha V_i/B` in h and
    :math:`-\alpha J_h^\top V/B` in the logits; exactly zero at positions that are not predicted.

    The value says little: with RMS normalisation the drift keeps its size for ever. Watch
    ``diagnostics.field.rms`` and the samples instead.

    Statistics (the RMS, the softmax over references) are those of the call, and with gradient accumulation each
    micro-batch is a call of its own, as in the paper: it sees itself and the queues and is pushed at once. Inside
    ``with loss.frozen_queues():`` the pushes wait for the end of the block, so that all micro-batches of a step see the
    same queues. With ``reduction="sum"``, divided by the number of sequences of all of them, they are then one batch,
    to the digit, where the drift of an anchor depends on that anchor and the queues alone:
    ``batch_as_references=False`` and ``DriftField(rms_normalize=False)`` with ``"joint"`` or ``"separate"``. They are
    not one batch where an anchor meets the features of its own call (``batch_as_references``, the default), nor where
    the field takes a scale or a sum over the anchors of the call: ``rms_normalize``, ``feature_scaling``,
    ``subtract_noise``, ``"two_sided"``, ``"sinkhorn"``.

    A base loss is added by hand, ``loss(...) + weight * base``; the paper names no weight, and its Gen.-PPL is better
    without (Table 4).

    Args:
        embedding: E of the frozen encoder, (V, D), without gradient.
        feature_map: Frozen callable, embeddings (B, L, D) to features (B, M), or (B, W, M) for W windows: their
            cloud has B * W points and a sequence's loss is the mean over its windows. A module must be in
            evaluation mode with no parameter that requires grad; see `PooledFeatures`.
        lift: ``"soft"``, or ``"straight_through"`` for the paper's ablation that collapses: hard tokens with the
            gradient of soft ones (`straight_through_lift`).
        field: Drift field; ``DriftField()`` by default. Any callable with the signature of `Field`.
        drift_scale: alpha.
        queue_size: Capacity of each of the two queues, in features; 0 uses the batch alone.
        batch_as_references: Let the features of the call attract and repel as well (default, as in the paper). If
            not, the queues alone do; the first call, with empty queues, then has zero loss and fills them.
        mask_id: Vocabulary entry without probability (MDLM's mask).
        exclude_paired_positive: Hide an anchor's own clean sequence from its positives (default: shown, as
            in the paper).
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value a sequence.
        workspace_mib: Scratch memory of the lift in MiB.
        across_ranks: Where a process group is initialised, gather the features of all ranks (without gradient), so
            that every anchor sees the whole batch and the queues are the same on every rank. Every rank must then
            call, in step; set ``loss.across_ranks = False`` for a call on one rank alone.

    Across ranks, ``"mean"`` is the sum over this rank's sequences over the number of sequences of all ranks, times
    the number of ranks: averaged over ranks, as DDP does with gradients, it is the loss of one process with the whole
    batch, for batches of unequal size too. ``"sum"`` and ``"none"`` stay those of this rank. Diagnostics of the field
    are those of the whole batch. Every rank computes the drift of all gathered anchors and keeps its own rows: RMS,
    column sums and transport plans run over the anchors and are exact this way, for a work that is small beside the
    model's.

    Embedding and feature map are not parameters, not in ``state_dict``, and never change mode; they move
    with ``.to()``. The queues are in ``state_dict``.

    Raises:
        TokenDriftError: For input that breaks a rule; nothing is pushed then.

    Source: TokenDrift (arXiv 2605.19470), sections 3.1 to 3.4, Algorithm 1.

    >>> loss = TokenDriftLoss(torch.eye(4), lambda e: e.mean(dim=1))
    >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
    >>> loss(logits, torch.tensor([[0, 1, 2], [1, 2, 3]])).backward()
    >>> logits.grad.shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, embedding: Tensor, feature_map: FeatureMap, *, drift_scale: float = 1.0, **options: Any) -> None:
        super().__init__(embedding, feature_map, **options)
        self.drift_scale = check_positive("drift_scale", drift_scale, symbol="alpha")

    @classmethod
    def from_encoder(
        cls,
        encoder: nn.Module,
        *,
        layers: Sequence[int] = (-2, -1),
        window: int | Sequence[int | None] | None = None,
        sigma: float = 0.0,
        normalize: bool = True,
        **options: Any,
    ) -> TokenDriftLoss:
        """Build the loss from a model: a frozen copy of it gives the embedding and the pooled features.

        Args:
            encoder: A `DiT`, a model of transformers, or any module with ``hidden_states`` (see `PooledFeatures`) and
                either ``vocab_embed.embedding`` or ``get_input_embeddings()``. Its vocabulary must be the denoiser's;
                for another one, build from parts with `map_vocabulary`.
            layers: Hidden layers that are pooled.
            window: Positions pooled into one vector; the whole sequence by default, as in the paper.
            sigma: Noise level that a time-conditioned encoder is told; clean by default.
            normalize: Divide features by their Euclidean norm.
            options: Those of `TokenDriftLoss`.
        """
        features = PooledFeatures(encoder, layers=layers, window=window, sigma=sigma, normalize=normalize)
        return cls(features.embedding, features, **options)

    @overload
    def forward(
        self,
        logits: Tensor | LinearLogits,
        clean_ids: Tensor,
        *,
        noisy_ids: Tensor | None = ...,
        predicted: Tensor | None = ...,
        attention_mask: Tensor | None = ...,
        return_diagnostics: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        logits: Tensor | LinearLogits,
        clean_ids: Tensor,
        *,
        noisy_ids: Tensor | None = ...,
        predicted: Tensor | None = ...,
        attention_mask: Tensor | None = ...,
        return_diagnostics: Literal[True],
    ) -> LossOutput: ...

    def forward(
        self,
        logits: Tensor | LinearLogits,
        clean_ids: Tensor,
        *,
        noisy_ids: Tensor | None = None,
        predicted: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_diagnostics: bool = False,
    ) -> Tensor | LossOutput:
        """Return the loss.

        Args:
            logits: Raw denoiser output (B, L, V), any float dtype; or `LinearLogits`, the hidden states with the output
                layer, where no tensor of that size should exist. Loss, gradients and diagnostics are the same.
            clean_ids: x0, integer ids (B, L).
            noisy_ids: x_t (B, L): what stands at positions that are not predicted.
            predicted: M, bool (B, L). Omitted: ``noisy_ids == mask_id`` if both are known, else all.
            attention_mask: Positions that are text, (B, L); padding is neither predicted nor pooled.
            return_diagnostics: Return a `LossOutput` with diagnostics (one more pass over the logits).

        Returns:
            A float32 (or wider) scalar, or (B,) for ``reduction="none"``. Sequences without a predicted
            position count as zero.

        Raises:
            TokenDriftError: If shapes, dtypes or devices do not fit, ids are out of range, features are not finite, or
                `LinearLogits` meet ``lift="straight_through"``.
        """
        clean_ids, noisy_ids, predicted = self._checked(logits, clean_ids, noisy_ids, predicted, attention_mask)
        generated = self._generated(logits, noisy_ids, predicted, attention_mask)
        real = self._real(clean_ids, attention_mask)
        weights = self._weights(attention_mask, generated)
        batch = self._gather(generated, real, weights)
        drift, diagnostics = self._drift(batch, return_diagnostics)
        target = (generated + self.drift_scale * drift).detach()
        squares = (generated - target).square().sum(dim=-1)
        per_sequence = mean_over_windows(0.5 * squares, weights, len(of_positions(logits)))
        fill = (len(self.queue_real), len(self.queue_generated))
        self._push(batch)
        return self._finish(per_sequence, logits, predicted, diagnostics, return_diagnostics, fill, batch.share)


class MirrorTeacherLoss(DriftObjective):
    r"""The paper's alternatives in logit space: match a teacher one mirror step along the drift.

    .. math::
        g = \partial_\ell \langle h(\ell), \mathrm{sg}(V)\rangle,\quad \ell^* = \mathrm{sg}(\ell + \eta g),\quad
        p^* = \mathrm{softmax}(\ell^*)

        \mathcal L_{KL} = \frac1B\sum_{i,\,t\in M_i} \mathrm{KL}(p^*_{it}\,\Vert\,p_{it}),\qquad
        \mathcal L_{MSE} = \frac1B\sum_{i,\,t\in M_i}\lVert \ell^*_{it} - \ell_{it}\rVert^2

    Args:
        embedding: E of the frozen encoder, (V, D).
        feature_map: Frozen callable, embeddings (B, L, D) to features (B, M).
        distance: ``"kl"`` or ``"mse"``.
        step_size: eta; the paper does not give its value.
        options: As for `TokenDriftLoss`.

    Source: TokenDrift (arXiv 2605.19470), section 3.4 and appendix D.
    """

    def __init__(
        self,
        embedding: Tensor,
        feature_map: FeatureMap,
        *,
        distance: Literal["kl", "mse"] = "kl",
        step_size: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(embedding, feature_map, **options)
        check_choice("distance", distance, ("kl", "mse"))
        self.distance, self.step_size = distance, check_positive("step_size", step_size, symbol="eta")

    def forward(
        self,
        logits: Tensor,
        clean_ids: Tensor,
        *,
        noisy_ids: Tensor | None = None,
        predicted: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_diagnostics: bool = False,
    ) -> Tensor | LossOutput:
        """Return the loss; arguments and result as in `TokenDriftLoss.forward`, but the logits must be a tensor."""
        if isinstance(logits, LinearLogits):
            raise fail(
                "the mirror teacher compares logits, but LinearLogits came.",
                "Pass torch.nn.functional.linear(*logits); TokenDriftLoss alone can do without the logits.",
            )
        if torch.is_inference_mode_enabled():
            raise fail("the mirror teacher takes a gradient of its own.", "Use torch.no_grad, not inference_mode.")
        clean_ids, noisy_ids, predicted = self._checked(logits, clean_ids, noisy_ids, predicted, attention_mask)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if predicted is not None:  # not only their loss: 0 * NaN would reach the gradient
            wide = torch.where(predicted[..., None], wide, 0.0)
        with torch.enable_grad():
            leaf = wide.detach().requires_grad_()
            generated = self._generated(leaf, noisy_ids, predicted, attention_mask)
            real = self._real(clean_ids, attention_mask)
            weights = self._weights(attention_mask, generated)
            batch = self._gather(generated, real, weights)
            drift, diagnostics = self._drift(batch, return_diagnostics)
            # 1 / W: the mean over windows, as in the feature loss.
            weight = len(logits) / len(generated) if weights is None else weights[weights > 0][:, None]
            (direction,) = torch.autograd.grad(generated, leaf, weight * drift.to(generated.dtype))
        if self.distance == "mse":
            # The teacher differs from the logits by eta * g, a constant: this form keeps the value and the gradient.
            gap = wide - (wide.detach() + self.step_size * direction)
            gap = gap.masked_fill(wide.isneginf(), 0.0)  # closed entries: -inf minus -inf would be NaN
            per_token = gap.square().sum(dim=-1)
        else:
            # Finite at closed entries, where 0 * (-inf - -inf) would be NaN.
            teacher = self._closed(leaf.detach() + self.step_size * direction).log_softmax(dim=-1).clamp_min(-1e6)
            student = self._closed(wide).log_softmax(dim=-1).clamp_min(-1e6)
            per_token = (teacher.exp() * (teacher - student)).sum(dim=-1)
        if predicted is not None:
            per_token = torch.where(predicted, per_token, 0.0)
        fill = (len(self.queue_real), len(self.queue_generated))
        self._push(batch)
        per_sequence = per_token.sum(dim=-1)
        return self._finish(per_sequence, logits, predicted, diagnostics, return_diagnostics, fill, batch.share)

    def _closed(self, logits: Tensor) -> Tensor:
        if self.mask_id is None:
            return logits
        return logits.index_fill(-1, torch.tensor(self.mask_id, device=logits.device), -torch.inf)
