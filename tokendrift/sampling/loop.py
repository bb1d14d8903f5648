"""The sampler loop: from the prior to ids, with counted function evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokendrift._checks import check_choice, check_ids, check_mask, fail
from tokendrift.diffusion.process import Denoiser, Process
from tokendrift.sampling.ancestral import Ancestral
from tokendrift.sampling.chain import LAST_TIME, Chain, Sampler
from tokendrift.sampling.noise import RowNoise
from tokendrift.sampling.shaping import Shaping

NOISE_REMOVAL = ("ancestral", "greedy", "none")


class Samples(NamedTuple):
    """Generated ids and what they cost.

    Attributes:
        ids: Tokens int64 (B, L).
        steps: Reverse steps taken.
        nfe: Forward calls of the denoiser, noise removal included.
        row_nfe: Forward calls that each row took part in, int64 (B,) on the CPU: at most nfe.
        trajectory: Ids before, between and after the steps (steps + 1, B, L) and, with the greedy removal, once more;
            None unless asked for.
    """

    ids: Tensor
    steps: int
    nfe: int
    row_nfe: Tensor
    trajectory: Tensor | None = None


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    process: Process,
    shape: tuple[int, int],
    *,
    steps: int | None = None,
    sampler: Sampler | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    nucleus: str = "keep",
    noise_removal: str = "ancestral",
    given: Tensor | None = None,
    given_mask: Tensor | None = None,
    seed: int | None = None,
    first_row: int = 0,
    device: torch.device | str | None = None,
    trajectory: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Samples:
    r"""Draw sequences by any sampler.

    Who moves is drawn first, from the law that the sampler yields; tokens are drawn from the denoiser at those
    positions alone, and in masked diffusion rows where nobody moves skip the forward: with N steps a row of L
    masks takes part in :math:`N(1-(1-1/N)^L)` calls on average.

    ``noise_removal="ancestral"`` lets the last of the N steps run to time 0, so that N steps are at most N
    forward calls (the papers' NFE = steps). ``"greedy"`` ends the steps at 1e-5, as the published grid does, and
    then takes the most likely token at every predicted position with one more call: DUO's greedy tail. ``"none"``
    stops at 1e-5; a masked model may leave masks.

    Every row owns its random numbers: row i of a run has those of (seed, i), whatever batch it is in and on
    whatever device. In batches of 64, pass ``first_row=0, 64, 128, ...``. What is left to differ is how the
    network rounds in batches of another size.

    Args:
        denoiser: Maps ids (B, L) and sigma (B,) to raw logits (B, L, V); in masked diffusion also asked for some of
            the rows. It runs in the mode that it is in: call ``.eval()`` first.
        process: `MaskedDiffusion` or `UniformDiffusion`.
        shape: (B, L).
        steps: N, number of reverse steps; left out for samplers that set it themselves.
        sampler: `Ancestral` by default; also `Analytic`, `Psi`, `ReMDM`, `remdm_loop`, `FirstHitting`, or a function
            of your own, see `Sampler`.
        temperature: Divides the logits; below 1 sharpens every prediction, 1 is the model's own law.
        top_k: Draw among the k likeliest tokens.
        top_p: Draw within the nucleus of this probability.
        nucleus: Whether the token that crosses top_p is in it: ``"keep"`` (DUO, SDTT) or ``"drop"`` (ReMDM, BD3-LM).
        noise_removal: What happens at the end of time, see above.
        given: Ids (B, L) of which some are given: a prefix, or text with gaps.
        given_mask: Where they are, bool (B, L); these positions never change.
        seed: Seed of the run; omitted, PyTorch's global generator draws one.
        first_row: Number of the first row within the run.
        device: Where to sample; by default where the parameters of the denoiser are.
        trajectory: Return all states, too.
        progress: Called with 1 after each step, and after the greedy removal.

    Returns:
        The ids with steps and measured forward calls.

    Raises:
        TokenDriftError: For an argument outside its range, given tokens that do not fit, or logits of the wrong
            shape or without finite values.

    Source: MDLM, section 3.2; DUO, equation 4 (in its three-way mixture form).
    """
    shaping = Shaping(temperature, top_k, top_p, nucleus)
    check_choice("noise_removal", noise_removal, NOISE_REMOVAL)
    if not isinstance(shape, Sequence) or len(shape) != 2 or min(shape) < 1:
        raise fail("shape must be (B, L), both at least 1.", shape=shape)
    if sampler is not None and (isinstance(sampler, type) or not callable(sampler)):
        remedy = "named_sampler makes one of a name."
        raise fail("sampler must be a sampler such as Ancestral().", remedy, sampler=sampler)
    if device is None:
        device = next((p.device for p in denoiser.parameters()), None) if isinstance(denoiser, nn.Module) else None
    place = torch.device("cpu" if device is None else device)
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    noise = RowNoise(seed, first_row, shape[0], place)
    ids = torch.cat([process.prior((1, shape[1]), generator=own) for own in noise.generators]).to(place)
    free = torch.ones_like(ids, dtype=torch.bool)
    if given is not None or given_mask is not None:
        known, fixed = (x.to(place) for x in checked_given(given, given_mask, shape, process))
        ids, free = torch.where(fixed, known, ids), ~fixed
    end = 0.0 if noise_removal == "ancestral" else LAST_TIME
    chain = Chain(denoiser, process, ids, free, noise, shaping=shaping, end=end)

    states, taken = [chain.ids], 0
    for law in (sampler or Ancestral())(chain, steps):
        chain.move(law)
        taken += 1
        if trajectory:
            states.append(chain.ids)
        if progress is not None:
            progress(1)
    if noise_removal == "greedy":
        chain.at(LAST_TIME)
        chain.take_likeliest()
        if trajectory:
            states.append(chain.ids)
        if progress is not None:
            progress(1)
    return Samples(chain.ids, taken, chain.nfe, chain.row_nfe, torch.stack(states) if trajectory else None)


def checked_given(
    given: Tensor | None, given_mask: Tensor | None, shape: tuple[int, int], process: Process
) -> tuple[Tensor, Tensor]:
    """Return given ids int64 and where they are, bool, both (B, L), or refuse them."""
    if given is None or given_mask is None:
        raise fail(
            "given and given_mask belong together: ids (B, L), and where they are given.",
            "For a prefix of k tokens: given_mask[:, :k] = True.",
            given=given,
            given_mask=given_mask,
        )
    if check_ids("given", given, process.vocab_size).shape != shape:
        raise fail(f"given must have shape (B, L) = {tuple(shape)}.", given=given)
    fixed = check_mask("given_mask", given_mask, given.shape)
    if process.mask_id is not None and bool((fixed & (given == process.mask_id)).any()):
        raise fail("given holds the mask at positions where given_mask is True.", "Leave gaps out of given_mask.")
    return given.long(), fixed
