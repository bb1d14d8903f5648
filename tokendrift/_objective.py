"""The common part of the drifting losses: input rules, lift, features, references, drift and reduction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokendrift._checks import (
    can_be_read,
    check_choice,
    check_clean_ids,
    check_corrupted,
    check_count,
    check_floating,
    check_frozen,
    check_ids,
    check_mask,
    check_mask_id,
    check_one_vocabulary,
    check_positive,
    check_same_device,
    check_takes,
    check_tensor,
    fail,
    looks_like_probabilities,
    warn_user,
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
from tokendrift.modes import without_autocast
from tokendrift.references import FeatureQueue, Gathered, gather, rank_count

T = TypeVar("T")
Reduction = Literal["mean", "sum", "none"]
LIFTS = {"soft": soft_token_lift, "straight_through": straight_through_lift}


class Inputs(NamedTuple):
    """A batch that has passed the input rules.

    Attributes:
        logits: Shape (B, L, V), or `LinearLogits`.
        clean_ids: x0, (B, L).
        noisy_ids: Ids at the positions that are not predicted, (B, L); None if all are predicted.
        predicted: Predicted positions, bool (B, L), or None if all are predicted.
        attention_mask: Positions that are text, bool (B, L), or None if all are text.
    """

    logits: Tensor | LinearLogits
    clean_ids: Tensor
    noisy_ids: Tensor | None
    predicted: Tensor | None
    attention_mask: Tensor | None


class Features(NamedTuple):
    """The features of a batch as one cloud.

    Attributes:
        values: One row for each feature, (N, M): N is B, or the number of windows of text in the batch.
        sequence: The sequence that each feature belongs to, ascending, int64 (N,).
        rows: B, the number of sequences, those without any feature included.
    """

    values: Tensor
    sequence: Tensor
    rows: int

    def weights(self) -> Tensor:
        """Return the weight of each feature in the mean of its sequence, (N,)."""
        ones = self.values.new_ones(len(self.values))
        count = ones.new_zeros(self.rows).index_add(0, self.sequence, ones)
        return 1 / count[self.sequence]

    def mean_of_sequences(self, numbers: Tensor) -> Tensor:
        """Return the mean of a number for each feature, (N,), over each sequence, (B,); zero where there is none."""
        return numbers.new_zeros(self.rows).index_add(0, self.sequence, numbers * self.weights().to(numbers))

    def first_of_sequence(self) -> Tensor:
        """Return which features are the first of their sequence, bool (N,): as many as sequences with features."""
        return self.sequence.diff(prepend=self.sequence.new_full((1,), -1)) != 0


class Step(NamedTuple):
    """The part of a call that is the same for all losses.

    Attributes:
        generated: Features of the lifted logits of this rank, with gradient.
        all_generated: The same of all ranks, detached, (N', M): what the field sees and the queue takes.
        all_real: Features of the clean text of all ranks, (N', M), in the same order.
        drift: Drift of each generated feature of this rank, (N, M).
        field: Diagnostics of the field, if they were asked for and it has some.
        sequences: Number of sequences with features on all ranks, a scalar.
        queued: Features in the two queues before this step.
    """

    generated: Features
    all_generated: Tensor
    all_real: Tensor
    drift: Tensor
    field: FieldDiagnostics | None
    sequences: Tensor
    queued: tuple[int, int]


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


def _not_finite(logits: Tensor | LinearLogits) -> str:
    """Return whether NaN or infinity occurs in the logits themselves, or only in what was computed from them."""
    parts = logits if isinstance(logits, LinearLogits) else (logits,)
    if not any(part.detach().isnan().any() for part in parts if part is not None):
        return "the features of the logits are not finite"
    return f"{'hidden, weight or bias' if isinstance(logits, LinearLogits) else 'logits'} contain NaN"


class DriftObjective(nn.Module):
    """Base of the drifting losses: input rules, lift, features, references and drift."""

    _called = False  # set by the first call
    _calls = 0  # those that meet other ranks
    _warned_of_zero = False

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
            raise fail("queue_size is 0 and batch_as_references is False, so anchors would have no references.")
        check_mask_id(mask_id, len(embedding))
        self._frozen = _Frozen(embedding, feature_map)
        self.field: Field = DriftField() if field is None else field
        self.mask_id, self.exclude_paired_positive = mask_id, exclude_paired_positive
        self.reduction: Reduction = reduction
        self.lift, self.batch_as_references = lift, batch_as_references
        self.across_ranks = across_ranks
        self.workspace_mib = check_positive("workspace_mib", workspace_mib)
        # On the device of the embedding: a loss from a model on a GPU needs no .to() of its own.
        self.queue_real = FeatureQueue(queue_size).to(embedding.device)
        self.queue_generated = FeatureQueue(queue_size).to(embedding.device)

    @property
    def queue_size(self) -> int:
        """Capacity of each of the two queues, in features."""
        return self.queue_real.capacity

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

        Use this for gradient accumulation: all micro-batches of a step then see the same queues, which afterwards
        contain the same features as after one large batch. If the block raises an exception, no feature enters. With
        several ranks, all of them must do the same.
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
    ) -> Inputs:
        """Apply the input rules; call it by `_failing_together`."""
        if isinstance(logits, LinearLogits):
            check_linear(logits, self.embedding)
            if self.lift != "soft":
                raise fail(
                    f"lift={self.lift!r} needs the logits themselves, but was given LinearLogits.",
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
        noisy_ids, predicted = check_corrupted(noisy_ids, predicted, mask_id=self.mask_id, vocab_size=size, like=like)
        if noisy_ids is None and self.mask_id is not None:
            raise fail(
                f"mask_id is {self.mask_id}, but neither noisy_ids nor predicted was given: every position would count "
                "as predicted.",
                "Pass noisy_ids=x_t. Where the whole text is masked, that is torch.full_like(clean_ids, mask_id).",
            )
        if attention_mask is not None:
            attention_mask = check_mask("attention_mask", attention_mask, like.shape[:2])
            if noisy_ids is None:
                noisy_ids = clean_ids  # read at padding only
            predicted = attention_mask if predicted is None else predicted & attention_mask
        inputs = Inputs(logits, clean_ids, noisy_ids, predicted, attention_mask)
        if not torch.compiler.is_compiling():
            self._refuse_slips(inputs)
        return inputs

    def _failing_together(self, work: Callable[[], T]) -> T:
        """Do what may fail on this rank alone; if it does, all ranks raise instead of waiting for each other."""
        if self._ranks() == 1:
            return work()
        try:
            return work()
        except Exception as error:
            self._gather(self.embedding.new_zeros(0, 0), error)
            raise

    def _gather(self, features: Tensor, error: Exception | None = None) -> Gathered:
        self._calls += 1
        return gather(features, call=self._calls, error=error)

    def _refuse_slips(self, inputs: Inputs) -> None:
        """Refuse or report arguments that have the right form but would give a wrong loss.

        These checks synchronise an accelerator. They are therefore made only at the first call, and only if the lift
        synchronises anyway to look up the predicted positions.
        """
        device = inputs.clean_ids.device.type
        first, self._called = not self._called, True
        if device == "meta" or (device != "cpu" and not (first and inputs.predicted is not None)):
            return
        if self.mask_id is not None:
            check_clean_ids(inputs.clean_ids, self.mask_id, inputs.attention_mask)
        if first and not isinstance(inputs.logits, LinearLogits) and looks_like_probabilities(inputs.logits):
            warn_user(
                f"logits look like probabilities: they are not negative and rows sum to one. {type(self).__name__} "
                "applies a softmax of its own, so that probabilities give a wrong loss; pass the raw output of the "
                "denoiser, or probabilities.log()."
            )

    def extra_repr(self) -> str:
        """Return the settings for ``print(loss)``, one on a line."""
        size, width = self.embedding.shape
        lines = [f"embedding: V={size}, D={width}, {self.embedding.dtype}"]
        for name, option in inspect.signature(type(self)).parameters.items():
            if option.kind is option.KEYWORD_ONLY and hasattr(self, name):
                lines.append(f"{name}={getattr(self, name)!r}")
        features = self.feature_map
        label = type(features) if isinstance(features, nn.Module) else features
        return "\n".join([*lines, f"feature_map: {getattr(label, '__qualname__', label)}"])

    def _step(self, inputs: Inputs, diagnose: bool) -> Step:
        """Return features and drift of a checked batch. Nothing is pushed into the queues yet."""
        # 1. Features of generated text, with gradient, and of real text, without.
        generated, real = self._failing_together(lambda: (self._generated(inputs), self._real(inputs)))
        with torch.no_grad():
            # 2. The features of all ranks.
            all_generated, all_real, first, offset = self._of_all_ranks(generated, real)
            # 3. The drift of every anchor. Scales and column sums run over the anchors, so that each rank computes
            # the drift of all of them and keeps its own rows: every field gives what it gives to one process.
            drift, field = self._drift(all_generated, all_real, diagnose)
        mine = slice(offset, offset + len(generated.values))
        queued = len(self.queue_real), len(self.queue_generated)
        return Step(generated, all_generated, all_real, drift[mine], field, first.sum(), queued)

    def _of_all_ranks(self, generated: Features, real: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return features of all ranks, which of them are the first of a sequence, and where those of this rank start.

        One collective call for all three, whose columns are put side by side.
        """
        own, first = generated.values.detach(), generated.first_of_sequence()
        if self._ranks() == 1:
            return own, real, first, 0
        everything, offset = self._gather(torch.cat([own, real.to(own), first[:, None].to(own)], dim=1))
        width = own.shape[1]
        return everything[:, :width], everything[:, width : 2 * width], everything[:, -1], offset

    def _ranks(self) -> int:
        return rank_count() if self.across_ranks else 1

    def _features(self, embeds: Tensor, attention_mask: Tensor | None) -> Features:
        """Return the features of embeddings (B, L, D), in float32 or wider."""
        kwargs = {} if attention_mask is None else {"attention_mask": attention_mask}
        remedy = "Let the mean over positions leave the padding out, or pass batches without padding."
        with check_takes("attention_mask", remedy, called="feature_map"):
            features = self.feature_map(embeds, **kwargs)
        windows = isinstance(features, Tensor) and features.ndim == 3
        check_tensor("feature_map(embeds)", features, ("B", "W", "M") if windows else ("B", "M"))
        if len(features) != len(embeds):
            raise fail(
                "feature_map must return one row for each sequence: (B, M), or (B, W, M) for windows.",
                features=features,
            )
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        features = features if windows else features[:, None]
        rows, width = features.shape[:2]
        present = getattr(self.feature_map, "present", None)
        here = None if attention_mask is None or present is None else present(attention_mask)
        if here is None:
            sequence = torch.arange(rows, device=features.device)[:, None].expand(rows, width).flatten()
            return Features(features.flatten(0, 1), sequence, rows)
        if here.shape != features.shape[:2]:
            raise fail("feature_map.present(attention_mask) must be bool (B, W).", present=here, features=features)
        # This waits for an accelerator: without padding, or a feature map with ``present``, it does not run.
        sequence, window = here.nonzero(as_tuple=True)
        return Features(features[sequence, window], sequence, rows)

    def _generated(self, inputs: Inputs) -> Features:
        """Return the features of the lifted logits, with gradient."""
        logits = inputs.logits
        if isinstance(logits, LinearLogits):
            lift = partial(linear_soft_token_lift, *logits)
        else:
            lift = partial(LIFTS[self.lift], logits)
        with without_autocast(self.embedding.device):
            lifted = lift(
                self.embedding,
                noisy_ids=inputs.noisy_ids,
                predicted=inputs.predicted,
                mask_id=self.mask_id,
                workspace_mib=self.workspace_mib,
            )
        features = self._features(lifted, inputs.attention_mask)
        if can_be_read(lifted) and not features.values.isfinite().all():
            raise fail(
                f"{_not_finite(logits)}.",
                "Look for an overflow in the denoiser (a too high learning rate, float16 without scaling); nothing "
                "was pushed into the queues.",
                logits=of_positions(logits),
            )
        return features

    @torch.no_grad()
    def _real(self, inputs: Inputs) -> Tensor:
        """Return the features of the clean text."""
        lookup = nn.functional.embedding(inputs.clean_ids.long(), self.embedding)
        features = self._features(lookup, inputs.attention_mask).values
        if can_be_read(features) and not features.isfinite().all():
            raise fail(
                "the features of the clean text are not finite.",
                "Look for an overflow in the feature map, or for NaN in the embedding; nothing was pushed into the "
                "queues.",
                features=features,
            )
        return features

    def _drift(self, generated: Tensor, real: Tensor, diagnose: bool) -> tuple[Tensor, FieldDiagnostics | None]:
        """Return the drift (N, M) of generated features, given real ones and both queues."""
        own = pair = None
        for queue in (self.queue_real, self.queue_generated):
            queue.check_width(generated)
        positives, negatives = (q.features().to(generated) for q in (self.queue_real, self.queue_generated))
        if self.batch_as_references:
            # The current batch stands first, so that anchor i is negative i and its clean sequence positive i.
            positives = torch.cat([real, positives]) if len(positives) else real
            negatives = torch.cat([generated, negatives]) if len(negatives) else generated
            own = torch.arange(len(generated), device=generated.device)
            pair = own if self.exclude_paired_positive else None
        alone = self.batch_as_references and (len(negatives) < 2 or (pair is not None and len(positives) < 2))
        if not len(generated) or not len(positives):  # windows of padding alone; a first step with the queues alone
            self._warn_of_zero(refills=self.training)
            return torch.zeros_like(generated), None
        options = {"exclude_positive": pair, "exclude_negative": own}
        field: FieldDiagnostics | None = None
        if diagnose and isinstance(self.field, DriftField):
            drift, field = self.field.diagnose(generated, positives, negatives, **options, pairs=own)
        else:
            drift = self.field(generated, positives, negatives, **options)
        if not isinstance(drift, Tensor) or drift.shape != generated.shape:
            raise fail("field must return a drift for each anchor, (N, M).", drift=drift, anchors=generated)
        if alone:
            self._warn_of_zero(refills=self.training and self.queue_size > 0)
        elif can_be_read(drift):
            if not drift.isfinite().all():
                raise fail(
                    "the drift is not finite: features are so large that their squares overflow.",
                    "Normalise the features, or scale the embedding down; nothing was pushed into the queues.",
                    features=generated,
                )
            if not drift.any():
                self._warn_of_zero()
        return drift, field

    def _warn_of_zero(self, *, refills: bool = False) -> None:
        """Say once that a call gives no gradient, unless it fills the queues for those that follow."""
        if refills or self._warned_of_zero or torch.compiler.is_compiling():
            return
        self._warned_of_zero = True
        warn_user(
            "the drift of this call is zero, and with it the gradient. An anchor needs a positive, and a negative "
            "other than itself, that differ by more than rounding: pass more than one sequence, use queues in "
            "training mode, or normalise features that are very small."
        )

    def _finish(
        self, per_sequence: Tensor, step: Step, inputs: Inputs, return_diagnostics: bool
    ) -> Tensor | LossOutput:
        """Push the features, reduce the loss of each sequence, (B,), and add diagnostics if they are asked for."""
        if self.training and len(step.all_real):
            self.queue_real.push(step.all_real)
            self.queue_generated.push(step.all_generated)
        # Nothing predicted, nothing to learn: exactly zero, still attached to the graph.
        if inputs.predicted is not None:
            per_sequence = torch.where(inputs.predicted.any(dim=1), per_sequence, 0.0)
        loss = per_sequence
        if self.reduction == "sum":
            loss = per_sequence.sum()
        elif self.reduction == "mean":
            loss = per_sequence.sum() * self._ranks() / step.sequences.clamp_min(1)
        if not return_diagnostics:
            return loss
        entropy = token_entropy(inputs.logits, inputs.predicted, self.mask_id)
        return LossOutput(loss, Diagnostics(step.field, entropy, *step.queued))
