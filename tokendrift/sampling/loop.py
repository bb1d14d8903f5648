"""The sampler loop: from the prior to ids, in batches and windows, with counted function evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokendrift._checks import check_choice, check_count, check_ids, check_mask, fail
from tokendrift.diffusion.process import Denoiser, Process
from tokendrift.modes import evaluation_mode
from tokendrift.sampling.ancestral import Ancestral
from tokendrift.sampling.chain import LAST_TIME, Chain, Sampler
from tokendrift.sampling.noise import RowNoise, subseed
from tokendrift.sampling.shaping import Shaping

NOISE_REMOVAL = ("ancestral", "greedy", "none")


class Samples(NamedTuple):
    """Generated ids and what they cost.

    Attributes:
        ids: Tokens int64 (B, L).
        steps: Reverse steps taken, in all windows together; of several batches, the largest number.
        nfe: Forward calls of the denoiser for a batch, noise removal included; of several batches, the largest number.
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
    batch_size: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    seed: int | None = None,
    first_row: int = 0,
    device: torch.device | str | None = None,
    trajectory: bool = False,
    progress: Callable[[int], object] | None = None,
    on_batch: Callable[[Samples], object] | None = None,
) -> Samples:
    r"""Draw sequences by any sampler.

    In each step, the positions that change are drawn first, from the law that the sampler yields. Tokens are then
    drawn from the denoiser at those positions alone. In masked diffusion, rows in which nothing changes skip the
    forward call: with N steps, a row of L masks takes part in :math:`N(1-(1-1/N)^L)` calls on average.

    ``noise_removal="ancestral"`` lets the last of the N steps run to time 0, so that N steps are at most N
    forward calls (the papers' NFE = steps). ``"greedy"`` ends the steps at 1e-5, as the published grid does, and
    then takes the most likely token at every predicted position with one more call: DUO's greedy tail. ``"none"``
    stops at 1e-5; a masked model may leave masks.

    Every row has its own random numbers: row i of a run has those of (seed, i), whatever batch it is in and on
    whatever device, so that ``batch_size`` does not change the samples. What may still differ is how the network
    rounds in batches of another size.

    With ``window``, sequences may be longer than the model. The first window is drawn as usual. Each further window
    moves on by ``stride`` tokens: the tokens that it shares with the sequence so far are given to it, and the others
    are drawn. The last window ends with the sequence.

    Args:
        denoiser: Maps ids (B, L) and sigma (B,) to raw logits (B, L, V); in masked diffusion it is also called with
            some of the rows. A module is put into evaluation mode for the call, and back afterwards.
        process: `MaskedDiffusion` or `UniformDiffusion`.
        shape: (B, L), the number of samples and the number of tokens in each.
        steps: N, the number of reverse steps (of each window); leave it out for samplers that set it themselves.
        sampler: `Ancestral`, `Analytic`, `Psi`, `ReMDM`, `remdm_loop`, `FirstHitting`, or a function of your own, see
            `Sampler`. Default: `Ancestral`.
        temperature: Divides the logits; below 1 sharpens every prediction. Default: 1, the model's own law.
        top_k: Draw among the k likeliest tokens. Default: all tokens.
        top_p: Draw within the nucleus of this probability. Default: 1, all tokens.
        nucleus: Whether the token that crosses top_p is in it: ``"keep"`` (DUO, SDTT) or ``"drop"`` (ReMDM, BD3-LM).
        noise_removal: What happens at the end of time, see above: ``"ancestral"``, ``"greedy"`` or ``"none"``.
        given: Ids (B, L) of which some are given: a prefix, or text with gaps.
        given_mask: Where ids are given, bool (B, L); these positions never change.
        batch_size: Rows drawn together in one forward call. Default: all rows.
        window: Tokens that the model sees at a time, its training length. Default: the whole sequence.
        stride: New tokens of each further window, below ``window``. Default: half of the window.
        seed: Random seed of the run. Default: drawn from PyTorch's global generator.
        first_row: Number of the first row within the run. Default: 0.
        device: Where to sample. Default: where the parameters of the denoiser are.
        trajectory: Whether to return all states, too; only for a single window and a single batch.
        progress: Called with 1 after each step of a batch, and after the greedy removal.
        on_batch: Called with the samples of each batch as soon as they are drawn.

    Returns:
        The ids with steps and measured forward calls.

    Raises:
        TokenDriftError: For an argument outside its range, given tokens that do not fit, or logits of the wrong
            shape or without finite values.

    Source: MDLM, section 3.2, and its semi-autoregressive sampling, whose last window is always a whole stride; DUO,
    equation 4 (in its three-way mixture form).
    """
    # 1. Check everything before the first forward call.
    shaping = Shaping(temperature, top_k, top_p, nucleus)
    check_choice("noise_removal", noise_removal, NOISE_REMOVAL)
    if not isinstance(shape, Sequence) or len(shape) != 2 or min(shape) < 1:
        raise fail("shape must be (B, L), both at least 1.", shape=shape)
    if sampler is not None and (isinstance(sampler, type) or not callable(sampler)):
        remedy = "Use named_sampler to get a sampler by its name."
        raise fail("sampler must be a sampler such as Ancestral().", remedy, sampler=sampler)
    rows, length = shape
    size = rows if batch_size is None else check_count("batch_size", batch_size, least=1)
    views = window_views(length, window, stride)
    if trajectory and (size < rows or len(views) > 1):
        raise fail("trajectory needs a single window and batch.", "Call sample for each of them.", trajectory=True)
    values, fixed = _checked_given(given, given_mask, shape, process)
    if device is None:
        device = next((p.device for p in denoiser.parameters()), None) if isinstance(denoiser, nn.Module) else None
    target = torch.device("cpu" if device is None else device)
    seed = int(torch.randint(2**62, ())) if seed is None else seed

    # 2. Draw batch after batch; each row has the random numbers of its number within the run.
    run = _Run(denoiser, process, sampler or Ancestral(), steps, shaping, noise_removal, trajectory, progress)
    batches: list[Samples] = []
    with evaluation_mode(denoiser):
        for first in range(0, rows, size):
            part = slice(first, first + size)
            ids, free = values[part].to(target, copy=True), ~fixed[part].to(target)
            batches.append(run.sequences(ids, free, views, seed, first_row + first))
            if on_batch is not None:
                on_batch(batches[-1])

    # 3. Put the batches together.
    if len(batches) == 1:
        return batches[0]
    ids, row_nfe = (torch.cat(parts) for parts in ([b.ids for b in batches], [b.row_nfe for b in batches]))
    return Samples(ids, max(b.steps for b in batches), max(b.nfe for b in batches), row_nfe)


@dataclass(frozen=True)
class _Run:
    """What all windows of all batches have in common; see `sample`."""

    denoiser: Denoiser
    process: Process
    sampler: Sampler
    steps: int | None
    shaping: Shaping
    noise_removal: str
    trajectory: bool
    progress: Callable[[int], object] | None

    def sequences(self, ids: Tensor, free: Tensor, views: list[slice], seed: int, first_row: int) -> Samples:
        """Draw the free positions of ids (B, L), one window after another; both tensors are overwritten."""
        drawn: list[Samples] = []
        for index, view in enumerate(views):
            own = subseed(seed, index) if index else seed  # the first window is what a run without windows draws
            drawn.append(self.window(ids[:, view], free[:, view], own, first_row))
            ids[:, view] = drawn[-1].ids
            # The next window keeps what stands; masks that were left stay free.
            free[:, view] = self.process.predicted(ids[:, view]) if self.process.mask_id is not None else False
        if len(drawn) == 1:
            return drawn[0]
        calls = torch.stack([one.row_nfe for one in drawn]).sum(dim=0)
        return Samples(ids, sum(one.steps for one in drawn), sum(one.nfe for one in drawn), calls)

    def window(self, given: Tensor, free: Tensor, seed: int, first_row: int) -> Samples:
        """Draw the free positions of one window (B, L) from the prior on."""
        noise = RowNoise(seed, first_row, len(given), given.device)
        prior = [self.process.prior((1, given.shape[1]), generator=own) for own in noise.generators]
        ids = torch.where(free, torch.cat(prior).to(given.device), given)
        end = 0.0 if self.noise_removal == "ancestral" else LAST_TIME
        chain = Chain(self.denoiser, self.process, ids, free.clone(), noise, shaping=self.shaping, end=end)
        states, taken = [chain.ids], 0

        def count() -> None:
            if self.trajectory:
                states.append(chain.ids)
            if self.progress is not None:
                self.progress(1)

        for law in self.sampler(chain, self.steps):
            chain.move(law)
            taken += 1
            count()
        if self.noise_removal == "greedy":
            chain.at(LAST_TIME)
            chain.take_likeliest()
            count()
        return Samples(chain.ids, taken, chain.nfe, chain.row_nfe, torch.stack(states) if self.trajectory else None)


def window_views(length: int, window: int | None, stride: int | None) -> list[slice]:
    """Return the positions of each window; the last window ends with the sequence."""
    if window is None:
        if stride is not None:
            raise fail("stride requires window.", "Pass window, the length of the model.", stride=stride)
        return [slice(0, length)]
    check_count("window", window, least=2)
    stride = window // 2 if stride is None else check_count("stride", stride, least=1)
    if stride >= window:
        raise fail("stride must be below window: each window needs a prefix.", stride=stride, window=window)
    starts = [*range(0, length - window, stride), max(length - window, 0)]
    return [slice(start, min(start + window, length)) for start in starts]


def _checked_given(
    given: Tensor | None, given_mask: Tensor | None, shape: tuple[int, int], process: Process
) -> tuple[Tensor, Tensor]:
    """Return given ids int64 and where they are, bool, both (B, L), or refuse them; without any, nothing is given."""
    if given is None and given_mask is None:
        return torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    if given is None or given_mask is None:
        raise fail(
            "given and given_mask must be passed together: ids (B, L), and the positions that they have.",
            "For a prefix of k tokens: given_mask[:, :k] = True.",
            given=given,
            given_mask=given_mask,
        )
    if check_ids("given", given, process.vocab_size).shape != tuple(shape):
        raise fail(f"given must have shape (B, L) = {tuple(shape)}.", given=given)
    fixed = check_mask("given_mask", given_mask, given.shape)
    if process.mask_id is not None and bool((fixed & (given == process.mask_id)).any()):
        raise fail("given holds the mask at positions where given_mask is True.", "Leave gaps out of given_mask.")
    return given.long(), fixed
