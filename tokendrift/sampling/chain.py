"""The state of a batch that is being sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from tokendrift._checks import can_be_read, check_count, check_denoiser, check_logits, fail
from tokendrift.diffusion.process import Denoiser, Mixture, Process
from tokendrift.models.random_input import random_numbers
from tokendrift.sampling.categorical import draw, not_finite
from tokendrift.sampling.noise import RowNoise
from tokendrift.sampling.shaping import Shaping

LAST_TIME = 1e-5  # upstream's grid ends here; noise removal is the call after it
SLACK = 1e-5  # of the sums of a sampler's probabilities, which may be float32
CPU_ELEMENTS, DEVICE_ELEMENTS = 2**20, 2**25  # logits that are widened at a time: 4 MiB stay in a CPU's cache


class Sampler(Protocol):
    """A function that yields the law of each reverse step.

    A sampler is called with the chain and the number of steps, and yields a `Mixture` for each step. The loop draws
    from it, so that the sampler finds the new ids in ``chain.ids`` when it continues. A sampler that sets the number
    of steps itself has an attribute ``sets_steps = True`` and is called with None. Options are best kept in a frozen
    dataclass.

    >>> def in_two_speeds(chain, steps):
    ...     *times, end = chain.times(steps)
    ...     times = [t**2 for t in times] + [end]
    ...     for t, s in zip(times[:-1], times[1:]):
    ...         yield chain.posterior(t, s)
    """

    def __call__(self, chain: Chain, steps: int | None, /) -> Iterator[Mixture]:
        """Yield one `Mixture` of float tensors (B, L) for each step."""
        ...


class Chain:
    """The state of a batch that is being sampled: what a sampler reads.

    On an accelerator every step waits for the device a few times: which rows the network is called with, and whether
    it is called at all, depends on what was drawn. That takes a fraction of a millisecond, a call of the network many.

    Attributes:
        process: The corruption process.
        ids: Current tokens, int64 (B, L).
        free: Positions that may change, bool (B, L); False where the user gave the token.
        drawn_log_p: Log-probability that each token had when the denoiser drew it, float64 (B, L); 0 where none was.
        end: Time that the last step goes to: 0, or 1e-5 where something else removes the last noise.
        nfe: Forward calls so far.
        row_nfe: Forward calls that each row took part in, int64 (B,).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: Process,
        ids: Tensor,
        free: Tensor,
        noise: RowNoise,
        *,
        shaping: Shaping,
        end: float,
    ) -> None:
        self.process, self.ids, self.free, self.end = process, ids, free, end
        self.drawn_log_p = torch.zeros_like(ids, dtype=torch.float64)
        self.nfe, self.row_nfe = 0, torch.zeros(len(ids), dtype=torch.int64)
        check_denoiser(denoiser)
        self._denoiser, self._noise, self._shaping = denoiser, noise, shaping
        self._numbers, self._moves = random_numbers(denoiser), 0
        self._sigma: Tensor | None = None
        self._logits: Tensor | None = None  # of the present ids at the present sigma, all rows
        self._present: tuple[Tensor, Tensor] | None = None  # log_p and log_norm of the present ids
        self._rows = max(1, (CPU_ELEMENTS if ids.device.type == "cpu" else DEVICE_ELEMENTS) // process.vocab_size)

    # ------------------------------------------------------------------------------------------ for samplers

    def times(self, steps: int | None) -> list[float]:
        """Return the published grid of N + 1 times, from 1 to `end`."""
        if steps is None:
            raise fail("steps must be an integer of at least 1.", "Pass the number of reverse steps.", steps=steps)
        check_count("steps", steps, least=1)
        grid: list[float] = torch.linspace(1, LAST_TIME, steps + 1, dtype=torch.float64).tolist()
        return [*grid[:-1], self.end]

    def at(self, t: float) -> None:
        """Set the time at which the denoiser is called from now on."""
        self.at_sigma(self.process.sigma(torch.tensor(t, dtype=torch.float64)).expand(len(self.ids)))

    def at_sigma(self, sigma: Tensor) -> None:
        """Set the noise levels ``-log alpha`` (B,) at which the denoiser is called from now on."""
        if self._sigma is None or not torch.equal(sigma, self._sigma):
            self._sigma = sigma
            self._forget()

    def posterior(self, t: float, s: float) -> Mixture:
        """Return the process's own law of the step from t to s, and set the time to t; s = 0 means alpha_s = 1."""
        self.at(t)
        return self.process.mixture(self.log_p if self.process.mask_id is None else None, self.ids, t, s)

    def uniform(self, *shape: int) -> Tensor:
        """Return fresh float64 numbers in [0, 1) of shape (B, *shape), from the stream of each row."""
        return self._noise.uniform(*shape)

    @property
    def log_p(self) -> Tensor:
        """Log-probability of the current tokens under the denoiser, float (B, L).

        Reading it costs a forward call for the whole batch. A law that does not read it, as in masked diffusion, saves
        the call for the rows in which nothing changes.
        """
        return self._read()[0]

    @property
    def log_norm(self) -> Tensor:
        """Logarithm of the sum of e^logit over all tokens but the mask, float (B, L); costs what log_p does."""
        return self._read()[1]

    # ------------------------------------------------------------------------------------------ for the loop

    def move(self, law: Mixture) -> None:
        """Draw the next ids: each position keeps its token, draws from the denoiser, or returns to the prior."""
        if law.stay.shape != self.ids.shape or law.denoise.shape != self.ids.shape:
            raise fail(
                f"a sampler must yield probabilities of shape (B, L) = {tuple(self.ids.shape)}.",
                stay=law.stay,
                denoise=law.denoise,
            )
        # Compared with NaN every chance is false. On an accelerator, this would wait for the device.
        if can_be_read(law.stay) and not ((law.denoise >= -SLACK) & (law.stay + law.denoise <= 1 + SLACK)).all():
            raise fail(
                "a sampler must yield probabilities: stay and denoise, which together are at most 1.",
                "Look for NaN, and for a division by the noise or the signal at an end of time.",
                stay=law.stay,
                denoise=law.denoise,
            )
        # 1. What each position does, by one uniform number for each.
        chance, token = self.uniform(2, self.ids.shape[1]).unbind(1)
        denoised = self.free & (chance < law.denoise)
        redrawn = self.free & ~denoised & (chance < 1 - law.stay)
        # 2. Positions that return to the prior.
        ids = self.ids.clone()
        if self.process.mask_id is not None:
            ids[redrawn] = self.process.mask_id
        else:
            size = self.process.vocab_size
            ids = torch.where(redrawn, (token * size).long().clamp_max_(size - 1), ids)
        # 3. Positions that draw from the denoiser: only for these are logits needed.
        if denoised.any():
            for where, logits in self._at(denoised):
                found = draw(self._shaping(logits), uniform=token[where])
                ids[where], self.drawn_log_p[where] = found.ids, found.log_p
        # A random input is new in every step, so that nothing that was computed can be used again.
        if self._numbers or not torch.equal(ids, self.ids):
            self._forget()
        self.ids, self._moves = ids, self._moves + 1

    def take_likeliest(self) -> None:
        """Put the likeliest token at every free predicted position: greedy noise removal."""
        wanted = self.free & self.process.predicted(self.ids)
        ids = self.ids.clone()
        if wanted.any():
            for where, logits in self._at(wanted):
                best, ids[where] = self._shaping(logits).max(dim=-1)
                if not best.isfinite().all():
                    raise not_finite(logits)
        self.ids = ids
        self._forget()

    # ------------------------------------------------------------------------------------------ the denoiser

    def _read(self) -> tuple[Tensor, Tensor]:
        """Return log_p and log_norm of the current ids, computed a few rows of V at a time."""
        if self._present is not None:
            return self._present
        self._logits = self._forward(torch.arange(len(self.ids), device=self.ids.device))
        flat, present = self._logits.flatten(0, 1), self.ids.flatten()
        found, norm = [], []
        for rows, tokens in zip(flat.split(self._rows), present.split(self._rows), strict=True):
            shaped = self._shaping(self._closed(rows.clone() if self.process.mask_id is not None else rows))
            found.append(shaped.gather(1, tokens[:, None])[:, 0])
            norm.append(torch.logsumexp(shaped, dim=-1))
        log_norm = torch.cat(norm).view_as(self.ids)
        if not log_norm.isfinite().all():
            # Compared with NaN every chance is false: the chain would keep its noise without a word.
            raise not_finite(self._logits)
        self._present = torch.cat(found).view_as(self.ids) - log_norm, log_norm
        return self._present

    def _forget(self) -> None:
        self._logits = self._present = None

    def _at(self, wanted: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Yield logits (K, V) at the wanted positions with their indices, a few rows of V at a time."""
        row, column = wanted.nonzero(as_tuple=True)
        index: tuple[Tensor, ...]
        if self._logits is not None:
            logits, index = self._logits, (row, column)
        else:
            rows = wanted.any(dim=1).nonzero()[:, 0]
            head = getattr(self._denoiser, "logits_at", None)
            if head is None:
                logits, index = self._forward(rows), (torch.searchsorted(rows, row), column)
            else:
                logits, index = self._forward(rows, head, wanted[rows]), (torch.arange(len(row), device=row.device),)
        for part in zip(
            row.split(self._rows), column.split(self._rows), *(i.split(self._rows) for i in index), strict=True
        ):
            yield part[:2], self._closed(logits[part[2:]])

    def _closed(self, logits: Tensor) -> Tensor:
        """Close the mask entry of logits (K, V), in place: a denoiser never predicts the mask."""
        if self.process.mask_id is not None:
            logits[:, self.process.mask_id] = -torch.inf
        return logits

    def _forward(self, rows: Tensor, head: Callable[..., Tensor] | None = None, wanted: Tensor | None = None) -> Tensor:
        """Return logits (R, L, V) of some rows, or by the head (K, V) at the wanted positions of theirs; counted."""
        if self._sigma is None:
            raise fail("the time at which the denoiser is called is not set.", "Call chain.at(t) first.")
        ids = self.ids if len(rows) == len(self.ids) else self.ids[rows]
        sigma = self._sigma.float()[rows.cpu()].to(ids.device)
        options = {}
        if self._numbers:
            options["normals"] = self._noise.normal(self._moves, ids.shape[1], self._numbers)[rows]
        size = self.process.vocab_size
        if head is not None and wanted is not None:
            found, shape = head(ids, sigma, wanted, **options), (int(wanted.sum()), size)
            logits = check_logits("denoiser.logits_at(x_t, sigma, wanted)", found, shape)
        else:
            logits = check_logits("denoiser(x_t, sigma)", self._denoiser(ids, sigma, **options), (*ids.shape, size))
        self.nfe += 1
        self.row_nfe[rows.cpu()] += 1
        return logits
