"""What the drifting losses share: input rules, lift, features, references, drift, reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tokendrift._checks import (
    check_choice,
    check_count,
    check_floating,
    check_frozen,
    check_ids,
    check_mask,
    check_mask_id,
    check_one_vocabulary,
    check_positive,
    check_same_device,
    check_tensor,
    fail,
)
from tokendrift._diagnostics import Diagnostics, LossOutput, token_entropy
from tokendrift.features import FeatureMap
from tokendrift.field import DriftField, Field, FieldDiagnostics
from tokendrift.lift import (
    LinearLogits,
    check_linear,
    linear_soft_token_lift,
    of_positions,
    soft_token_lift,
    straight_through_lift,
)
from tokendrift.references import FeatureQueue, gather, rank_count

Reduction = Literal["mean", "sum", "none"]
LIFTS = {"soft": soft_token_lift, "straight_through": straight_through_lift}


class Batch(NamedTuple):
    """Features of the step, of all ranks where they are gathered; without gradient.

    Attributes:
        generated: Shape (N, M).
        real: Shape (N, M), in the same order.
        mine: Rows of this rank.
        share: Sequences of this rank over the mean number of sequences with features a rank; 1 where all have as many.
    """

    generated: Tensor
    real: Tensor
    mine: slice
    share: float | Tensor


class _Frozen:
    """Hides feature map and embedding from ``parameters()``, ``state_dict()`` and ``train()`` of their owner.

    An embedding that shares its memory with a parameter of the feature map is read from there, so that the two are one
    in memory and in a pickle, also after ``.to()`` and ``deepcopy``.
    """

    def __init__(self, embedding: Tensor, feature_map: FeatureMap) -> None:
        self.feature_map = feature_map
        self._embedding: Tensor | tuple[nn.Module, str] = embedding.detach()
        for module in feature_map.modules() if isinstance(feature_map, nn.Module) else ():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype == embedding.dtype and parameter.is_set_to(embedding):
                    self._embedding = (module, name)

    @property
    def embedding(self) -> Tensor:
        if isinstance(self._embedding, Tensor):
            return self._embedding
        module, name = self._embedding
        return getattr(module, name).detach()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        if isinstance(self.feature_map, nn.Module):
            self.feature_map._apply(fn)
        if isinstance(self._embedding, Tensor):
            self._embedding = fn(self._embedding)


def mean_over_windows(values: Tensor, weights: Tensor | None, sequences: int) -> Tensor:
    """Return a value for each sequence, (B,), from one for each feature, (N,); zero for a sequence without any."""
    if weights is None:
        return values.view(sequences, -1).mean(dim=1)
    return (weights * torch.zeros_like(weights).masked_scatter(weights > 0, values)).sum(dim=1)


def _not_finite(logits: Tensor | LinearLogits) -> str:
    """Say where numbers went missing: in what came, or only in what was made of it."""
    parts = logits if isinstance(logits, LinearLogits) else (logits,)
    if not any(part.detach().isnan().any() for part in parts if part is not None):
        return "the features of the logits are not finite"
    return f"{'hidden, weight or bias' if isinstance(logits, LinearLogits) else 'logits'} contain NaN"


class DriftObjective(nn.Module):
    """What the losses share: checking, lifting, features, references and drift."""

    def __init__(
        self,
        embedding: Tensor,
        feature_map: FeatureMap,
        *,
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
            check_frozen("feature_map", feature_map)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_choice("lift", lift, tuple(LIFTS))
        if check_count("queue_size", queue_size) == 0 and not batch_as_references:
            raise fail("queue_size is 0 and batch_as_references False: nothing would be left to refer to.")
        check_mask_id(mask_id, len(embedding))
        self._frozen = _Frozen(embedding, feature_map)
        self.field: Field = DriftField() if field is None else field
        self.mask_id, self.exclude_paired_positive = mask_id, exclude_paired_positive
        self.reduction: Reduction = reduction
        self.lift, self.batch_as_references = lift, batch_as_references
        self.across_ranks = across_ranks
        self.workspace_mib = check_positive("workspace_mib", workspace_mib)
        self.queue_real = FeatureQueue(queue_size)
        self.queue_generated = FeatureQueue(queue_size)

    @property
    def feature_map(self) -> FeatureMap:
        """The frozen feature map."""
        return self._frozen.feature_map

    @property
    def embedding(self) -> Tensor:
        """E of the frozen encoder, (V, D)."""
        return self._frozen.embedding

    @contextmanager
    def frozen_queues(self) -> Iterator[None]:
        """Keep both queues as they are inside the block; its features enter, in order, when it ends.

        For gradient accumulation: all micro-batches of a step then see the same queues, and afterwards these hold what
        one batch would have left. If the block raises, nothing enters. Across ranks, all ranks have to do the same.
        """
        with self.queue_real.frozen(), self.queue_generated.frozen():
            yield

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DriftObjective:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._frozen.apply(fn)
        return self

    def _checked(
        self,
        logits: Tensor | LinearLogits,
        clean_ids: Tensor,
        noisy_ids: Tensor | None,
        predicted: Tensor | None,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Apply the input rules; return clean ids, ids for observed positions, and predicted positions."""
        if isinstance(logits, LinearLogits):
            check_linear(logits, self.embedding)
            if self.lift != "soft":
                raise fail(
                    f"lift={self.lift!r} needs the logits themselves, but LinearLogits came.",
                    "Pass torch.nn.functional.linear(*logits), or use lift='soft'.",
                )
        else:
            check_one_vocabulary(logits, self.embedding)
        name, like = "hidden" if isinstance(logits, LinearLogits) else "logits", of_positions(logits)
        size = len(self.embedding)
        clean_ids = check_ids("clean_ids", clean_ids, size, like=like)
        check_same_device(
            name,
            like,
            embedding=self.embedding,
            clean_ids=clean_ids,
            noisy_ids=noisy_ids,
            predicted=predicted,
            attention_mask=attention_mask,
        )
        if noisy_ids is not None:
            noisy_ids = check_ids("noisy_ids", noisy_ids, size, like=like)
            if predicted is None and self.mask_id is not None:
                predicted = noisy_ids == self.mask_id
        elif predicted is not None:
            raise fail(
                "predicted was given without noisy_ids: what stands at the other positions is unknown.",
                "Pass noisy_ids=x_t, or leave predicted out to lift every position.",
            )
        if predicted is not None:
            predicted = check_mask("predicted", predicted, like.shape[:2])
        if attention_mask is not None:
            attention_mask = check_mask("attention_mask", attention_mask, like.shape[:2])
            if noisy_ids is None:
                noisy_ids = clean_ids  # read at padding only
            predicted = attention_mask if predicted is None else predicted & attention_mask
        return clean_ids, noisy_ids, predicted

    def _features(self, embeds: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return features as one cloud, (N, M): N is B, or the number of windows where the map gives (B, W, M)."""
        kwargs = {} if attention_mask is None else {"attention_mask": attention_mask}
        features = self.feature_map(embeds, **kwargs)
        windows = isinstance(features, Tensor) and features.ndim == 3
        check_tensor("feature_map(embeds)", features, ("B", "W", "M") if windows else ("B", "M"))
        if len(features) != len(embeds):
            raise fail("feature_map must return one row a sequence: (B, M), or (B, W, M) for windows.", got=features)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        features = features if windows else features[:, None]
        present = self._present(attention_mask)
        if present is None:
            return features.flatten(0, -2)
        if present.shape != features.shape[:2]:
            raise fail("feature_map.present(attention_mask) must be bool (B, W).", present=present, features=features)
        return features[present]

    def _present(self, attention_mask: Tensor | None) -> Tensor | None:
        """Return which features are of text, bool (B, W), (B, 1) without windows; None where the map does not say."""
        present = getattr(self.feature_map, "present", None)
        return None if attention_mask is None or present is None else present(attention_mask)

    def _weights(self, attention_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the weight of each window in the mean of its sequence, (B, W); None where all are equal."""
        present = self._present(attention_mask)
        return None if present is None else present.to(like) / present.sum(dim=1, keepdim=True).clamp_min(1)

    def _generated(
        self, logits: Tensor | LinearLogits, noisy_ids: Tensor | None, predicted: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return features of the lifted logits, (N, M), with gradient."""
        if isinstance(logits, LinearLogits):
            lift = partial(linear_soft_token_lift, *logits)
        else:
            lift = partial(LIFTS[self.lift], logits)
        with torch.autocast(self.embedding.device.type, enabled=False):
            lifted = lift(
                self.embedding,
                noisy_ids=noisy_ids if predicted is not None else None,
                predicted=predicted,
                mask_id=self.mask_id,
                workspace_mib=self.workspace_mib,
            )
        features = self._features(lifted, mask)
        if features.device.type == "cpu" and not torch.compiler.is_compiling() and not features.isfinite().all():
            raise fail(
                f"{_not_finite(logits)}.",
                "Look for an overflow in the denoiser (a too high learning rate, float16 without scaling); nothing "
                "was pushed into the queues.",
                logits=of_positions(logits),
            )
        return features

    @torch.no_grad()
    def _real(self, clean_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return features of the clean ids, (N, M), without gradient."""
        return self._features(nn.functional.embedding(clean_ids.long(), self.embedding), mask)

    @torch.no_grad()
    def _gather(self, generated: Tensor, real: Tensor, weights: Tensor | None) -> Batch:
        """Return the features of all ranks, or those of this one where it works alone."""
        generated, own = generated.detach(), len(generated)
        ranks = rank_count() if self.across_ranks else 1
        if ranks == 1:
            share = 1.0 if weights is None else len(weights) / weights.sum().clamp_min(1)
            return Batch(generated, real, slice(0, own), share)
        columns, width = [generated, real.to(generated)], generated.shape[1]
        if weights is not None:  # they add up to the sequences that have features
            columns.append(weights[weights > 0][:, None])
        both, offset = gather(torch.cat(columns, dim=1))
        mine, share = slice(offset, offset + own), own * ranks / len(both)
        if weights is not None:
            share = len(weights) * ranks / both[:, -1].sum().clamp_min(1)
        return Batch(both[:, :width], both[:, width : 2 * width], mine, share)

    @torch.no_grad()
    def _drift(self, batch: Batch, diagnose: bool) -> tuple[Tensor, FieldDiagnostics | None]:
        """Return the drift of every generated feature of this rank, (N, M).

        Every rank computes the drift of all anchors and keeps its own rows: scales and column sums run over the
        anchors, so this alone gives every field what one process would have given it.
        """
        generated, own, pair = batch.generated, None, None
        positives, negatives = (q.features().to(generated) for q in (self.queue_real, self.queue_generated))
        if self.batch_as_references:
            # The current batch stands first, so that anchor i is negative i and its clean sequence positive i.
            real = batch.real.to(generated)
            positives = torch.cat([real, positives]) if len(positives) else real
            negatives = torch.cat([generated, negatives]) if len(negatives) else generated
            own = torch.arange(len(generated), device=generated.device)
            pair = own if self.exclude_paired_positive else None
        if not len(generated) or not len(positives):  # windows of padding alone; a first step with the queues alone
            return torch.zeros_like(generated[batch.mine]), None
        diagnostics = None
        if diagnose and isinstance(self.field, DriftField):
            drift, diagnostics = self.field.diagnose(
                generated, positives, negatives, exclude_positive=pair, exclude_negative=own, pairs=own
            )
        else:
            drift = self.field(generated, positives, negatives, exclude_positive=pair, exclude_negative=own)
        return drift[batch.mine], diagnostics

    def _push(self, batch: Batch) -> None:
        if self.training and len(batch.real):
            self.queue_real.push(batch.real)
            self.queue_generated.push(batch.generated)

    def _reduce(self, per_sequence: Tensor, share: float | Tensor) -> Tensor:
        if self.reduction == "none":
            return per_sequence
        return per_sequence.mean() * share if self.reduction == "mean" else per_sequence.sum()

    def _finish(
        self,
        per_sequence: Tensor,
        logits: Tensor | LinearLogits,
        predicted: Tensor | None,
        field: FieldDiagnostics | None,
        return_diagnostics: bool,
        fill: tuple[int, int],
        share: float | Tensor,
    ) -> Tensor | LossOutput:
        # Nothing predicted, nothing to learn: exactly zero, still attached to the graph.
        if predicted is not None:
            per_sequence = torch.where(predicted.any(dim=1), per_sequence, 0.0)
        loss = self._reduce(per_sequence, share)
        if not return_diagnostics:
            return loss
        return LossOutput(loss, Diagnostics(field, token_entropy(logits, predicted, self.mask_id), *fill))
