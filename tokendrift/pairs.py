"""A drifting loss on pairs of neighbouring tokens, which parallel sampling draws independently of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from tokendrift._checks import (
    can_be_read,
    check_corrupted,
    check_count,
    check_floating,
    check_fraction,
    check_ids,
    check_mask,
    check_mask_id,
    check_positive,
    check_same_device,
    check_tensor,
    fail,
)
from tokendrift._ngram_laws import Corrupted, ExactPairs, HashedNgrams, expected_sums, windows
from tokendrift._operators import wide_dtype
from tokendrift.references import rank_count, refuse_recomputation

__all__ = ["PairDriftLoss", "pair_drift"]

LARGEST_EXACT = 4096  # V up to which "auto" gives every pair a cell: 64 MiB for a law in float32
BUCKETS = 65536  # of "auto" above it: 256 KiB for a law


def pair_drift(real: Tensor, generated: Tensor, eps: float | Tensor) -> Tensor:
    r"""Return the anti-symmetric drift between two laws, elementwise in [-1, 1].

    .. math:: V = \frac{P - Q}{P + Q + \epsilon}

    It points from Q to P, changes its sign when they change places, and vanishes where they agree: also, without eps,
    where both are zero. It is minus the gradient, with respect to Q, of a divergence that is convex in Q and has its
    only minimum, 0, at Q = P:

    .. math:: \sum (2P + \epsilon) \log\frac{2P + \epsilon}{P + Q + \epsilon} + Q - P

    Args:
        real: P, probabilities of any shape.
        generated: Q, of the same shape.
        eps: Probability below which a difference counts for little, at least 0.

    >>> pair_drift(torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0]), 0.0)
    tensor([ 1., -1.,  0.])
    """
    total = (real + generated).add_(eps)
    return (real - generated).div_(total.masked_fill_(total == 0, 1))


class PairDriftLoss(nn.Module):
    r"""Drift of the law of token pairs, or of longer n-grams, which the soft-token lift gives without any error.

    A sampler that takes several positions in one step draws them independently from the predicted :math:`p_i`. Features
    that are products over positions commute with that draw: the pair :math:`(x_i, x_{i+g})` has the law
    :math:`p_i \otimes p_{i+g}`, and

    .. math:: q_{ab} = \frac1{B(L-g)} \sum_{b,i} p_{i}(a)\, p_{i+g}(b)

    is exactly the law of the pairs that will be written, where the logits are those of the law that the sampler's step
    to time 0 draws from. Those of a masked model are. A uniform-state model predicts a position from the others alone,
    and that step draws from :math:`q(x_0 = j | x_t) \propto p_j (\alpha_t [j = x_t] + (1 - \alpha_t) / V)`: the second
    factor has to be in the logits, where `Process.completion_logits` puts it. Without it the law is that of
    draws from p. An encoder's features of soft tokens are not those of drawn ones: they reward mere sharpening.

    With the laws P of real and Q of generated pairs, kept as running means, the loss is

    .. math:: \mathcal L = -\sum_{ab} \mathrm{sg}(V_{ab})\, q_{ab},\qquad V = \frac{P - Q}{P + Q + \epsilon}

    averaged over the lags g: the step of drifting for linear features, with each coordinate in units of its own size. V
    is anti-symmetric; the laws, unlike mean features, identify what is missing. The value of the loss says nothing
    about progress: `divergence` and `total_variation` do, and both should fall.

    Up to V = 4096 every pair has a cell of its own, and a law has V x V entries. For larger vocabularies, and for
    n-grams of a higher ``order``, a law has K ``buckets``: a fixed map sends token :math:`x_k` at place k of an n-gram
    to a number :math:`h_k(x_k)`, and the n-gram falls into bucket :math:`(h_1(x_1) + \dots + h_n(x_n)) \bmod K`. The
    bucket of independent tokens follows the circular convolution of their laws, so that q is exact here too. The drift
    does not see how the probability of a bucket is divided among its n-grams.

    Generated text of different noise levels can have laws of its own, ``strata``, so that good text at low noise does
    not hide bad text at high noise; in the study one law for all did as well. Masked models must not be asked at
    t = 1, where one input has to stand for all texts and the best product law is a single text:
    `tokendrift.training.OwnTrajectories` leaves that step out.

    With gradient accumulation each micro-batch is a call: it meets the law Q that those before it have left, and
    ``decay`` counts micro-batches. Where a process group is initialised every rank must call, in step and with the same
    stratum. The laws are those of all ranks, the same on each, and losses averaged over ranks, as DDP does with
    gradients, are the loss of one process with the whole batch.

    Laws and their products are float32 or wider, under autocast and in a module converted to bfloat16 too. Beside the
    logits and their gradient the loss holds a few laws and tiles of probabilities, nothing of the size of the logits.

    Args:
        vocab_size: V.
        order: Number n of tokens in an n-gram; 2 are pairs. More than 2 need buckets.
        lags: Distances g between neighbouring tokens of an n-gram.
        buckets: Number K of buckets of a law, or None for a cell for each pair. ``"auto"`` is None for pairs of at most
            4096 tokens and 65,536 otherwise. Fewer buckets cost less time and hide more.
        strata: Number S of separate laws of generated text.
        decay: Share of the law of generated text that a call keeps. More gives less noise, and an older law.
        smoothing: :math:`\epsilon` in units of one n-gram among those that Q remembers, ``(1 - decay) / (B (L - g))``:
            what is rarer than that cannot be told from zero.
        backoff: Share of P that is the product of its margins, for pairs that a small corpus lacks by chance. Needs
            ``buckets=None``: in buckets such pairs share the probability of others.
        mask_id: Vocabulary entry without probability (MDLM's mask).

    Attributes:
        real: Law P of the real text seen so far, (G, V, V) or (G, K), in ``state_dict``.
        generated: Law Q, (S, G, V, V) or (S, G, K), in ``state_dict``.

    Raises:
        TokenDriftError: For an option out of range.

    Source: this package; the field is in the spirit of arXiv 2605.19470, section 3.3, and the expected count of n-grams
    under independent positions is that of bag-of-n-grams training (arXiv 1911.09320). What the loss does is measured in
    the study of the documentation.

    >>> loss = PairDriftLoss(3)
    >>> logits = torch.zeros(2, 4, 3, requires_grad=True)
    >>> loss(logits, torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1]])).backward()
    >>> loss.total_variation()
    tensor([[0.6667]])
    """

    real: Tensor
    generated: Tensor
    real_weight: Tensor
    generated_weight: Tensor
    _calls = 0  # those that meet other ranks

    def __init__(
        self,
        vocab_size: int,
        *,
        order: int = 2,
        lags: Sequence[int] = (1,),
        buckets: int | Literal["auto"] | None = "auto",
        strata: int = 1,
        decay: float = 0.95,
        smoothing: float = 1.0,
        backoff: float = 0.0,
        mask_id: int | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = check_count("vocab_size", vocab_size, least=2)
        check_mask_id(mask_id, vocab_size)
        self.mask_id = mask_id
        if not isinstance(lags, Sequence) or not lags:
            raise fail("lags must name at least one distance, such as (1,).", lags=lags)
        self.lags = tuple(check_count("lags", lag, least=1) for lag in lags)
        check_count("strata", strata, least=1)
        check_fraction("decay", decay)
        check_fraction("backoff", backoff)
        self.decay, self.backoff = decay, backoff
        self.smoothing = check_positive("smoothing", smoothing)
        self.law = _law(vocab_size, check_count("order", order, least=2), buckets)
        if backoff and isinstance(self.law, HashedNgrams):
            raise fail(
                "backoff needs a law with a cell for each pair.",
                "Leave it out, or pass buckets=None where V x V entries fit into memory.",
                backoff=backoff,
                buckets=buckets,
            )
        dtype = wide_dtype(torch.get_default_dtype())
        self.register_buffer("real", torch.zeros(len(self.lags), *self.law.shape, dtype=dtype))
        self.register_buffer("generated", torch.zeros(strata, len(self.lags), *self.law.shape, dtype=dtype))
        self.register_buffer("real_weight", torch.zeros(len(self.lags), dtype=torch.float64))
        self.register_buffer("generated_weight", torch.zeros(strata, dtype=dtype))

    def extra_repr(self) -> str:
        cells = "one for each pair" if isinstance(self.law, ExactPairs) else self.law.shape[0]
        return f"vocab_size={self.vocab_size}, order={self.law.order}, lags={self.lags}, buckets={cells}"

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

        The batch meets P with its own real text in it, and Q as the calls before have left it, since among its own
        negatives it would flee from itself. The first call of a stratum has no other Q than its own.

        On an accelerator the loss does not wait for the device. Logits that contain NaN or infinities cannot raise an
        error there: the loss is NaN, and Q does not change.

        Args:
            logits: Raw denoiser output (B, L, V), any float dtype; L longer than an n-gram at the largest lag.
            clean_ids: Real text (B, L). It need not be the text that was corrupted.
            noisy_ids: x_t (B, L): what stands at positions that are not predicted.
            predicted: Bool (B, L). Omitted: ``noisy_ids == mask_id`` if both are known, else all.
            attention_mask: Positions that are text, (B, L), of logits and clean ids alike.
            stratum: Which law of generated text the batch belongs to, 0 to S - 1.

        Raises:
            TokenDriftError: For input that does not fit; no law has changed then.
        """
        # 1. The law q of what the batch will write, over all ranks.
        if rank_count() > 1:
            self._calls += 1
        try:
            clean_ids, corrupted = self._checked(logits, clean_ids, noisy_ids, predicted, attention_mask, stratum)
            written = expected_sums(logits, corrupted, self.law, self.lags)
            counts = self._counts(clean_ids, corrupted.text)
        except Exception:
            if rank_count() > 1:
                self._fail_together(logits)
            raise
        law, total = self._of_all_ranks(written.detach(), counts, self._calls * len(self.generated) + stratum)
        finite = law.sum().isfinite()
        # Only the CPU can look at the number without waiting. The ranks have met before: all of them stop.
        if can_be_read(finite) and not finite:
            more = ", another rank has failed, or the ranks differ in stratum or number of calls"
            raise fail(
                f"logits contain NaN or infinities{more if rank_count() > 1 else ''}; no law was changed.",
                "Mend the batch, or leave it out on all ranks.",
                logits=logits,
            )

        # 2. Both laws take the batch in. Q is meant as the calls before have left it.
        others = torch.where(self.generated_weight[stratum] == 0, law, self.generated[stratum])
        if self.training:
            self.observe(clean_ids, attention_mask=corrupted.text)
            self._take(law.masked_fill_(~finite, 0), stratum, finite)
        del law  # where every pair has a cell, it is large

        # 3. The gradient flows through q alone. Its weight is 1 / total on every rank, so that the mean over ranks is
        # the loss of the whole batch.
        eps = self.smoothing * (1 - self.decay) / total.clamp_min(1)
        drift = pair_drift(self._target(), others, self._by_lag(eps).to(others))
        weight = rank_count() / total.clamp_min(1).to(written) / len(self.lags)
        loss = -((drift * written).flatten(1).sum(dim=1) * weight).sum()
        return torch.where(finite, loss, torch.nan)  # also where the failure is that of another rank

    @torch.no_grad()
    def observe(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> None:
        """Count real text (B, L) into P: of the whole corpus, say, before training. Every call weighs by its n-grams.

        Args:
            ids: Token ids (B, L).
            attention_mask: Positions that are text, (B, L); all by default.

        Raises:
            TokenDriftError: If the ids or the mask do not fit.
        """
        ids = check_ids("ids", ids, self.vocab_size).long()
        text = None if attention_mask is None else check_mask("attention_mask", attention_mask, ids.shape)
        # Counted rather than multiplied: one-hot vectors of a corpus would fill the memory.
        sums = torch.zeros_like(self.real)
        for of_lag, lag in zip(sums, self.lags, strict=True):
            cells = self.law.cells(windows(ids, self.law.order, lag)).flatten()
            of_lag.view(-1).scatter_add_(0, cells, self._whole(ids, text, lag).flatten().to(sums))
        self._take_real(sums, self._counts(ids, text))

    def _take_real(self, sums: Tensor, counts: Tensor) -> None:
        """Take the sums of real text on this rank, of so many n-grams at each lag, into P."""
        law, total = self._of_all_ranks(sums, counts)
        self.real_weight += total
        share = total / self.real_weight.clamp_min(1)
        self.real.lerp_(law, self._by_lag(share).to(law))

    def total_variation(self) -> Tensor:
        """Return half the summed absolute difference between P and Q, (S, G): how far the generated law is off.

        It lies in [0, 1]. That of buckets is at most that of the n-grams.
        """
        return (self._target() - self.generated).abs().flatten(2).sum(dim=-1) / 2

    def divergence(self) -> Tensor:
        r"""Return :math:`2\,\mathrm{KL}(P \,\Vert\, (P + Q) / 2)` in nats, (S, G): the scalar that the drift descends.

        Its gradient with respect to Q is minus the drift at :math:`\epsilon = 0`, up to a constant. It is convex in Q,
        0 only where Q = P, and 2 log 2 where the laws have nothing in common.
        """
        real, both = self._target(), self._target() + self.generated
        cells = torch.xlogy(2 * real, 2 * real) - torch.xlogy(2 * real, both)
        return cells.flatten(2).sum(dim=-1)

    def _checked(
        self,
        logits: Tensor,
        clean_ids: Tensor,
        noisy_ids: Tensor | None,
        predicted: Tensor | None,
        attention_mask: Tensor | None,
        stratum: int,
    ) -> tuple[Tensor, Corrupted]:
        """Return the arguments of `forward` once they have been checked."""
        if self.training and not torch.compiler.is_compiling():
            refuse_recomputation("the laws")
        check_floating("logits", check_tensor("logits", logits, ("B", "L", "V")))
        if logits.shape[2] != self.vocab_size:
            raise fail(f"logits must have V = {self.vocab_size} entries.", logits=logits)
        clean_ids = check_ids("clean_ids", clean_ids, self.vocab_size, like=logits)
        given = {"noisy_ids": noisy_ids, "predicted": predicted, "attention_mask": attention_mask}
        check_same_device("logits", logits, laws=self.real, clean_ids=clean_ids, **given)
        reach = (self.law.order - 1) * max(self.lags)
        if logits.shape[1] <= reach:
            raise fail(f"sequences must be longer than an n-gram at the largest lag, {reach}.", logits=logits)
        if not 0 <= check_count("stratum", stratum) < len(self.generated):
            raise fail(f"stratum must lie in 0 to {len(self.generated) - 1}.", stratum=stratum)
        noisy_ids, predicted = check_corrupted(
            noisy_ids, predicted, mask_id=self.mask_id, vocab_size=self.vocab_size, like=logits
        )
        text = None if attention_mask is None else check_mask("attention_mask", attention_mask, logits.shape[:2])
        return clean_ids, Corrupted(noisy_ids, predicted, text, self.mask_id)

    def _target(self) -> Tensor:
        """Return P with its backoff."""
        if not self.backoff:
            return self.real
        first, second = self.real.sum(dim=2, keepdim=True), self.real.sum(dim=1, keepdim=True)
        return (1 - self.backoff) * self.real + self.backoff * first * second

    def _take(self, law: Tensor, stratum: int, finite: Tensor) -> None:
        """Move Q of a stratum toward the law of the batch, unless that is not finite."""
        calls = self.generated_weight[stratum]
        share = (1 / (1 + calls.double())).clamp_min(1 - self.decay)  # a plain mean until the window is full
        self.generated[stratum].lerp_(law.to(self.generated), (share * finite).to(self.generated))
        self.generated_weight[stratum] += finite

    def _whole(self, ids: Tensor, text: Tensor | None, lag: int) -> Tensor:
        """Return which n-grams at a lag are text at all their positions, bool (B, N)."""
        text = torch.ones_like(ids, dtype=torch.bool) if text is None else text
        return torch.stack(windows(text, self.law.order, lag)).all(dim=0)

    def _counts(self, ids: Tensor, text: Tensor | None) -> Tensor:
        """Return how many n-grams there are at each lag, float64 (G,)."""
        return torch.stack([self._whole(ids, text, lag).sum() for lag in self.lags]).double()

    @torch.no_grad()
    def _fail_together(self, logits: object) -> None:
        """Let the other ranks, which wait for this one, get NaN, and take part in what they do then."""
        nothing = torch.zeros_like(self.real_weight)
        wide = isinstance(logits, Tensor) and logits.dtype == torch.float64  # as the laws of the others will be
        sums = torch.full_like(self.real, torch.nan, dtype=torch.float64 if wide else torch.float32)
        self._of_all_ranks(sums, nothing, self._calls * len(self.generated))
        if self.training and not can_be_read(nothing):  # they cannot stop, and count their real text
            self._take_real(torch.zeros_like(self.real), nothing)

    def _of_all_ranks(self, sums: Tensor, counts: Tensor, number: int = 0) -> tuple[Tensor, Tensor]:
        """Return the mean law of the n-grams of all ranks, from the sums of this one, and how many there are, (G,).

        The law is NaN if ``number`` differs between ranks.
        """
        ranks = rank_count()
        if ranks > 1:
            sums, counts = sums.clone(), torch.cat([counts, counts.new_tensor([number, number**2])])
            distributed.all_reduce(sums)
            distributed.all_reduce(counts)
            counts, first, second = counts[:-2], counts[-2], counts[-1]
            # Unless all numbers are equal, the mean of their squares is larger than the square of their mean.
            sums = torch.where(first.square() == ranks * second, sums, torch.nan)
        # A transform can leave less than zero where there is nothing, by rounding.
        return (sums / self._by_lag(counts.clamp_min(1)).to(sums)).clamp_min_(0), counts

    def _by_lag(self, values: Tensor) -> Tensor:
        """Return values (G,) with axes of length 1 for the cells of a law."""
        return values.view(-1, *[1] * len(self.law.shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PairDriftLoss:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            least = torch.float64 if name == "real_weight" else torch.float32  # it counts beyond 2^24
            now = getattr(self, name)
            if now.dtype.itemsize < least.itemsize:
                setattr(self, name, kept.to(now.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "real")
        if stored is not None and stored.shape[1:] != self.law.shape:
            raise fail(
                f"the stored laws have {tuple(stored.shape[1:])} cells but those of this loss have {self.law.shape}.",
                "Build the loss with the vocab_size, order and buckets that it was stored with. Laws over classes of "
                "tokens, which earlier versions had, cannot be loaded.",
            )
        for name, here in self.named_buffers(recurse=False):
            found = state_dict.get(prefix + name)
            if found is None or found.device.type == "meta":
                continue
            if found.shape != here.shape:
                raise fail(
                    f"the stored {name} has shape {tuple(found.shape)} but that of this loss {tuple(here.shape)}.",
                    "Build the loss with the lags and strata that it was stored with.",
                )
            if not ((found >= 0) & found.isfinite()).all():
                raise fail(f"the stored {name} must be finite and nowhere below zero.", "Take an earlier checkpoint.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _law(vocab_size: int, order: int, buckets: int | Literal["auto"] | None) -> ExactPairs | HashedNgrams:
    """Return the cells of a law for the option ``buckets`` of `PairDriftLoss`."""
    if buckets == "auto":
        buckets = None if order == 2 and vocab_size <= LARGEST_EXACT else BUCKETS
    if buckets is not None:
        return HashedNgrams(vocab_size, order, check_count("buckets", buckets, least=2))
    if order != 2:
        raise fail("buckets must be a number for n-grams of more than 2 tokens.", "Leave it out.", order=order)
    return ExactPairs(vocab_size)
