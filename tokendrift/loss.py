"""The drifting losses: logits, embedding matrix and frozen feature map in, one differentiable number out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from tokendrift._checks import (
    check_choice,
    check_count,
    check_floating,
    check_ids,
    check_mask,
    check_positive,
    check_same_device,
    check_tensor,
    fail,
)
from tokendrift.features import FeatureMap, PooledFeatures
from tokendrift.field import DriftField, Field, FieldDiagnostics
from tokendrift.lift import soft_token_lift
from tokendrift.references import FeatureQueue, gather, rank_count

Reduction = Literal["mean", "sum", "none"]


class Diagnostics(NamedTuple):
    """How a step of the loss went; detached, on the device of the logits (no sync until read).

    Attributes:
        field: Raw RMS, positive mass, effective references and own-pair weight for each temperature; None
            for a field of the user's that has no ``diagnose``.
        token_entropy: Mean entropy of p over predicted positions, nats, scalar.
        queue_real: Real features in the queue before this step's push.
        queue_generated: The same for generated features.
    """

    field: FieldDiagnostics | None
    token_entropy: Tensor
    queue_real: int
    queue_generated: int


class LossOutput(NamedTuple):
    """The loss, with gradient, and its diagnostics, without."""

    loss: Tensor
    diagnostics: Diagnostics


class _Batch(NamedTuple):
    """Features of the step, of all ranks where they are gathered; without gradient.

    Attributes:
        generated: Shape (N, M).
        real: Shape (N, M), in the same order.
        mine: Rows of this rank.
        share: Sequences of this rank over the mean number of sequences a rank; 1 where all have as many.
    """

    generated: Tensor
    real: Tensor
    mine: slice
    share: float


class _Frozen:
    """Hides a module from ``parameters()``, ``state_dict()`` and ``train()`` of its owner."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _DriftObjective(nn.Module):
    """What the losses share: checking, lifting, features, references and drift."""

    embedding: Tensor

    def __init__(
        self,
        embedding: Tensor,
        feature_map: FeatureMap,
        *,
        field: Field | None = None,
        queue_size: int = 1024,
        mask_id: int | None = None,
        exclude_paired_positive: bool = False,
        reduction: Reduction = "mean",
        workspace_mib: float = 256.0,
        across_ranks: bool = True,
    ) -> None:
        super().__init__()
        check_floating("embedding", check_tensor("embedding", embedding, ("V", "D")))
        if embedding.requires_grad:
            raise fail(
                "embedding requires grad, but the drifting loss compares features in a frozen space.",
                "Pass embedding.detach().clone() of the frozen encoder, not the matrix in training; to train an "
                "embedding through the lift, call tokendrift.soft_token_lift yourself.",
                embedding=embedding,
            )
        if not callable(feature_map):
            raise fail("feature_map must be a callable (B, L, D) -> (B, M).", feature_map=feature_map)
        if isinstance(feature_map, nn.Module):
            _check_frozen(feature_map)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        if mask_id is not None and not 0 <= mask_id < len(embedding):
            raise fail(f"mask_id must lie in [0, V) with V = {len(embedding)}.", mask_id=mask_id)
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self._feature_map = _Frozen(feature_map)
        self.field: Field = DriftField() if field is None else field
        self.mask_id, self.exclude_paired_positive = mask_id, exclude_paired_positive
        self.reduction: Reduction = reduction
        self.across_ranks = across_ranks
        self.workspace_mib = check_positive("workspace_mib", workspace_mib)
        self.queue_real = FeatureQueue(check_count("queue_size", queue_size))
        self.queue_generated = FeatureQueue(queue_size)

    @property
    def feature_map(self) -> FeatureMap:
        """The frozen feature map."""
        return self._feature_map.value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _DriftObjective:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self.feature_map, nn.Module):
            self.feature_map._apply(fn)
        return self

    def _checked(
        self,
        logits: Tensor,
        clean_ids: Tensor,
        noisy_ids: Tensor | None,
        predicted: Tensor | None,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Apply the input rules; return clean ids, ids for observed positions, and predicted positions."""
        check_floating("logits", check_tensor("logits", logits, ("B", "L", "V")))
        size = len(self.embedding)
        if logits.shape[-1] != size:
            raise fail(
                f"logits has {logits.shape[-1]} columns (V) but embedding has {size} rows (V).",
                "Denoiser and frozen encoder must share one vocabulary. If only one of them has an entry for the "
                "mask, drop that column of the logits or append a row to the embedding.",
                logits=logits,
                embedding=self.embedding,
            )
        clean_ids = check_ids("clean_ids", clean_ids, size, like=logits)
        check_same_device(
            "logits",
            logits,
            embedding=self.embedding,
            clean_ids=clean_ids,
            noisy_ids=noisy_ids,
            predicted=predicted,
            attention_mask=attention_mask,
        )
        if noisy_ids is not None:
            noisy_ids = check_ids("noisy_ids", noisy_ids, size, like=logits)
            if predicted is None and self.mask_id is not None:
                predicted = noisy_ids == self.mask_id
        elif predicted is not None:
            raise fail(
                "predicted was given without noisy_ids: what stands at the other positions is unknown.",
                "Pass noisy_ids=x_t, or leave predicted out to lift every position.",
            )
        if predicted is not None:
            predicted = check_mask("predicted", predicted, logits.shape[:2])
        if attention_mask is not None:
            attention_mask = check_mask("attention_mask", attention_mask, logits.shape[:2])
            if noisy_ids is None:
                noisy_ids = clean_ids  # read at padding only
            predicted = attention_mask if predicted is None else predicted & attention_mask
        return clean_ids, noisy_ids, predicted

    def _features(self, embeds: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return features as one cloud, (N, M): N is B, or B * W where the map gives windows (B, W, M)."""
        kwargs = {} if attention_mask is None else {"attention_mask": attention_mask}
        features = self.feature_map(embeds, **kwargs)
        windows = isinstance(features, Tensor) and features.ndim == 3
        check_tensor("feature_map(embeds)", features, ("B", "W", "M") if windows else ("B", "M"))
        if len(features) != len(embeds):
            raise fail("feature_map must return one row a sequence: (B, M), or (B, W, M) for windows.", got=features)
        return features.to(torch.promote_types(features.dtype, torch.float32)).flatten(0, -2)

    def _generated(
        self, logits: Tensor, noisy_ids: Tensor | None, predicted: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return features of the lifted logits, (N, M), with gradient."""
        with torch.autocast(logits.device.type, enabled=False):
            lifted = soft_token_lift(
                logits,
                self.embedding,
                noisy_ids=noisy_ids if predicted is not None else None,
                predicted=predicted,
                mask_id=self.mask_id,
                workspace_mib=self.workspace_mib,
            )
        features = self._features(lifted, mask)
        if features.device.type == "cpu" and not torch.compiler.is_compiling() and not features.isfinite().all():
            bad = logits.detach().isnan().any().item()
            raise fail(
                f"{'logits contain NaN' if bad else 'the features of the logits are not finite'}.",
                "Look for an overflow in the denoiser (a too high learning rate, float16 without scaling); nothing "
                "was pushed into the queues.",
                logits=logits,
            )
        return features

    @torch.no_grad()
    def _real(self, clean_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return features of the clean ids, (N, M), without gradient."""
        return self._features(nn.functional.embedding(clean_ids.long(), self.embedding), mask)

    @torch.no_grad()
    def _gather(self, generated: Tensor, real: Tensor) -> _Batch:
        """Return the features of all ranks, or those of this one where it works alone."""
        generated, own = generated.detach(), len(generated)
        ranks = rank_count() if self.across_ranks else 1
        if ranks == 1:
            return _Batch(generated, real, slice(0, own), 1.0)
        both, offset = gather(torch.cat([generated, real.to(generated)], dim=1))
        width = generated.shape[1]
        return _Batch(both[:, :width], both[:, width:], slice(offset, offset + own), own * ranks / len(both))

    @torch.no_grad()
    def _drift(self, batch: _Batch, diagnose: bool) -> tuple[Tensor, FieldDiagnostics | None]:
        """Return the drift of every generated feature of this rank, (N, M).

        Every rank computes the drift of all anchors and keeps its own rows: scales and column sums run over the
        anchors, so this alone gives every field what one process would have given it.
        """
        generated, real = batch.generated, batch.real
        # The current batch stands first, so that anchor i is negative i and its clean sequence positive i.
        positives = torch.cat([real, self.queue_real.features().to(real)]) if len(self.queue_real) else real
        negatives = generated
        if len(self.queue_generated):
            negatives = torch.cat([generated, self.queue_generated.features().to(generated)])
        own = torch.arange(len(generated), device=generated.device)
        pair = own if self.exclude_paired_positive else None
        diagnostics = None
        if diagnose and isinstance(self.field, DriftField):
            drift, diagnostics = self.field.diagnose(
                generated, positives, negatives, exclude_positive=pair, exclude_negative=own, pairs=own
            )
        else:
            drift = self.field(generated, positives, negatives, exclude_positive=pair, exclude_negative=own)
        return drift[batch.mine], diagnostics

    def _push(self, batch: _Batch) -> None:
        if self.training:
            self.queue_real.push(batch.real)
            self.queue_generated.push(batch.generated)

    def _reduce(self, per_sequence: Tensor, share: float) -> Tensor:
        if self.reduction == "none":
            return per_sequence
        return per_sequence.mean() * share if self.reduction == "mean" else per_sequence.sum()

    def _finish(
        self,
        per_sequence: Tensor,
        logits: Tensor,
        predicted: Tensor | None,
        field: FieldDiagnostics | None,
        return_diagnostics: bool,
        fill: tuple[int, int],
        share: float,
    ) -> Tensor | LossOutput:
        # Nothing predicted, nothing to learn: exactly zero, still attached to the graph.
        if predicted is not None:
            per_sequence = torch.where(predicted.any(dim=1), per_sequence, 0.0)
        loss = self._reduce(per_sequence, share)
        if not return_diagnostics:
            return loss
        return LossOutput(loss, Diagnostics(field, token_entropy(logits, predicted, self.mask_id), *fill))


class TokenDriftLoss(_DriftObjective):
    r"""The TokenDrift loss: distance of generated features to where an anti-symmetric field pulls them.

    .. math:: \mathcal L = \frac{1}{2B}\sum_i \lVert h_i - \mathrm{sg}(h_i + \alpha V_i)\rVert^2

    h are features of the lifted logits, V the drift toward features of real text and away from
    generated ones (this batch and two queues). The gradient is :math:`-\alpha V_i/B` in h and
    :math:`-\alpha J_h^\top V/B` in the logits; exactly zero at positions that are not predicted.

    The value says little: with RMS normalisation the drift keeps its size for ever. Watch
    ``diagnostics.field.rms`` and the samples instead.

    Statistics (the RMS, the softmax over references) are those of the call: with gradient accumulation
    they belong to the micro-batch and the queues, and k micro-batches equal one batch only in the sense of
    the paper's algorithm, not to the digit.

    Args:
        embedding: E of the frozen encoder, (V, D), without gradient.
        feature_map: Frozen callable, embeddings (B, L, D) to features (B, M), or (B, W, M) for W windows: their
            cloud has B * W points and a sequence's loss is the mean over its windows. A module must be in
            evaluation mode with no parameter that requires grad; see `PooledFeatures`.
        field: Drift field; ``DriftField()`` by default. Any callable with the signature of `Field`.
        drift_scale: alpha.
        queue_size: Capacity of each of the two queues, in features; 0 uses the batch alone.
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
    are those of the whole batch.

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
        window: int | None = None,
        sigma: float = 0.0,
        **options: Any,
    ) -> TokenDriftLoss:
        """Build the loss from a backbone: a frozen copy of it gives the embedding and the pooled features.

        Args:
            encoder: A `DiT`, or any module with ``hidden_states`` (see `PooledFeatures`) and either
                ``vocab_embed.embedding`` or ``get_input_embeddings()``.
            layers: Hidden layers that are pooled.
            window: Positions pooled into one vector; the whole sequence by default, as in the paper.
            sigma: Noise level that a time-conditioned encoder is told; clean by default.
            options: Those of `TokenDriftLoss`.
        """
        features = PooledFeatures(encoder, layers=layers, window=window, sigma=sigma)
        frozen: Any = features.encoder
        embedding: Tensor
        if hasattr(frozen, "vocab_embed"):
            embedding = frozen.vocab_embed.embedding
        elif hasattr(frozen, "get_input_embeddings"):
            embedding = frozen.get_input_embeddings().weight
        else:
            raise fail(
                "encoder shows no input embedding (vocab_embed.embedding or get_input_embeddings()).",
                "Pass the parts: TokenDriftLoss(embedding, feature_map).",
                encoder=type(encoder).__name__,
            )
        return cls(embedding.detach(), features, **options)

    @overload
    def forward(
        self,
        logits: Tensor,
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
        logits: Tensor,
        clean_ids: Tensor,
        *,
        noisy_ids: Tensor | None = ...,
        predicted: Tensor | None = ...,
        attention_mask: Tensor | None = ...,
        return_diagnostics: Literal[True],
    ) -> LossOutput: ...

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
        """Return the loss.

        Args:
            logits: Raw denoiser output (B, L, V), any float dtype.
            clean_ids: x0, integer ids (B, L).
            noisy_ids: x_t (B, L): what stands at positions that are not predicted.
            predicted: M, bool (B, L). Omitted: ``noisy_ids == mask_id`` if both are known, else all.
            attention_mask: Positions that are text, (B, L); padding is neither predicted nor pooled.
            return_diagnostics: Return a `LossOutput` with diagnostics (one more pass over the logits).

        Returns:
            A float32 (or wider) scalar, or (B,) for ``reduction="none"``. Sequences without a predicted
            position count as zero.
        """
        clean_ids, noisy_ids, predicted = self._checked(logits, clean_ids, noisy_ids, predicted, attention_mask)
        generated = self._generated(logits, noisy_ids, predicted, attention_mask)
        real = self._real(clean_ids, attention_mask)
        batch = self._gather(generated, real)
        drift, diagnostics = self._drift(batch, return_diagnostics)
        target = (generated + self.drift_scale * drift).detach()
        per_sequence = 0.5 * (generated - target).square().sum(dim=-1).view(len(logits), -1).mean(dim=1)
        fill = (len(self.queue_real), len(self.queue_generated))
        self._push(batch)
        return self._finish(per_sequence, logits, predicted, diagnostics, return_diagnostics, fill, batch.share)


class MirrorTeacherLoss(_DriftObjective):
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
        """Return the loss; arguments and result as in `TokenDriftLoss.forward`."""
        clean_ids, noisy_ids, predicted = self._checked(logits, clean_ids, noisy_ids, predicted, attention_mask)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if predicted is not None:  # not only their loss: 0 * NaN would reach the gradient
            wide = torch.where(predicted[..., None], wide, 0.0)
        with torch.enable_grad():
            leaf = wide.detach().requires_grad_()
            generated = self._generated(leaf, noisy_ids, predicted, attention_mask)
            real = self._real(clean_ids, attention_mask)
            batch = self._gather(generated, real)
            drift, diagnostics = self._drift(batch, return_diagnostics)
            weight = len(logits) / len(generated)  # 1 / W: the mean over windows, as in the feature loss
            (direction,) = torch.autograd.grad(generated, leaf, weight * drift.to(generated.dtype))
        if self.distance == "mse":
            # The teacher differs from the logits by eta * g, a constant: this form keeps the value and the gradient.
            per_token = (wide - (wide.detach() + self.step_size * direction)).square().sum(dim=-1)
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


@torch.no_grad()
def token_entropy(logits: Tensor, predicted: Tensor | None = None, mask_id: int | None = None) -> Tensor:
    """Return the mean entropy in nats of softmax(logits) over predicted positions, a scalar.

    Args:
        logits: Shape (B, L, V).
        predicted: Positions that count, bool (B, L); all by default.
        mask_id: Entry without probability.
    """
    rows = logits.reshape(-1, logits.shape[-1]) if predicted is None else logits[predicted]
    rows = rows.to(torch.promote_types(logits.dtype, torch.float32))
    if mask_id is not None:
        rows = rows.index_fill(-1, torch.tensor(mask_id, device=rows.device), -torch.inf)
    log_p = rows.log_softmax(dim=-1)
    entropy = torch.special.entr(log_p.exp()).sum(dim=-1)
    return entropy.mean() if len(entropy) else entropy.sum()


def _check_frozen(module: nn.Module) -> None:
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if trainable or module.training:
        what = f"{len(trainable)} parameters that require grad ({trainable[0]}, ...)" if trainable else "training mode"
        raise fail(
            f"feature_map must be frozen, but it has {what}.",
            "Pass a frozen copy: copy.deepcopy(feature_map).eval().requires_grad_(False).",
            feature_map=type(module).__name__,
        )
