"""Sequences longer than the model: window after window, each with the tail of the last one as its prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.diffusion.process import Denoiser, Process
from tokendrift.sampling.loop import Samples, checked_given, sample
from tokendrift.sampling.noise import subseed


def semi_autoregressive(
    denoiser: Denoiser,
    process: Process,
    shape: tuple[int, int],
    *,
    window: int,
    stride: int | None = None,
    given: Tensor | None = None,
    given_mask: Tensor | None = None,
    seed: int | None = None,
    **options: Any,
) -> Samples:
    """Draw sequences of any length with a model of a fixed one.

    The first window is drawn as usual. Each further one moves on by ``stride`` tokens: what it shares with the
    sequence so far is given to it, the rest is drawn. The last one moves on by what is left.

    Args:
        denoiser: As in `sample`.
        process: As in `sample`.
        shape: (B, L), L as long as you like.
        window: Tokens that the model sees at a time, its training length.
        stride: New tokens a window, below ``window``; half of it by default.
        given: Ids (B, L) of which some are given, as in `sample`.
        given_mask: Where they are.
        seed: Seed of the run; the first window is what `sample` draws with it.
        **options: The other options of `sample`; steps are those of each window.

    Returns:
        Ids (B, L) with the steps and calls of all windows together.

    Raises:
        TokenDriftError: If stride does not fit the window, or for what `sample` refuses.

    Source: MDLM (semi-autoregressive sampling), whose last window is always a whole stride.
    """
    if options.get("trajectory"):
        raise fail("trajectory belongs to one window.", "Call sample for each window yourself.", trajectory=True)
    rows, length = shape
    starts = window_starts(length, window, stride)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    if given is None and given_mask is None:
        given, given_mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    ids, known = checked_given(given, given_mask, shape, process)
    ids, known = ids.clone(), known.clone()  # both grow by what is drawn
    steps, nfe, row_nfe, place = 0, 0, torch.zeros(rows, dtype=torch.int64), ids.device
    for index, start in enumerate(starts):
        view = slice(start, start + window)
        found = sample(
            denoiser,
            process,
            (rows, min(window, length)),
            given=ids[:, view],
            given_mask=known[:, view],
            seed=subseed(seed, index) if index else seed,
            **options,
        )
        place = found.ids.device
        ids[:, view] = found.ids.to(ids.device)
        known[:, view] = True if process.mask_id is None else ids[:, view] != process.mask_id
        steps, nfe, row_nfe = steps + found.steps, nfe + found.nfe, row_nfe + found.row_nfe
    return Samples(ids.to(place), steps, nfe, row_nfe)


def window_starts(length: int, window: int, stride: int | None = None) -> list[int]:
    """Return where each window begins; the last one ends with the sequence.

    >>> window_starts(10, 4, 3)
    [0, 3, 6]
    """
    check_count("window", window, least=2)
    stride = window // 2 if stride is None else check_count("stride", stride, least=1)
    if stride >= window:
        raise fail("stride must be below window: each window needs a prefix.", stride=stride, window=window)
    return [*range(0, length - window, stride), max(length - window, 0)]
