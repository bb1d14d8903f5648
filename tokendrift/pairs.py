"""A drifting loss for what parallel sampling breaks: which tokens stand beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, distributed, nn

from tokendrift._checks import (
    check_count,
    check_ids,
    check_mask,
    check_mask_id,
    check_positive,
    check_same_device,
    check_tensor,
    fail,
)
from tokendrift.errors import TokenDriftError
from tokendrift.kernels import exact_matmul
from tokendrift.references import rank_count, refuse_recomputation

__all__ = ["PairDriftLoss", "frequent_first_classes", "pair_drift"]


def pair_drift(real: Tensor, generated: Tensor, eps: float | Tensor) -> Tensor:
    r"""Return the anti-symmetric drift between two laws of pairs, elementwise in [-1, 1].

    .. math:: V_{ab} = \frac{P_{ab} - Q_{ab}}{P_{ab} + Q_{ab} + \epsilon}

    It points from Q to P, changes its sign when they change places, and vanishes where they agree: also, without eps,
    where neither has anything.

    Args:
        real: P, probabilities of any shape.
        generated: Q, of the same shape.
        eps: Probability below which a difference counts for little, at least 0.

    >>> pair_drift(torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0]), 0.0)
    tensor([ 1., -1.,  0.])
    """
    total = real + generated + eps
    return (real - generated) / total.masked_fill_(total == 0, 1)


def frequent_first_classes(vocab_size: int, classes: int) -> Tensor:
    """Return a class for each token of a large vocabulary, int64 (V,), for the ``classes`` of `PairDriftLoss`.

    The ids of byte-pair encodings such as GPT-2's are in the order of their merges, and so roughly of their frequency.
    The first half of the classes goes to the first ids, one each; all other ids take turns at the other half. Which
    tokens meet in a class there is chance. No model of such a vocabulary has been trained with them yet.

    Args:
        vocab_size: V, at least ``classes``.
        classes: K, at least 2.

    Raises:
        TokenDriftError: If there are fewer tokens than classes.

    >>> frequent_first_classes(8, 4)
    tensor([0, 1, 2, 3, 2, 3, 2, 3])
    """
    check_count("classes", classes, least=2)
    check_count("vocab_size", vocab_size, least=classes)
    own = classes // 2
    ids = torch.arange(vocab_size)
    return torch.where(ids < own, ids, own + (ids - own) % (classes - own))


class PairDriftLoss(nn.Module):
    r"""Drift of the law of token pairs, which the soft-token lift gives without any error.

    A sampler that takes several positions in one step draws them independently from the predicted :math:`p_i`. Features
    that are products over positions commute with that draw: the pair :math:`(x_i, x_{i+g})` has the law
    :math:`p_i \otimes p_{i+g}`, and

    .. math:: q_{ab} = \frac1{B(L-g)} \sum_{b,i} p_{i}(a)\, p_{i+g}(b)

    is exactly the law of the pairs that will be written, where the logits are those of the law that the sampler's step
    to time 0 draws from. Those of a masked model are. A uniform-state model predicts a position from the others alone,
    and that step draws from :math:`q(x_0 = j | x_t) \propto p_j (\alpha_t [j = x_t] + (1 - \alpha_t) / V)`: the second
    factor has to be in the logits, where `tokendrift.training.OwnTrajectories` puts it. Without it the law is that of
    draws from p. An encoder's features of soft tokens are not those of drawn ones: they reward mere sharpening.

    With the laws P of real and Q of generated pairs, kept as running means, the loss is

    .. math:: \mathcal L = -\sum_{ab} \mathrm{sg}(V_{ab})\, q_{ab},\qquad V = \frac{P - Q}{P + Q + \epsilon}

    averaged over the lags g: the step of drifting for linear features, with each coordinate in units of its own size. V
    is anti-symmetric; the laws, unlike mean features, identify what is missing.

    The laws have K x K entries: for vocabularies of some thousands all tokens, for larger ones ``classes`` of them.
    Generated text of different noise levels can have laws of its own, ``strata``, so that good text at low noise does
    not hide bad text at high noise; in the study one law for all did as well. Masked models must not be asked at
    t = 1, where one input has to stand for all texts and the best product law is a single text:
    `tokendrift.training.OwnTrajectories` leaves that step out.

    With gradient accumulation each micro-batch is a call: it meets the law Q that those before it have left, and
    ``decay`` counts micro-batches. Where a process group is initialised every rank must call, in step and with the same
    stratum. The laws are those of all ranks, the same on each, and losses averaged over ranks, as DDP does with
    gradients, are the loss of one process with the whole batch.

    Laws and their products are float32 or wider, under autocast and in a module converted to bfloat16 too.

    Args:
        vocab_size: V.
        lags: Distances g between the tokens of a pair.
        strata: Number S of separate laws of generated text.
        decay: Share of the law of generated pairs that a call keeps. More gives less noise, and an older law.
        smoothing: :math:`\epsilon` in units of one pair among those that Q remembers, ``(1 - decay) / (B (L - g))``:
            what is rarer than that cannot be told from zero.
        backoff: Share of P that is the product of its margins, for pairs that a small corpus lacks by chance.
        classes: Class of each token, int64 (V,), for laws over classes (`frequent_first_classes` makes some); omitted,
            every token is its own.
        mask_id: Vocabulary entry without probability (MDLM's mask).

    Attributes:
        real: Law P of the real pairs seen so far, (G, K, K), in ``state_dict``.
        generated: Law Q, (S, G, K, K), in ``state_dict``.

    Raises:
        TokenDriftError: For an option out of range.

    Source: this package; the field is in the spirit of arXiv 2605.19470, section 3.3. What it does is measured in the
    study of the documentation.

    >>> loss = PairDriftLoss(3)
    >>> logits = torch.zeros(2, 4, 3, requires_grad=True)
    >>> loss(logits, torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1]])).backward()
    >>> loss.total_variation()
    tensor([[0.6667]])
    """

    real: Tensor
    generated: Tensor
    classes: Tensor | None
    real_weight: Tensor
    generated_weight: Tensor
    _calls = 0

    def __init__(
        self,
        vocab_size: int,
        *,
        lags: Sequence[int] = (1,),
        strata: int = 1,
        decay: float = 0.95,
        smoothing: float = 1.0,
        backoff: float = 0.0,
        classes: Tensor | None = None,
        mask_id: int | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = check_count("vocab_size", vocab_size, least=2)
        check_mask_id(mask_id, vocab_size)
        self.mask_id = mask_id
        self.lags = tuple(check_count("lags", lag, least=1) for lag in lags)
        if not self.lags:
            raise fail("lags must name at least one distance, such as (1,).", lags=lags)
        check_count("strata", strata, least=1)
        for name, value in (("decay", decay), ("backoff", backoff)):
            if not 0 <= value < 1:
                raise fail(f"{name} must lie in [0, 1).", **{name: value})
        self.decay, self.backoff = decay, backoff
        size = vocab_size
        if classes is not None:
            if classes.shape != (vocab_size,) or classes.is_floating_point() or int(classes.min()) < 0:
                raise fail(f"classes must be ids of classes, int64 (V,) = ({vocab_size},).", classes=classes)
            size = int(classes.max()) + 1
        self.register_buffer("classes", classes, persistent=False)
        self.smoothing = check_positive("smoothing", smoothing)
        self.register_buffer("real", torch.zeros(len(self.lags), size, size))
        self.register_buffer("generated", torch.zeros(strata, len(self.lags), size, size))
        self.register_buffer("real_weight", torch.zeros(len(self.lags), dtype=torch.float64))
        self.register_buffer("generated_weight", torch.zeros(strata))

    def forward(
        self,
        logits: Tensor,
        clean_ids: Tensor,
        *,
        noisy_ids: Tensor | None = None,
        predicted: Tensor | None = None,
        attention_mask: Tensor | None = None,
        stratum: int = 0,
    ) -> Tensor:
        """Return the loss, a float32 scalar; in training mode both laws take the batch in.

        P does so at once, and the batch meets it with its own real text. Q does so last: the batch meets that of the
        calls before, since among its own negatives it would flee from itself. The first of a stratum has no other.

        Args:
            logits: Raw denoiser output (B, L, V), any float dtype; L above every lag.
            clean_ids: Real text (B, L). It need not be the text that was corrupted.
            noisy_ids: x_t (B, L): what stands at positions that are not predicted.
            predicted: Bool (B, L). Omitted: ``noisy_ids == mask_id`` if both are known, else all.
            attention_mask: Positions that are text, (B, L), of logits and clean ids alike.
            stratum: Which law of generated text the batch belongs to, 0 to S - 1.

        Raises:
            TokenDriftError: For input that does not fit; no law has changed then.
        """
        self._calls += 1
        number = self._calls * len(self.generated) + stratum if isinstance(stratum, int) else 0
        try:
            counts, written = self._written(logits, clean_ids, noisy_ids, predicted, attention_mask, stratum)
        except Exception:
            # The other ranks wait: what they get is NaN, so that they stop, too.
            with suppress(TokenDriftError):
                _of_all_ranks(torch.full_like(self.real, torch.nan), torch.zeros_like(self.real_weight), number)
            raise
        law, total = _of_all_ranks(written.detach(), counts, number)
        if self.training:
            self.observe(clean_ids, attention_mask=attention_mask)
        others = law if float(self.generated_weight[stratum]) == 0 else self.generated[stratum]
        eps = self.smoothing * (1 - self.decay) / total.clamp_min(1)
        drift = pair_drift(self._target(), others, eps.to(law)[:, None, None])
        if self.training:
            self._take(law, stratum)
        share = rank_count() * counts / total.clamp_min(1)  # 1 where all ranks have as many
        return -(share.to(law)[:, None, None] * drift * written).sum() / len(self.lags)

    def _written(
        self,
        logits: Tensor,
        clean_ids: Tensor,
        noisy_ids: Tensor | None,
        predicted: Tensor | None,
        attention_mask: Tensor | None,
        stratum: int,
    ) -> tuple[Tensor, Tensor]:
        """Check the input; return the number of pairs at each lag, (G,), and the law that will be written, (G, K, K).

        The law has a gradient.
        """
        if self.training:
            refuse_recomputation("the laws")
        check_tensor("logits", logits, ("B", "L", "V"))
        if logits.shape[2] != self.vocab_size:
            raise fail(f"logits must have V = {self.vocab_size} entries.", logits=logits)
        clean_ids = check_ids("clean_ids", clean_ids, self.vocab_size, like=logits)
        check_same_device("logits", logits, laws=self.real, clean_ids=clean_ids, noisy_ids=noisy_ids)
        if logits.shape[1] <= max(self.lags):
            raise fail(f"sequences must be longer than the largest lag, {max(self.lags)}.", logits=logits)
        if not 0 <= check_count("stratum", stratum) < len(self.generated):
            raise fail(f"stratum must lie in 0 to {len(self.generated) - 1}.", stratum=stratum)
        if noisy_ids is not None:
            noisy_ids = check_ids("noisy_ids", noisy_ids, self.vocab_size, like=logits)
            if predicted is not None:
                predicted = check_mask("predicted", predicted, logits.shape[:2])
            elif self.mask_id is not None:
                predicted = noisy_ids == self.mask_id
        elif predicted is not None:
            raise fail("predicted was given without noisy_ids.", "Pass noisy_ids=x_t.")
        text = None if attention_mask is None else check_mask("attention_mask", attention_mask, logits.shape[:2])

        chances = self._chances(logits)
        if predicted is not None and noisy_ids is not None:
            chances = self._observed(chances, noisy_ids, predicted)
        counts = self._counts(clean_ids, text)
        return counts, self._pairs(chances, text, counts)

    @torch.no_grad()
    def observe(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> None:
        """Count real text (B, L) into P: of the whole corpus, say, before training. Every call weighs by its pairs."""
        ids = check_ids("ids", ids, self.vocab_size)
        text = None if attention_mask is None else check_mask("attention_mask", attention_mask, ids.shape)
        kinds, size, found = self._kinds(ids), self.real.shape[-1], []
        for lag in self.lags:  # counted rather than multiplied: one-hot vectors of a corpus would fill the memory
            cells = kinds[:, :-lag] * size + kinds[:, lag:]
            cells = cells.flatten() if text is None else cells[text[:, :-lag] & text[:, lag:]]
            found.append(cells.bincount(minlength=size * size).view(size, size).to(self.real))
        counts = self._counts(ids, text)
        here = torch.stack(found).div_(counts.clamp_min(1).to(self.real)[:, None, None])
        law, total = _of_all_ranks(here, counts)
        self.real_weight += total
        share = total / self.real_weight.clamp_min(1)
        self.real.lerp_(law, share.to(law)[:, None, None])

    def total_variation(self) -> Tensor:
        """Return half the summed absolute difference between P and Q, (S, G): how far the generated pairs are off."""
        return (self._target() - self.generated).abs().sum(dim=(-1, -2)) / 2

    def _target(self) -> Tensor:
        """Return P with its backoff."""
        if not self.backoff:
            return self.real
        first, second = self.real.sum(dim=2, keepdim=True), self.real.sum(dim=1, keepdim=True)
        return (1 - self.backoff) * self.real + self.backoff * first * second

    def _take(self, pairs: Tensor, stratum: int) -> None:
        """Move Q of a stratum toward the pairs of the batch."""
        calls = self.generated_weight[stratum]
        share = max(1 - self.decay, 1 / (1 + float(calls)))  # a plain mean until the window is full
        self.generated[stratum].lerp_(pairs.to(self.generated), share)
        self.generated_weight[stratum] += 1

    def _chances(self, logits: Tensor) -> Tensor:
        """Return p over classes, (B, L, K), in float32 or wider."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.mask_id is not None:
            wide = wide.index_fill(-1, torch.tensor(self.mask_id, device=logits.device), -torch.inf)
        return self._grouped(wide.softmax(dim=-1))

    def _observed(self, chances: Tensor, ids: Tensor, predicted: Tensor) -> Tensor:
        """Return the chances with certainty of what stands at positions that are not predicted."""
        if predicted.all():
            return chances
        seen = ~predicted[..., None]
        # Scattered: one-hot vectors, which are int64, would be the largest tensor of all.
        return chances.masked_fill(seen, 0).scatter_add_(2, self._kinds(ids)[..., None], seen.to(chances))

    def _kinds(self, ids: Tensor) -> Tensor:
        """Return the class of each token."""
        return ids.long() if self.classes is None else self.classes[ids.long()]

    def _grouped(self, chances: Tensor) -> Tensor:
        if self.classes is None:
            return chances
        return chances.new_zeros(*chances.shape[:2], self.real.shape[-1]).index_add(2, self.classes, chances)

    def _counts(self, ids: Tensor, text: Tensor | None) -> Tensor:
        """Return how many pairs there are at each lag, float64 (G,)."""
        if text is None:
            text = torch.ones_like(ids, dtype=torch.bool)
        return torch.stack([(text[:, :-lag] & text[:, lag:]).sum() for lag in self.lags]).double()

    def _pairs(self, chances: Tensor, text: Tensor | None, counts: Tensor) -> Tensor:
        """Return the law of pairs at each lag, (G, K, K)."""
        if text is not None:
            chances = chances * text[..., None]
        found = []
        with exact_matmul(chances.device):
            for lag, count in zip(self.lags, counts.clamp_min(1).to(chances), strict=True):
                first, second = chances[:, :-lag].flatten(0, 1), chances[:, lag:].flatten(0, 1)
                found.append(first.T @ second / count)
        return torch.stack(found)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, kept in self.named_buffers(recurse=False):
            stored = state_dict.get(prefix + name)
            if stored is None or name == "classes":
                continue
            if stored.shape != kept.shape:
                raise fail(
                    f"the stored {name} has another shape than that of this loss.",
                    "Build the loss with the lags, strata and classes that it was saved with.",
                    stored=stored,
                    here=kept,
                )
            if stored.device.type != "meta" and not ((stored >= 0) & stored.isfinite()).all():
                raise fail(f"the stored {name} must be finite and nowhere below zero.", "Take an earlier checkpoint.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PairDriftLoss:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            least = torch.float64 if name == "real_weight" else torch.float32  # it counts beyond 2^24
            now = getattr(self, name)
            if kept.is_floating_point() and now.dtype.itemsize < least.itemsize:
                setattr(self, name, kept.to(now.device))
        return self


def _of_all_ranks(law: Tensor, counts: Tensor, number: int = 0) -> tuple[Tensor, Tensor]:
    """Return the law (G, K, K) of the pairs of all ranks, and how many they are, (G,).

    Raises:
        TokenDriftError: On every rank, if the law of one is not finite, or if ``number`` differs between ranks.
    """
    ranks, total = rank_count(), counts
    if ranks > 1:
        law = law * counts.to(law)[:, None, None]
        total = torch.cat([counts, counts.new_tensor([number, number**2])])
        distributed.all_reduce(law)
        distributed.all_reduce(total)
        total, (first, second) = total[:-2], total[-2:].tolist()
        if first**2 != ranks * second:  # unless all numbers are equal, the mean of their squares is larger
            raise fail(
                "ranks are at different calls of the loss, or at different strata; no law was changed.",
                "Call the loss on every rank equally often and with the same stratum.",
            )
        law = law / total.clamp_min(1).to(law)[:, None, None]
    # After the ranks have met: all of them stop. The sum shows what is not finite and needs no memory.
    if not law.sum().isfinite():
        raise fail(
            "logits contain NaN or infinities, or another rank has failed; no law was changed.",
            "Mend the batch, or leave it out on all ranks.",
        )
    return law, total
