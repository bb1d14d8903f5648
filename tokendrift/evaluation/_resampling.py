"""Figures of one set of samples on redrawn samples, all on the same redraws, so that their joint behaviour is kept."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from tokendrift.evaluation._ngrams import NONE, ngrams
from tokendrift.evaluation.bootstrap import draw_counts, halves, redraws
from tokendrift.evaluation.protocols import log_perplexity

HALVES = 200  # enough for a spread known to 5 %
COLUMNS = 64  # redrawn vocabularies counted at a time
ENTRIES = 2**22  # of n-grams times halves at a time: 32 MiB


class Resampling:
    """The redraws of n samples: with replacement for averages, halves for figures that count what occurs at all.

    Two sets of one size are redrawn alike under one seed, so differences between their replicates are paired.

    Args:
        n: Number of samples.
        resamples: R, redraws with replacement; there are `HALVES` halves at most.
        seed: Same seed, same redraws.
    """

    def __init__(self, n: int, resamples: int, seed: int) -> None:
        self.n, self.resamples, self.seed = n, resamples, seed

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of per-sample values (n,) on each redraw, (R,)."""
        return self._weights @ values.double() / self.n

    def ratio(self, numerators: Tensor, denominators: Tensor) -> Tensor:
        """Return the ratio of the sums of two per-sample values (n,) on each redraw, (R,)."""
        return (self._weights @ numerators.double()) / (self._weights @ denominators.double())

    def log_perplexity(self, nll: Tensor, tokens: Tensor, protocol: str) -> Tensor:
        """Return log Gen.-PPL on each redraw, (R,)."""
        draws = redraws(self.n, self.resamples, self._generator())
        return torch.cat([log_perplexity(nll[index], tokens[index], protocol) for index in draws])

    def unigrams(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return unigram entropy and share of the most frequent token on each redraw of rows (n, L), (R,) each."""
        counts = self._counts(rows)
        entropies, shares = [], []
        for weights in self._weights.split(COLUMNS):
            found = torch.sparse.mm(counts, weights.T)  # (V, r)
            total = found.sum(dim=0)
            entropies.append(total.log() - torch.special.xlogy(found, found).sum(dim=0) / total)
            shares.append(found.max(dim=0).values / total)
        return torch.cat(entropies), torch.cat(shares)

    def distinct(self, rows: Tensor, n: int) -> Tensor:
        """Return the share of distinct n-grams on each half of rows (n, L), (H,); NaN without an n-gram."""
        codes = ngrams(rows, n)
        real = codes != NONE
        counts, shares = self._counts(codes), []
        for kept in self._halves.double().split(max(1, min(COLUMNS, ENTRIES // max(1, len(counts))))):
            found = (torch.sparse.mm(counts, kept.T) > 0).sum(dim=0)
            shares.append(found / (kept @ real.sum(dim=1).double()))
        return torch.cat(shares)

    def duplicates(self, rows: Tensor) -> Tensor:
        """Return the share of samples that copy an earlier one on each half of rows (n, L), (H,)."""
        _, ranks = rows.unique(dim=0, return_inverse=True)
        distinct = [len(ranks[half].unique()) for half in self._halves]
        return 1 - torch.tensor(distinct, dtype=torch.float64) / (self.n // 2)

    def _counts(self, codes: Tensor) -> Tensor:
        """Return how often each value of codes (n, W) stands in each sample, sparse (values, n), `NONE` left out."""
        real = codes != NONE
        owners = torch.arange(self.n)[:, None].expand_as(codes)[real]
        values, ranks = codes[real].unique(return_inverse=True)
        places = torch.stack([ranks, owners])
        ones = torch.ones(len(owners), dtype=torch.float64)
        return torch.sparse_coo_tensor(places, ones, (len(values), self.n), check_invariants=False).coalesce()

    @cached_property
    def _weights(self) -> Tensor:
        """How often each sample stands in each redraw, (R, n)."""
        drawn = redraws(self.n, self.resamples, self._generator())
        return torch.cat([draw_counts(index, self.n) for index in drawn])

    @cached_property
    def _halves(self) -> Tensor:
        return halves(self.n, min(HALVES, self.resamples), self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)
