"""Measurements of the doctor: the NELBO of windows of text, as configured and with one assumption changed."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokendrift.diffusion import Denoiser, MaskedDiffusion, Process, UniformDiffusion, sample_times
from tokendrift.models import DiT, MaskedLMDenoiser

LOGITS_AT_ONCE = 1 << 26  # entries of one batch of logits; 256 MiB in float32


class Alternative(NamedTuple):
    """One assumption changed: what is wrong if this gives a better NELBO, and what to do about it."""

    diagnosis: str
    model: Denoiser
    process: Process


class Estimate(NamedTuple):
    """A mean over windows and its standard error, nats per token."""

    mean: float
    error: float

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean, infinite where it overflows."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


@torch.no_grad()
def window_nelbo(
    model: Denoiser, process: Process, ids: Tensor, *, seed: int = 0, counted: bool | None = None
) -> Tensor:
    r"""Return the NELBO of each window (n, L), nats per token, float64 (n,), in the order of their noise.

    Times are stratified over all windows, whatever the size of a batch, and times and noise are fixed by the seed:
    two models are compared under the same noise. So are the numbers of a random input.

    A masked model that does not read sigma has the same NELBO under every schedule, and integrating over time
    leaves an expectation over the number k of masks, uniform on 1..L:

    .. math:: \mathcal L = \mathbb E_{k}\,\mathbb E_{|S|=k}\,\frac1k\sum_{i\in S} -\log p(x_i \mid x_{\setminus S})

    It has far less variance than a time with a random number of masks, and is drawn where it holds, or as
    ``counted`` says. Source: RADD (arXiv 2406.03736), LLaDA (arXiv 2502.09992).
    """
    # 1. Stratified times, and a random order of the windows, so that neighbouring windows do not share a stratum.
    generator = torch.Generator(ids.device).manual_seed(seed)
    times = sample_times(len(ids), smallest=0.0, generator=generator, device=ids.device).sort().values
    order = torch.randperm(len(ids), generator=generator, device=ids.device)
    # 2. Noise and loss, in batches that hold few logits at once.
    rows = max(1, LOGITS_AT_ONCE // (ids.shape[1] * process.vocab_size))
    if counted is None:
        counted = isinstance(process, MaskedDiffusion) and not getattr(model, "time_conditioned", True)
    law = MaskedDiffusion(process.vocab_size, process.mask_id) if counted else process
    found = []
    with _seeded(seed, ids.device):
        for batch, share in zip(ids[order].split(rows), times.split(rows), strict=True):
            if counted:
                x_t, t = _counted(process, batch, share, generator)
            else:
                x_t, _, t, _ = process.corrupt(batch, 1e-3 + (1 - 1e-3) * share, generator=generator)
            found.append(law.nelbo(model(x_t, law.sigma(t)), batch, x_t, t).double().mean(dim=1).cpu())
    return torch.cat(found)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generators for a block, from which a network draws the numbers of a random input."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _counted(process: Process, ids: Tensor, share: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mask ceil(share L) positions of each row; k/L is then a log-linear time, whose loss weight is L/k."""
    length = ids.shape[1]
    count = (share * length).ceil().clamp(1, length)
    rank = torch.rand(ids.shape, generator=generator, device=ids.device).argsort(dim=1).argsort(dim=1)
    x_t = torch.where(rank < count[:, None], process.prior(ids.shape, device=ids.device), ids)
    return x_t, count / length


def estimate(values: Tensor) -> Estimate:
    r"""Return mean and standard error of values (n,) in the order of their strata.

    Neighbouring strata have nearly equal means, so that half the mean square of successive differences estimates
    the variance within them: :math:`s^2 = \frac{1}{2(n-1)}\sum_i (v_{i+1}-v_i)^2`. Source: von Neumann (1941).
    """
    if len(values) < 2:
        return Estimate(values.mean().item(), math.inf)
    spread = values.diff().square().mean().item() / 2
    return Estimate(values.mean().item(), math.sqrt(spread / len(values)))


@torch.no_grad()
def marginal(model: Denoiser, process: Process, length: int, *, rows: int = 16, seed: int = 0) -> Tensor:
    """Return the mean prediction at pure noise, float64 (V,): the word frequencies that the network has learned."""
    device = next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")
    rows = max(1, min(rows, LOGITS_AT_ONCE // (length * process.vocab_size)))
    noise = process.prior((rows, length), generator=torch.Generator(device).manual_seed(seed), device=device)
    with _seeded(seed, device):
        logits = model(noise, process.sigma(torch.ones(rows, device=device)))
    return process.log_probs(logits, noise).double().exp().mean(dim=(0, 1)).cpu()


def sigma_alternatives(model: Denoiser, process: Process) -> Iterator[Alternative]:
    """Yield other assumptions about the input and the output of the network.

    The noise level that it was given in training may be the time t, none, or sigma; its logits may be shifted.
    """
    if getattr(model, "time_conditioned", False):

        def time(sigma: Tensor) -> Tensor:
            return process.schedule.time(torch.exp(-sigma.double())).to(sigma.dtype)

        yield Alternative(
            "the network reads its second argument as the time t, not as sigma = -log(alpha_t): the checkpoint was "
            "trained with other code; wrap the network to convert sigma",
            lambda x_t, sigma: model(x_t, time(sigma)),
            process,
        )
        yield Alternative(
            "the network does better when it is not given the noise level: set time_conditioning to false",
            lambda x_t, sigma: model(x_t, torch.zeros_like(sigma)),
            process,
        )
    elif isinstance(model, DiT):
        seeing = copy.copy(model)  # shares every weight
        seeing.config = dataclasses.replace(model.config, time_conditioning=True)
        yield Alternative(
            "the network does better when it is given sigma: set time_conditioning to true", seeing, process
        )
    elif isinstance(model, MaskedLMDenoiser):
        other = copy.copy(model)  # shares every weight
        other.config = dataclasses.replace(model.config, shifted=not model.config.shifted)
        said = "belong to the token after it: set shifted to " + ("false" if model.config.shifted else "true")
        negation = "do not " if model.config.shifted else ""
        yield Alternative(f"the logits at a position {negation}{said}", other, process)


def process_alternatives(model: Denoiser, process: Process, mask_ids: Iterable[int | None]) -> Iterator[Alternative]:
    """Yield other processes that the network may have been trained for: other mask ids, and the other kind."""
    size, schedule = process.vocab_size, process.schedule
    seen = {process.mask_id}
    for mask_id in mask_ids:
        if mask_id is None or mask_id in seen or not 0 <= mask_id < size:
            continue
        seen.add(mask_id)
        if isinstance(process, MaskedDiffusion):
            said = f"wrong mask id: the network takes {mask_id} for the mask, not {process.mask_id}. Set mask_id"
        else:
            said = f"wrong process: this is a masked model (mask id {mask_id}). Set model_type to mdlm"
        yield Alternative(said, model, MaskedDiffusion(size, mask_id, schedule))
    if isinstance(process, MaskedDiffusion):
        said = "wrong process: this is a uniform-state model. Set model_type to DUO"
        yield Alternative(said, model, UniformDiffusion(size, schedule))


def unpredicted_id(model: Denoiser) -> int | None:
    """Return the id whose output row was never trained, which SUBS causes for the mask; None if there is none."""
    if not isinstance(model, DiT):
        return None
    norms = model.output_layer.linear.weight.detach().double().norm(dim=1)
    low, where = norms.min(dim=0)
    return int(where) if low < 0.1 * norms.median() else None
