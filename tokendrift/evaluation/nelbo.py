"""Held-out NELBO of a denoiser, a figure that depends neither on a sampler nor on a judge."""

from __future__ import annotations

import torch
from torch import Tensor

from tokendrift._checks import check_count
from tokendrift.diffusion.process import Corruption, Denoiser, Process
from tokendrift.evaluation.bootstrap import Interval, mean_interval
from tokendrift.modes import evaluation_mode
from tokendrift.sampling.noise import RowNoise, random_input

LOGITS = 1 << 27  # held at once: half a GiB in float32


def sequence_nelbo(
    denoiser: Denoiser, process: Process, ids: Tensor, *, batch_size: int = 256, seed: int = 0
) -> Tensor:
    """Return the NELBO of each sequence, nats per token, float64 (n,) on the CPU.

    One time and one noise for each sequence, fixed by the seed and spread evenly over a batch: models that
    share seed and ids see the same noise and compare in pairs. A forward call takes as many sequences of the batch
    as have `LOGITS` logits together.

    Args:
        denoiser: Maps noisy ids (B, L) and sigma (B,) to logits (B, L, V); a module is put into evaluation mode
            and back.
        process: Corruption and objective.
        ids: Clean ids (n, L), on the denoiser's device.
        batch_size: Sequences whose times are spread together.
        seed: Of times and noise.
    """
    check_count("batch_size", batch_size, least=1)
    generator = torch.Generator(ids.device).manual_seed(seed)
    rows = max(1, LOGITS // (ids.shape[1] * process.vocab_size))
    parts: list[Tensor] = []
    taken = 0

    def noise(ids: Tensor) -> RowNoise:
        return RowNoise(seed, taken, len(ids), ids.device)

    with evaluation_mode(denoiser):
        for batch in ids.split(batch_size):
            noisy = process.corrupt(batch, generator=generator)
            for part, clean in zip(zip(*(x.split(rows) for x in noisy), strict=True), batch.split(rows), strict=True):
                few = Corruption(*part)
                logits = few.denoise(denoiser, **random_input(denoiser, noise, few.x_t))
                taken += len(clean)
                nelbo = process.nelbo(logits, clean, few.x_t, few.t)
                parts.append(nelbo.double().mean(dim=1).cpu())
    return torch.cat(parts)


def validation_nelbo(
    denoiser: Denoiser, process: Process, ids: Tensor, *, batch_size: int = 256, seed: int = 0
) -> float:
    """Return the mean of `sequence_nelbo`, nats per token."""
    return sequence_nelbo(denoiser, process, ids, batch_size=batch_size, seed=seed).mean().item()


def nelbo_interval(
    denoiser: Denoiser,
    process: Process,
    ids: Tensor,
    *,
    batch_size: int = 256,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the held-out NELBO in nats per token, with its bootstrap interval over sequences.

    Args:
        denoiser: As for `sequence_nelbo`.
        process: As for `sequence_nelbo`.
        ids: Clean ids (n, L) that nothing was trained on.
        batch_size: As for `sequence_nelbo`.
        resamples: As for `bootstrap_interval`.
        level: As for `bootstrap_interval`.
        seed: Of times, noise and redraws.
    """
    values = sequence_nelbo(denoiser, process, ids, batch_size=batch_size, seed=seed)
    return mean_interval(values, resamples=resamples, level=level, seed=seed)
