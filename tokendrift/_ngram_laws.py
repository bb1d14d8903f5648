"""Expected laws of n-grams whose tokens are drawn independently, computed from logits in tiles of positions.

The probabilities of a tile are made, used and dropped, and made again for the gradient, so that nothing of the size of
the logits is held beside their gradient. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokendrift._operators import wide_dtype
from tokendrift.kernels import exact_matmul

TILE = {"cpu": 2**20, "cuda": 2**23}  # probabilities in a tile: 4 MB on a CPU, 32 MB on a GPU
MAP_SEED = 0  # of the maps of tokens to buckets, which the state of a loss contains


class ExactPairs(nn.Module):
    """The law of pairs with a cell for every pair of tokens, (V, V).

    Args:
        vocab_size: V.
    """

    order = 2

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.shape = (vocab_size, vocab_size)

    def cells(self, ids: Sequence[Tensor]) -> Tensor:
        """Return the number of the cell of each pair, for the ids of its two tokens."""
        return ids[0] * self.shape[1] + ids[1]

    def add_expected(self, total: Tensor, probabilities: Sequence[Tensor]) -> None:
        """Add the sum of the pairs' laws to the total (V, V), for their tokens' probabilities, each (B, N, V)."""
        first, second = (p.flatten(0, 1) for p in probabilities)
        total.addmm_(first.T, second)

    def slopes(self, probabilities: Sequence[Tensor], field: Tensor) -> Iterator[Tensor]:
        """Yield the derivative of <field, expected sum> with respect to the probabilities of each token."""
        yield probabilities[1] @ field.T
        yield probabilities[0] @ field


class HashedNgrams(nn.Module):
    r"""The law of n-grams in K buckets, (K,).

    A map :math:`h_k` sends a token at place k of an n-gram to a bucket, and the n-gram belongs to the bucket

    .. math:: \big(h_1(x_1) + \dots + h_n(x_n)\big) \bmod K

    The bucket of a sum of independent numbers follows the circular convolution of their laws. So the expected law of
    buckets is exact: a product of Fourier transforms, averaged over positions and transformed back.

    Each map permutes every block of K consecutive ids. Two tokens of one block never share a bucket at any place. The
    vocabularies of byte-pair encoding are roughly in the order of frequency, so that the first block holds the K most
    frequent tokens.

    Args:
        vocab_size: V.
        order: n.
        buckets: K.
    """

    bucket: Tensor
    token: Tensor

    def __init__(self, vocab_size: int, order: int, buckets: int) -> None:
        super().__init__()
        self.vocab_size, self.order, self.shape = vocab_size, order, (buckets,)
        blocks = -(-vocab_size // buckets)
        generator = torch.Generator().manual_seed(MAP_SEED)
        maps = [torch.randperm(buckets, generator=generator, device="cpu") for _ in range(order * blocks)]
        bucket = torch.stack(maps).view(order, blocks, buckets)
        token = bucket.argsort(dim=-1) + buckets * torch.arange(blocks, device="cpu")[:, None]
        # Which bucket each token has at each place, and for each block which token each bucket has: (n, blocks * K).
        device = torch.empty(0).device  # as that of the laws; get_default_device of PyTorch 2.6 overlooks a context
        self.register_buffer("bucket", bucket.flatten(1).to(device))
        self.register_buffer("token", token.flatten(1).to(device))

    def cells(self, ids: Sequence[Tensor]) -> Tensor:
        """Return the bucket of each n-gram, for the ids of its n tokens."""
        found = [bucket[part] for bucket, part in zip(self.bucket, ids, strict=True)]
        return torch.stack(found).sum(dim=0) % self.shape[0]

    def add_expected(self, total: Tensor, probabilities: Sequence[Tensor]) -> None:
        """Add the sum of the n-grams' laws to the total (K,), for their tokens' probabilities, each (B, N, V)."""
        spectrum = reduce(torch.mul, self._spectra(probabilities))
        total += torch.fft.irfft(spectrum.sum(dim=(0, 1)), n=self.shape[0])

    def slopes(self, probabilities: Sequence[Tensor], field: Tensor) -> Iterator[Tensor]:
        """Yield the derivative of <field, expected sum> with respect to the probabilities of each token."""
        spectra, of_field = self._spectra(probabilities), torch.fft.rfft(field)
        for number, bucket in enumerate(self.bucket):
            # The field is correlated with the law of the sum over all other places, then read at each token's bucket.
            others = (each.conj() for other, each in enumerate(spectra) if other != number)
            slope = torch.fft.irfft(reduce(torch.mul, others, of_field), n=self.shape[0])
            yield slope.index_select(-1, bucket[: self.vocab_size])

    def _spectra(self, probabilities: Sequence[Tensor]) -> list[Tensor]:
        """Return the Fourier transforms of the laws of buckets at each place, (B, N, K // 2 + 1)."""
        spectra = []
        for token, p in zip(self.token, probabilities, strict=True):
            # Tokens are gathered rather than scattered, so that sums have the same order on every device.
            padded = nn.functional.pad(p, (0, len(token) - self.vocab_size))
            law = padded.index_select(-1, token).unflatten(-1, (-1, self.shape[0])).sum(dim=-2)
            spectra.append(torch.fft.rfft(law))
        return spectra


Law = ExactPairs | HashedNgrams


class Corrupted(NamedTuple):
    """Where the logits do not say what a position holds.

    Attributes:
        noisy_ids: x_t (B, L), the tokens of positions that are not predicted.
        predicted: Bool (B, L), or None if all positions are predicted.
        text: Bool (B, L), which positions are text, or None if all are.
        mask_id: Vocabulary entry without probability, or None.
    """

    noisy_ids: Tensor | None
    predicted: Tensor | None
    text: Tensor | None
    mask_id: int | None


def expected_sums(logits: Tensor, corrupted: Corrupted, law: Law, lags: Sequence[int]) -> Tensor:
    """Return the sum over positions of the laws of n-grams that start there, (G, *law.shape), in float32 or wider.

    Token k of an n-gram stands k lags after the first. N-grams with a position that is not text have no law.

    Args:
        logits: Shape (B, L, V), any float dtype.
        corrupted: What stands at positions that are not predicted.
        law: Which cells the n-grams have.
        lags: Distances between neighbouring tokens of an n-gram, G of them.
    """
    noisy_ids, predicted, text, mask_id = corrupted
    sums: Tensor = _ExpectedSums.apply(logits, noisy_ids, predicted, text, mask_id, law, lags)  # type: ignore[no-untyped-call]
    return sums


def windows(x: Tensor, order: int, lag: int, starts: int | None = None) -> list[Tensor]:
    """Return the first, second, ... and last element of each n-gram along dimension 1 of x.

    Args:
        x: Shape (B, L, ...).
        order: n.
        lag: Distance between neighbours.
        starts: Most n-grams in each row; all by default.
    """
    count = max(0, x.shape[1] - (order - 1) * lag)
    count = count if starts is None else min(count, starts)
    return [x[:, lag * k : lag * k + count] for k in range(order)]


class _ExpectedSums(torch.autograd.Function):
    """`expected_sums`, whose gradient makes the probabilities of each tile again."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        noisy_ids: Tensor | None,
        predicted: Tensor | None,
        text: Tensor | None,
        mask_id: int | None,
        law: Law,
        lags: Sequence[int],
    ) -> Tensor:
        ctx.save_for_backward(logits, noisy_ids, predicted, text)
        ctx.options = mask_id, law, lags
        sums = torch.zeros(len(lags), *law.shape, dtype=wide_dtype(logits.dtype), device=logits.device)
        corrupted = Corrupted(noisy_ids, predicted, text, mask_id)
        with exact_matmul(logits.device):
            for tile, starts in _tiles(logits, law, lags):
                p = _probabilities(logits, corrupted, tile)
                for total, lag in zip(sums, lags, strict=True):
                    probabilities = windows(p, law.order, lag, starts)
                    if probabilities[0].numel():  # at the end of a sequence there may be n-grams at shorter lags only
                        law.add_expected(total, probabilities)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, field: Tensor) -> tuple[Tensor | None, ...]:
        logits, noisy_ids, predicted, text = ctx.saved_tensors
        mask_id, law, lags = ctx.options
        corrupted, gradient = Corrupted(noisy_ids, predicted, text, mask_id), torch.zeros_like(logits)
        with exact_matmul(logits.device):
            for tile, starts in _tiles(logits, law, lags):
                # 1. The derivative with respect to the probabilities of the tile: the sum over lags and tokens.
                p = _probabilities(logits, corrupted, tile)
                slope = torch.zeros_like(p)
                for of_lag, lag in zip(field, lags, strict=True):
                    probabilities, slopes = (windows(x, law.order, lag, starts) for x in (p, slope))
                    if probabilities[0].numel():
                        for slope_of_token, part in zip(slopes, law.slopes(probabilities, of_lag), strict=True):
                            slope_of_token.add_(part)
                # 2. The derivative of softmax. It is zero where p is, so that observed tokens and padding have none.
                slope.sub_((slope * p).sum(dim=-1, keepdim=True)).mul_(p)
                # 3. Neighbouring tiles share positions, so that gradients are added.
                gradient[tile] += slope.to(gradient.dtype)
        return gradient, *[None] * 6


def _tiles(logits: Tensor, law: Law, lags: Sequence[int]) -> Iterator[tuple[tuple[slice, slice], int]]:
    """Yield tiles of sequences and positions, and at how many of a tile's positions an n-gram may start.

    A tile reaches beyond these by the longest n-gram. Only where the longest n-gram is longer than a tile should be
    does this make the tile larger.
    """
    rows, length, size = logits.shape
    reach = (law.order - 1) * max(lags)
    room = max(1, reach, TILE.get(logits.device.type, 2**20) // max(size, law.shape[-1]))
    if room >= length:
        step = room // length
        for row in range(0, rows, step):
            yield (slice(row, row + step), slice(None)), length
        return
    for row in range(rows):
        for start in range(0, length - (law.order - 1) * min(lags), room):
            yield (slice(row, row + 1), slice(start, start + room + reach)), room


def _probabilities(logits: Tensor, corrupted: Corrupted, tile: tuple[slice, slice]) -> Tensor:
    """Return what each position of a tile holds, (B, N, V): the predicted law, an observed token, or nothing."""
    part = logits[tile].to(wide_dtype(logits.dtype), copy=True)
    if corrupted.mask_id is not None:
        part[..., corrupted.mask_id] = -torch.inf
    p = part.softmax(dim=-1)
    if corrupted.predicted is not None and corrupted.noisy_ids is not None:
        observed = ~corrupted.predicted[tile][..., None]
        # Scattered, since one-hot vectors would be another tensor of the tile's size, and of int64.
        p.masked_fill_(observed, 0).scatter_add_(2, corrupted.noisy_ids[tile].long()[..., None], observed.to(p))
    return p if corrupted.text is None else p.masked_fill_(~corrupted.text[tile][..., None], 0)
