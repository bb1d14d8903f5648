"""What the tests of the samplers share: small denoisers, laws computed exactly, and Pearson's test."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.sampling import Ancestral, Chain, Shaping, sample

V, MASK = 5, 4
PROCESSES = {"masked": MaskedDiffusion(V), "uniform": UniformDiffusion(V)}


class Table:
    """Fixed random logits for every token, its left neighbour and position; remembers what it was asked."""

    def __init__(self, length=3, vocab=V, seed=0, spread=1.5):
        generator = torch.Generator().manual_seed(seed)
        self.own, self.left = spread * torch.randn(2, vocab, length, vocab, generator=generator, dtype=torch.float64)
        self.asked = []

    def __call__(self, x_t, sigma):
        self.asked.append((x_t.clone(), sigma))
        position = torch.arange(x_t.shape[1])
        return self.own[x_t, position] + 0.7 * self.left[x_t.roll(1, dims=1), position]


class Scripted:
    """Noise that was written down beforehand."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def uniform(self, *shape):
        return self.numbers.pop(0)


def chain_of(process, denoiser, ids, *, end=0.0, noise=None, **shaping):
    """Build the state of a batch."""
    free = torch.ones_like(ids, dtype=torch.bool)
    return Chain(denoiser, process, ids, free, noise, shaping=Shaping(**shaping), end=end)


def states(length: int) -> Tensor:
    """Return all sequences of a length, (V^L, L)."""
    return torch.tensor(list(itertools.product(range(V), repeat=length)))


def law_of_x0(process, logits: Tensor, **shaping) -> Tensor:
    """Return the denoiser's law of a clean token at every position, (B, L, V), the mask closed."""
    logits = logits.clone()
    if process.mask_id is not None:
        logits[..., process.mask_id] = -torch.inf
    return Shaping(**shaping)(logits.flatten(0, 1)).softmax(-1).view_as(logits)


def dense(process, mixture, p: Tensor, ids: Tensor) -> Tensor:
    """Write a mixture out as probabilities of the next token, (B, L, V)."""
    size = p.shape[-1]
    here = torch.nn.functional.one_hot(ids, size).double()
    prior = torch.full((size,), 1 / size, dtype=torch.float64)
    if process.mask_id is not None:
        prior = torch.nn.functional.one_hot(torch.tensor(process.mask_id), size).double()
    stay, denoise = mixture.stay[..., None], mixture.denoise[..., None]
    return stay * here + denoise * p + (1 - stay - denoise) * prior


def kernels(process, sampler, denoiser, length, steps, *, end=0.0, **shaping):
    """Yield the transition matrix (V^L, V^L) of each step of a sampler whose law depends on the present ids alone."""
    every = states(length)
    chain = chain_of(process, denoiser, every, end=end, **shaping)
    chosen = torch.arange(length)
    for mixture in sampler(chain, steps):
        p = law_of_x0(process, denoiser(every, None), **shaping)
        table = dense(process, mixture, p, every)  # (S, L, V)
        yield table[:, chosen, every].prod(-1)


def final_law(process, sampler, denoiser, length, steps, **options):
    """Return the exact law of the sampled sequences, (V^L,)."""
    count = V**length
    if process.mask_id is None:
        law = torch.full((count,), 1 / count, dtype=torch.float64)
    else:
        law = (states(length) == process.mask_id).all(dim=1).double()
    for kernel in kernels(process, sampler, denoiser, length, steps, **options):
        law = law @ kernel
    return law


def number(ids: Tensor) -> Tensor:
    """Return the index of each sequence among `states`."""
    return (ids * V ** torch.arange(ids.shape[1] - 1, -1, -1)).sum(dim=1)


def assert_follows(found: Tensor, law: Tensor, *, surprise: float = 6.0):
    """Pearson's test of outcomes (n,) against a law; impossible outcomes must not occur.

    The statistic of a right sampler has mean df and variance 2 df (or little more); one in a million lies beyond six
    standard deviations.
    """
    counts = torch.bincount(found, minlength=len(law)).double()
    expected = len(found) * law
    possible = expected > 1e-9
    assert (counts[~possible] == 0).all()
    rare = possible & (expected < 5)
    counts = torch.cat([counts[possible & ~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[possible & ~rare], expected[rare].sum()[None].clamp_min(1e-9)])
    degrees = len(counts) - 1
    statistic = ((counts - expected).square() / expected.clamp_min(1)).sum()
    assert statistic < degrees + surprise * (2 * degrees) ** 0.5 + 10


def assert_samples_follow(
    process, sampler, *, steps=3, length=2, rows=4000, seed=0, noise_removal="ancestral", **shaping
):
    """Compare what `sample` draws with the exact law of its sampler."""
    denoiser = Table(length)
    end = 0.0 if noise_removal == "ancestral" else 1e-5
    law = final_law(process, sampler or Ancestral(), denoiser, length, steps, end=end, **shaping)
    found = sample(
        denoiser,
        process,
        (rows, length),
        steps=steps,
        sampler=sampler,
        seed=seed,
        noise_removal=noise_removal,
        **shaping,
    )
    assert_follows(number(found.ids), law)
