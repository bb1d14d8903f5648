"""The drifting losses: logits, embedding matrix and frozen feature map in, one differentiable number out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tokendrift._checks import check_choice, check_options, check_scale, fail
from tokendrift._diagnostics import Diagnostics, LossOutput, token_entropy
from tokendrift._objective import DriftObjective, Reduction
from tokendrift.features import FeatureMap, PooledFeatures
from tokendrift.field import Field
from tokendrift.lift import LinearLogits, close_entry

__all__ = ["Diagnostics", "LossOutput", "MirrorTeacherLoss", "TokenDriftLoss", "token_entropy"]


class TokenDriftLoss(DriftObjective):
    r"""The TokenDrift loss: half the squared distance of generated features to their drifted targets.

    .. math:: \mathcal L = \frac{1}{2B}\sum_i \lVert h_i - \mathrm{sg}(h_i + \alpha V_i)\rVert^2

    h are features of the lifted logits, V the drift toward features of real text and away from
    generated ones (this batch and two queues). The gradient is :math:`-\alpha V_i/B` in h and
    :math:`-\alpha J_h^\top V/B` in the logits; exactly zero at positions that are not predicted.

    The value of the loss says little, because with RMS normalisation the size of the drift hardly changes. Monitor
    ``diagnostics.field.rms`` and the samples instead.

    The RMS and the softmax over references are computed within one call. With gradient accumulation, each micro-batch
    is a call of its own, as in the paper: it sees itself and the queues, and enters the queues at once. Inside
    ``with loss.frozen_queues():`` features enter the queues at the end of the block, so that all micro-batches of a
    step see the same queues. With ``reduction="sum"``, and after division by the total number of sequences, the result
    is then exactly that of one large batch if the drift of an anchor depends only on that anchor and the queues: with
    ``batch_as_references=False`` and ``DriftField(rms_normalize=False)`` in the form ``"joint"`` or ``"separate"``. It
    differs from that of one large batch if anchors are compared with the features of their own call
    (``batch_as_references``, the default), or if the field computes a scale or a sum over the anchors of the call:
    ``rms_normalize``, ``"two_sided"``, and most of `tokendrift.variants`.

    Anything else that calls the loss twice in a step, such as the closure of an optimiser, also fills the queues twice:
    use ``frozen_queues`` there as well. Gradient checkpointing of the loss itself computes it again during the backward
    pass and is an error in training mode, unless both passes are inside such a block. Checkpointing only the model is
    always possible.

    Features that are not finite never enter the queues. On a CPU they are an error. On an accelerator and in a compiled
    loss, where reading them would have to wait for the device, the loss is NaN. If the drift is zero and the queues
    will not change that, the loss warns once.

    To add a base loss, write ``loss(...) + weight * base``. The paper states no weight, and its Gen.-PPL is better
    without one (Table 4).

    Args:
        embedding: E of the frozen encoder, (V, D), without gradient.
        feature_map: Frozen callable, embeddings (B, L, D) to features (B, M), or (B, W, M) for W windows: the field
            then compares B * W features, and the loss of a sequence is the mean over its windows. A module must be in
            evaluation mode with no parameter that requires grad; see `PooledFeatures`.
        lift: ``"soft"`` (default), or ``"straight_through"`` for the paper's ablation that collapses: hard tokens with
            the gradient of soft ones (`tokendrift.lift.straight_through_lift`).
        field: Drift field; ``DriftField()`` by default. Any callable with the signature of `Field`.
        drift_scale: alpha. Default: 1.
        queue_size: Capacity of each of the two queues, in features; 0 uses the batch alone. Default: 1024.
        batch_as_references: Whether the features of the call are references as well. Default: True, as in the paper. If
            False, only the queues are; the first call then fills the empty queues and returns zero.
        mask_id: Id of the mask token of a masked model (MDLM). It gets no probability, and the call then needs
            ``noisy_ids``. Default: None, for uniform-state models.
        exclude_paired_positive: Hide an anchor's own clean sequence from its positives. Default: False, as in the
            paper.
        reduction: ``"mean"`` (default), ``"sum"``, or ``"none"`` for one value for each sequence.
        workspace_mib: Scratch memory of the lift in MiB. Default: 128.
        across_ranks: Where a process group is initialised, gather the features of all ranks (without gradient), so
            that every anchor sees the whole batch and the queues are the same on every rank. Every rank must then
            call, in step; set ``loss.across_ranks = False`` for a call on one rank alone. Default: True.

    Across ranks, ``"mean"`` is the sum over this rank's sequences over the number of sequences of all ranks, times the
    number of ranks: averaged over ranks, as DDP averages gradients, it is the loss of one process with the whole batch,
    even if the batches differ in size. ``"sum"`` and ``"none"`` refer to the sequences of this rank. Diagnostics of the
    field are those of the whole batch. Every rank computes the drift of all gathered anchors and keeps its own rows:
    RMS, column sums and transport plans include all anchors and are therefore exact. This costs little in comparison
    with the model.

    Embedding and feature map are not parameters, not in ``state_dict``, and never change mode; they move
    with ``.to()``. The queues are in ``state_dict``.

    Raises:
        TokenDriftError: For input that breaks a rule; nothing is pushed then. `UnknownOptionError`, a `TypeError` as
            well, for an option that does not exist; it names the nearest one.

    Source: TokenDrift (arXiv 2605.19470), sections 3.1 to 3.4, Algorithm 1.

    >>> loss = TokenDriftLoss(torch.eye(4), lambda e: e.mean(dim=1))
    >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
    >>> loss(logits, torch.tensor([[0, 1, 2], [1, 2, 3]])).backward()
    >>> logits.grad.shape
    torch.Size([2, 3, 4])
    """

    @check_options
    def __init__(
        self,
        embedding: Tensor,
        feature_map: FeatureMap,
        *,
        lift: Literal["soft", "straight_through"] = "soft",
        field: Field | None = None,
        drift_scale: float = 1.0,
        queue_size: int = 1024,
        batch_as_references: bool = True,
        mask_id: int | None = None,
        exclude_paired_positive: bool = False,
        reduction: Reduction = "mean",
        workspace_mib: float = 128.0,
        across_ranks: bool = True,
    ) -> None:
        super().__init__(
            embedding,
            feature_map,
            lift=lift,
            field=field,
            queue_size=queue_size,
            batch_as_references=batch_as_references,
            mask_id=mask_id,
            exclude_paired_positive=exclude_paired_positive,
            reduction=reduction,
            workspace_mib=workspace_mib,
            across_ranks=across_ranks,
        )
        self.drift_scale = check_scale("drift_scale", drift_scale, symbol="alpha")

    @classmethod
    @check_options
    def from_encoder(
        cls,
        encoder: nn.Module,
        *,
        layers: Sequence[int] = (-2, -1),
        window: int | Sequence[int | None] | None = None,
        sigma: float = 0.0,
        normalize: bool = True,
        lift: Literal["soft", "straight_through"] = "soft",
        field: Field | None = None,
        drift_scale: float = 1.0,
        queue_size: int = 1024,
        batch_as_references: bool = True,
        mask_id: int | None = None,
        exclude_paired_positive: bool = False,
        reduction: Reduction = "mean",
        workspace_mib: float = 128.0,
        across_ranks: bool = True,
    ) -> TokenDriftLoss:
        """Build the loss from a model: a frozen copy of it gives the embedding and the pooled features.

        Args:
            encoder: A `DiT`, a model of transformers, or any module with ``hidden_states`` (see `PooledFeatures`) and
                either ``vocab_embed.embedding`` or ``get_input_embeddings()``. Its vocabulary must be the denoiser's;
                for another one, build the loss from parts with `tokendrift.encoders.map_vocabulary`.
            layers: Indices of the hidden layers that are pooled. Default: the last two.
            window: Number of positions pooled into one vector, or several such numbers. Default: the whole sequence,
                as in the paper.
            sigma: Noise level ``-log alpha_t`` that a time-conditioned encoder receives. Default: 0, clean text.
            normalize: Divide features by their Euclidean norm. Default: True.
            mask_id: As in `TokenDriftLoss`. Default: the ``mask_id`` of the encoder where it has one, as a masked `DiT`
                and a `MaskedLMDenoiser` do.

        The other options are those of `TokenDriftLoss`.

        Raises:
            TokenDriftError: If the model shows no hidden states or no input embedding, or an option is not usable.
        """
        features = PooledFeatures(encoder, layers=layers, window=window, sigma=sigma, normalize=normalize)
        if mask_id is None:
            mask_id = getattr(encoder, "mask_id", getattr(features.encoder, "mask_id", None))
        return cls(
            features.embedding,
            features,
            lift=lift,
            field=field,
            drift_scale=drift_scale,
            queue_size=queue_size,
            batch_as_references=batch_as_references,
            mask_id=mask_id,
            exclude_paired_positive=exclude_paired_positive,
            reduction=reduction,
            workspace_mib=workspace_mib,
            across_ranks=across_ranks,
        )

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
            logits: Raw denoiser output (B, L, V), any float dtype. Log-probabilities give the same loss, since the
                softmax of both is the same; probabilities do not, and the first call warns of them. To avoid a tensor
                of this size, pass `LinearLogits`, the hidden states with the output layer; loss, gradients and
                diagnostics are the same.
            clean_ids: x0, integer ids (B, L), without the mask token.
            noisy_ids: x_t (B, L), the ids at positions that are not predicted. Required with ``mask_id``.
            predicted: M, bool (B, L). Default: ``noisy_ids == mask_id`` where the loss has a ``mask_id``, else all.
            attention_mask: Positions that are text, bool (B, L); padding is neither predicted nor pooled.
            return_diagnostics: Return a `LossOutput` with diagnostics (one more pass over the logits). Default: False.

        Returns:
            A float32 (or wider) scalar, or (B,) for ``reduction="none"``. Sequences without a predicted
            position count as zero.

        Raises:
            TokenDriftError: If shapes, dtypes or devices do not fit, ids are out of range, clean ids contain the mask,
                ``mask_id`` is set but ``noisy_ids`` is missing, features are not finite, or `LinearLogits` meet
                ``lift="straight_through"``. The values of ids are read on the CPU; on an accelerator, which would
                have to be waited for, only the first call looks for the mask among the clean ids.
        """
        inputs = self._failing_together(lambda: self._checked(logits, clean_ids, noisy_ids, predicted, attention_mask))
        step = self._step(inputs, return_diagnostics)
        features = step.generated.values
        # Feature minus target, without the rounding of their difference: a short drift would be lost in it.
        gap = (features - features.detach()) - self.drift_scale * step.drift
        squares = gap.square().sum(dim=-1)
        per_sequence = step.generated.mean_of_sequences(0.5 * squares)
        return self._finish(per_sequence, step, inputs, return_diagnostics)


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
        distance: ``"kl"`` (default) or ``"mse"``.
        step_size: eta. The paper does not give its value. Default: 1.

    The other options are those of `TokenDriftLoss`.

    Raises:
        TokenDriftError: As `TokenDriftLoss`.

    Source: TokenDrift (arXiv 2605.19470), section 3.4 and appendix D.
    """

    @check_options
    def __init__(
        self,
        embedding: Tensor,
        feature_map: FeatureMap,
        *,
        distance: Literal["kl", "mse"] = "kl",
        step_size: float = 1.0,
        lift: Literal["soft", "straight_through"] = "soft",
        field: Field | None = None,
        queue_size: int = 1024,
        batch_as_references: bool = True,
        mask_id: int | None = None,
        exclude_paired_positive: bool = False,
        reduction: Reduction = "mean",
        workspace_mib: float = 128.0,
        across_ranks: bool = True,
    ) -> None:
        super().__init__(
            embedding,
            feature_map,
            lift=lift,
            field=field,
            queue_size=queue_size,
            batch_as_references=batch_as_references,
            mask_id=mask_id,
            exclude_paired_positive=exclude_paired_positive,
            reduction=reduction,
            workspace_mib=workspace_mib,
            across_ranks=across_ranks,
        )
        check_choice("distance", distance, ("kl", "mse"))
        self.distance, self.step_size = distance, check_scale("step_size", step_size, symbol="eta")

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
                "the mirror teacher needs the logits themselves, but was given LinearLogits.",
                "Pass torch.nn.functional.linear(*logits). Only TokenDriftLoss accepts LinearLogits.",
            )
        if torch.is_inference_mode_enabled():
            raise fail("the mirror teacher takes a gradient of its own.", "Use torch.no_grad, not inference_mode.")
        inputs = self._failing_together(lambda: self._checked(logits, clean_ids, noisy_ids, predicted, attention_mask))
        predicted = inputs.predicted
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if predicted is not None:  # the logits too and not only their loss: 0 * NaN would reach the gradient
            wide = torch.where(predicted[..., None], wide, 0.0)
        # 1. The direction: the drift, pulled back from the features to the logits.
        with torch.enable_grad():
            leaf = wide.detach().requires_grad_()
            step = self._step(inputs._replace(logits=leaf), return_diagnostics)
            features = step.generated.values
            mean_drift = step.generated.weights()[:, None] * step.drift.to(features.dtype)
            (direction,) = torch.autograd.grad(features, leaf, mean_drift)
        # 2. The distance between the logits and the teacher, which is one step along that direction.
        if self.distance == "mse":
            # The teacher differs from the logits by eta * g, a constant: this form keeps the value and the gradient,
            # without the rounding of a difference.
            gap = (wide - wide.detach()) - self.step_size * direction
            gap = gap.masked_fill(wide.isneginf(), 0.0)  # closed entries: -inf minus -inf would be NaN
            per_token = gap.square().sum(dim=-1)
        else:
            # Finite at closed entries, where 0 * (-inf - -inf) would be NaN.
            teacher, student = (
                close_entry(each, self.mask_id).log_softmax(dim=-1).clamp_min(-1e6)
                for each in (leaf.detach() + self.step_size * direction, wide)
            )
            per_token = (teacher.exp() * (teacher - student)).sum(dim=-1)
        if predicted is not None:
            per_token = torch.where(predicted, per_token, 0.0)
        return self._finish(per_token.sum(dim=-1), step, inputs, return_diagnostics)
