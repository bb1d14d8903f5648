"""The ancestral sampler of masked and uniform-state models: who moves is decided first, tokens are drawn only there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import check_choice, check_count, check_positive, check_tensor, fail
from tokendrift.diffusion.process import Denoiser, Process, wide
from tokendrift.sampling.categorical import draw

LAST_TIME = 1e-5  # upstream's grid ends here; noise removal is the call after it
NOISE_REMOVAL = ("ancestral", "greedy", "none")


class Samples(NamedTuple):
    """Generated ids and what they cost.

    Attributes:
        ids: Tokens int64 (B, L).
        steps: Reverse steps asked for.
        nfe: Forward calls of the denoiser that every row went through, noise removal included.
    """

    ids: Tensor
    steps: int
    nfe: int


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    process: Process,
    shape: tuple[int, int],
    *,
    steps: int,
    temperature: float = 1.0,
    noise_removal: str = "ancestral",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Samples:
    r"""Draw sequences by ancestral sampling.

    ``noise_removal="ancestral"`` lets the last of the N steps run to time 0, so that N steps are N forward
    calls (the papers' NFE = steps). ``"greedy"`` runs the N steps of the published grid (1 to 1e-5) and then
    takes the most likely token at every predicted position: N + 1 calls. ``"none"`` stops at 1e-5: N calls,
    and a masked model may leave masks.

    Each step needs, from the network, one row-wise logsumexp and the entry of the present token; a full
    categorical draw happens only at positions that move.

    Args:
        denoiser: Maps ids (B, L) and sigma (B,) to raw logits (B, L, V).
        process: `MaskedDiffusion` or `UniformDiffusion`; it holds the exact reverse step.
        shape: (B, L).
        steps: N, number of reverse steps.
        temperature: Divides the logits; below 1 sharpens every prediction, 1 is the model's own law.
        noise_removal: What happens at the end of time, see above.
        generator: Source of randomness, on the device of the samples. Same seed, same ids.
        device: Where to sample.
        progress: Called with 1 after each forward call.

    Returns:
        The ids with steps and measured forward calls.

    Raises:
        TokenDriftError: For steps below 1, a non-positive temperature, an unknown noise removal, or logits
            of the wrong shape.

    Source: MDLM, section 3.2; DUO, equation 4 (in its three-way mixture form).
    """
    check_count("steps", steps, least=1)
    check_positive("temperature", temperature)
    check_choice("noise_removal", noise_removal, NOISE_REMOVAL)
    if len(shape) != 2 or min(shape) < 1:
        raise fail("shape must be (B, L), both at least 1.", shape=shape)
    x = process.prior(shape, generator=generator, device=device)
    calls = 0

    def logits_at(t: float) -> Tensor:
        nonlocal calls
        sigma = process.sigma(torch.full((shape[0],), t, dtype=torch.float64)).float().to(x.device)
        logits = check_tensor("denoiser(x_t, sigma)", denoiser(x, sigma), ("B", "L", "V"))
        if logits.shape != (*shape, process.vocab_size):
            raise fail(
                f"the denoiser must return logits (B, L, V) = {(*shape, process.vocab_size)}.",
                "Build the process with the vocabulary of the denoiser.",
                logits=logits,
            )
        calls += 1
        if progress is not None:
            progress(1)
        return tempered(logits, temperature, process.mask_id)

    times = torch.linspace(1, LAST_TIME, steps + 1, dtype=torch.float64).tolist()
    if noise_removal == "ancestral":
        times[-1] = 0.0
    for t, s in pairwise(times):
        x = step(process, logits_at(t), x, t, s, generator=generator)
    if noise_removal == "greedy":
        x = torch.where(process.predicted(x), logits_at(LAST_TIME).argmax(dim=-1), x)
    return Samples(x, steps, calls)


def tempered(logits: Tensor, temperature: float, mask_id: int | None) -> Tensor:
    """Return float32 logits over temperature, with the mask entry closed."""
    logits = wide(logits) / temperature
    if mask_id is not None:
        logits[..., mask_id] = -torch.inf  # a fresh tensor: the division copied it
    return logits


def step(
    process: Process, logits: Tensor, x: Tensor, t: float, s: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return x_s (B, L) drawn from q(x_s | x_t) for one reverse step from time t to s (0 = alpha_s is 1).

    ``logits`` are final: temperature applied, mask entry closed.
    """
    log_norm = torch.logsumexp(logits, dim=-1)
    if log_norm.device.type == "cpu" and not log_norm.isfinite().all():
        # Every comparison with NaN is false, so the step would keep its noise without a word.
        raise fail(
            "the logits of the denoiser are not finite.",
            "Look for an overflow in the denoiser, or a checkpoint that was loaded in part.",
            logits=logits,
        )
    log_p = logits.gather(-1, x[..., None])[..., 0] - log_norm
    stay, denoise = process.mixture(log_p, x, t, s)
    chance = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
    from_model = chance < denoise
    redrawn = ~from_model & (chance < 1 - stay)
    out = x.clone()
    out[from_model] = draw(logits[from_model], generator=generator)
    if process.mask_id is None:
        fresh = process.prior((1, int(redrawn.sum())), generator=generator, device=x.device)
        out[redrawn] = fresh[0]
    return out
