"""Prompts followed by noise, and a denoiser that is called with the noise level of exactly that input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from tokendrift._checks import check_count, check_ids, check_logits, fail
from tokendrift.diffusion.process import Denoiser, Process, wide
from tokendrift.evaluation.bootstrap import Interval, check_resampling, mean_interval
from tokendrift.sampling.noise import RowNoise, random_input, subseed


class NoisyPrompts:
    """The prompts of a probe, followed by noise, and the denoiser that reads them.

    Args:
        denoiser: Maps ids (B, L) and sigma (B,) to raw logits (B, L, V).
        process: Its diffusion process.
        prompts: Clean ids (n, P), n at least 2.
        draws: Noise patterns for each prompt.
        batch_size: Sequences in a forward call.
        seed: Random seed of the noise.

    Raises:
        TokenDriftError: If prompts or an option do not fit.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: Process,
        prompts: Tensor,
        draws: int,
        batch_size: int,
        seed: int,
    ) -> None:
        check_ids("prompts", prompts, process.vocab_size)
        if process.mask_id is not None and bool((prompts == process.mask_id).any()):
            raise fail("prompts hold the mask.", "Pass clean ids; the probe appends the masks itself.")
        if len(prompts) < 2:
            raise fail("a probe averages over prompts and needs at least 2 of them.", prompts=prompts)
        check_count("draws", draws, least=1)
        self.batch_size = check_count("batch_size", batch_size, least=1)
        self.denoiser, self.process = denoiser, process
        weights = next(denoiser.parameters(), None) if isinstance(denoiser, nn.Module) else None
        self.device = prompts.device if weights is None else weights.device
        self.prompts = prompts.long()
        self.rows = self.prompts.to(self.device).repeat_interleave(draws, dim=0)
        self.seed = check_count("seed", seed)
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, positions: int) -> Tensor:
        """Return ids at t = 1 for every row, (R, K)."""
        return self.process.prior((len(self.rows), positions), generator=self.generator).to(self.device)

    def uniform(self, positions: int) -> Tensor:
        """Return numbers in [0, 1) for every row, float64 (R, K)."""
        numbers = torch.rand(len(self.rows), positions, generator=self.generator, dtype=torch.float64)
        return numbers.to(self.device)

    def batches(self) -> Iterator[slice]:
        """Yield the rows of one forward call after another."""
        return (slice(start, start + self.batch_size) for start in range(0, len(self.rows), self.batch_size))

    def predict(self, ids: Tensor, span: slice, *, noisy: int, temperature: float) -> Tensor:
        """Return log p at the last ``noisy`` positions of ids (B, L), the others being clean, (B, noisy, V).

        The numbers of a random input are those of the rows of ``span``, and new for every number of noisy positions.
        """
        rows, length = ids.shape

        def noise(ids: Tensor) -> RowNoise:
            return RowNoise(subseed(self.seed, noisy), span.start, rows, self.device)

        alpha = torch.tensor(1 - noisy / length, dtype=torch.float64)
        sigma = self.process.sigma(self.process.schedule.time(alpha)).float().expand(rows).to(self.device)
        shape = (rows, length, self.process.vocab_size)
        found = self.denoiser(ids, sigma, **random_input(self.denoiser, noise, ids))
        logits = check_logits("denoiser(x_t, sigma)", found, shape)
        return self.process.log_probs(wide(logits[:, -noisy:]) / temperature, ids[:, -noisy:])


def entropies(log_p: Tensor) -> Tensor:
    """Return the entropies of log-probabilities (B, K, V), float64 (B, K) on the CPU."""
    return torch.special.entr(log_p.exp()).sum(dim=-1, dtype=torch.float64).cpu()


def interval_of_means(resamples: int, level: float) -> Callable[[Tensor], Interval]:
    """Return a function that maps one value for each prompt, (n,), to their mean with its bootstrap interval."""
    check_resampling(level, resamples)
    return partial(mean_interval, resamples=resamples, level=level)
