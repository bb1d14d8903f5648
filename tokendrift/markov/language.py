"""The language: a stationary first-order Markov chain over words, exactly known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokendrift._checks import check_choice, check_count, check_floating, check_ids, check_tensor, fail
from tokendrift.diffusion import MaskedDiffusion, Process, UniformDiffusion

ROUNDING = 1e-6  # by how much a row of given transitions may miss 1


@dataclass(frozen=True, eq=False)
class MarkovLanguage:
    r"""Sequences of words in which the next depends on the present one alone, started from the stationary law.

    With transitions :math:`P_{ab}` and the law :math:`\pi = \pi P` every position of a sequence has the same law
    :math:`\pi` and every adjacent pair the law :math:`\pi_a P_{ab}`.

    Args:
        transitions: P, row-stochastic (V, V), of a chain in which every word can be reached from every other.
        length: L, words of a sequence.

    Attributes:
        stationary: :math:`\pi`, float64 (V,).

    Raises:
        TokenDriftError: If transitions is no such matrix.

    >>> weather = MarkovLanguage(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), length=3)
    >>> weather.stationary
    tensor([0.3333, 0.6667], dtype=torch.float64)
    >>> weather.log_prob(torch.tensor([[0, 1, 1], [0, 0, 1]])).exp()
    tensor([0.1667, 0.0000], dtype=torch.float64)
    """

    transitions: Tensor
    length: int = 16
    stationary: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("length", self.length, least=2)
        given = check_tensor("transitions", self.transitions, ("V", "V"))
        check_floating("transitions", given)
        rows = given.detach().cpu().double()
        if given.shape[0] != given.shape[1] or not bool((rows >= 0).all()):
            raise fail("transitions must be a square matrix (V, V) of probabilities.", transitions=given)
        if not torch.allclose(rows.sum(dim=1), torch.ones(len(rows), dtype=torch.float64), rtol=0, atol=ROUNDING):
            raise fail(
                "every row of transitions must sum to 1: row a is the distribution of the word after word a.",
                "Divide by transitions.sum(dim=1, keepdim=True).",
                transitions=given,
            )
        rows = rows / rows.sum(dim=1, keepdim=True)
        if not _connected(rows > 0):
            raise fail(
                "transitions must let every word be reached from every other, or the stationary law is not unique.",
                "Use one connected part of the language.",
                transitions=given,
            )
        object.__setattr__(self, "transitions", rows)
        object.__setattr__(self, "stationary", _stationary(rows))

    @classmethod
    def random(cls, words: int = 48, successors: int = 4, length: int = 16, *, seed: int = 10) -> MarkovLanguage:
        """Return a random language: each word has the same number of successors, with flat-Dirichlet chances.

        One successor of each word comes from a random cycle through all words, so that every word occurs and the
        chain is connected; the others are any other words. The default seed gives a unigram entropy of 3.636 nats.

        Args:
            words: V.
            successors: How many words may follow each, 1 to V.
            length: L.
            seed: Of the language; the same seed gives the same one.

        Raises:
            TokenDriftError: If a number is out of range.
        """
        check_count("words", words, least=2)
        if check_count("successors", successors, least=1) > words:
            raise fail(f"successors must lie in 1 to {words}, the number of words.", successors=successors)
        generator = torch.Generator().manual_seed(check_count("seed", seed))
        order = torch.rand(words, words, generator=generator, dtype=torch.float64)
        cycle = torch.randperm(words, generator=generator)
        order[cycle, cycle.roll(1)] = -1  # first of its row, whatever else is drawn
        chosen = order.argsort(dim=1)[:, :successors]
        weights = -torch.log1p(-torch.rand(words, successors, generator=generator, dtype=torch.float64))
        rows = torch.zeros(words, words, dtype=torch.float64).scatter_(1, chosen, weights)
        return cls(rows / rows.sum(dim=1, keepdim=True), length)

    @property
    def words(self) -> int:
        """V."""
        return len(self.transitions)

    @property
    def allowed(self) -> Tensor:
        """Which pairs of adjacent words the language has, bool (V, V)."""
        return self.transitions > 0

    @property
    def pairs(self) -> Tensor:
        r"""The law of an adjacent pair, :math:`\pi_a P_{ab}`, float64 (V, V)."""
        return self.stationary[:, None] * self.transitions

    @property
    def unigram_entropy(self) -> float:
        r"""Entropy of one word, :math:`H(\pi)`, nats."""
        return float(torch.special.entr(self.stationary).sum())

    @property
    def conditional_entropy(self) -> float:
        r"""Entropy of a word given the one before, :math:`\sum_a \pi_a H(P_{a\cdot})`, nats."""
        return float((self.stationary * torch.special.entr(self.transitions).sum(dim=1)).sum())

    @property
    def entropy(self) -> float:
        """Entropy of a sequence per word, nats: what no NELBO per token can fall below."""
        return (self.unigram_entropy + (self.length - 1) * self.conditional_entropy) / self.length

    def process(self, kind: str) -> Process:
        """Return the process over these words: ``"uniform"``, or ``"masked"`` with the mask behind them."""
        check_choice("kind", kind, ("uniform", "masked"))
        return UniformDiffusion(self.words) if kind == "uniform" else MaskedDiffusion(self.words + 1)

    def sample(self, n: int, *, seed: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draw real text, int64 (n, L).

        Args:
            n: Number of sequences.
            seed: Of a generator made for this call.
            generator: Source of randomness instead; PyTorch's own where both are left out.

        Raises:
            TokenDriftError: If n is below 1, or both seed and generator are given.
        """
        check_count("n", n, least=1)
        if seed is not None and generator is not None:
            raise fail("seed and generator cannot both be given.", "Pass one of them.")
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        chance = torch.rand(self.length, n, generator=generator, dtype=torch.float64)
        edges = self.transitions.cumsum(dim=1)
        words = [_invert(self.stationary.cumsum(dim=0).expand(n, -1), chance[0])]
        for step in chance[1:]:
            words.append(_invert(edges[words[-1]], step))
        return torch.stack(words, dim=1)

    def batches(self, batch_size: int, *, seed: int) -> Iterator[Tensor]:
        """Yield fresh batches (B, L) of real text for ever, as `tokendrift.training.train` takes them."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.sample(batch_size, generator=generator)

    def log_prob(self, ids: Tensor) -> Tensor:
        """Return the log-probability of each sequence, nats, float64 (n,); -inf where a pair is not allowed."""
        ids = check_ids("ids", ids, self.words).long()
        steps = self.transitions.log()[ids[:, :-1], ids[:, 1:]]
        return self.stationary.log()[ids[:, 0]] + steps.sum(dim=1)

    def judge(self, smoothing: float = 1e-4) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the language as a causal judge: (ids (B, L), attention_mask) -> logits (B, L, V).

        Args:
            smoothing: Probability that goes to a uniformly drawn word, so that wrong pairs cost a finite
                log-likelihood; above 0, at most 1.
        """
        if not 0 < smoothing <= 1:
            raise fail("smoothing must lie in (0, 1].", smoothing=smoothing)
        table = ((1 - smoothing) * self.transitions + smoothing / self.words).log()
        return lambda ids, attention_mask: table[ids]


def _invert(edges: Tensor, chance: Tensor) -> Tensor:
    """Return the first index whose cumulated probability (n, V) exceeds the chance (n,)."""
    total = edges[:, -1:]
    aim = (chance[:, None] * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(edges.contiguous(), aim, right=True)[:, 0]


def _connected(allowed: Tensor) -> bool:
    """Return whether every word leads to every other, by squaring the reach."""
    reach = (allowed | torch.eye(len(allowed), dtype=torch.bool)).double()
    for _ in range(len(allowed).bit_length()):
        reach = (reach @ reach).clamp_max(1)
    return bool((reach > 0).all())


def _stationary(transitions: Tensor) -> Tensor:
    """Return the law that transitions leave as it is, from the balance equations."""
    balance = transitions.T - torch.eye(len(transitions), dtype=torch.float64)
    balance[-1] = 1  # one equation follows from the others; its place takes the sum of 1
    right = torch.zeros(len(transitions), dtype=torch.float64)
    right[-1] = 1
    law = torch.linalg.solve(balance, right).clamp_min(0)
    return law / law.sum()
