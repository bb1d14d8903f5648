"""Conventions of Gen.-PPL: which window a token is predicted in, which tokens count, how samples are averaged.

Published numbers differ by convention on the very same text; never compare across protocols.

| protocol | longer than the window | scored targets | average |
|---|---|---|---|
| ``mdlm`` (MDLM, DUO, ReMDM) | chunks, no carried context | all but the second and later EOS of a chunk | tokens |
| ``sedd`` | refused | all | mean over samples of the sample's perplexity |
| ``sdtt`` | refused | all | exp of the mean over samples of the sample's mean NLL |
| ``bd3`` (BD3-LM) | sliding windows | all but every EOS | tokens |
| ``all`` (ours) | sliding windows | all | tokens |
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import check_choice, check_count, fail

PROTOCOLS = ("mdlm", "sedd", "sdtt", "bd3", "all")
WHOLE = ("sedd", "sdtt")  # score a sample in one piece
SLIDING = ("bd3", "all")  # carry context from window to window
NEED_EOS = ("mdlm", "bd3")


class Window(NamedTuple):
    """A piece of a sample that the judge reads at once; positions count from the start of the sample.

    Attributes:
        start: First position read.
        end: One past the last position read.
        first: First position whose token is scored here; the targets are first to end - 1.
    """

    start: int
    end: int
    first: int


def plan_windows(length: int, max_length: int, stride: int | None = None, *, first: int = 1) -> list[Window]:
    """Return the windows that score a sample of ``length`` tokens.

    Without ``stride``: disjoint chunks, each without context, so the first token of a chunk is no target.
    With it: a window every ``stride`` tokens; each scores only what no earlier one did, so that every token but
    the sample's first is a target exactly once.

    Args:
        length: L, tokens of the sample.
        max_length: Tokens that the judge reads at once.
        stride: Step of the sliding window, below ``max_length``.
        first: The first target of a window without context: 0 if something is read before it, such as a start token.
            Default: 1.

    Raises:
        TokenDriftError: If a number is out of range.

    Source: MDLM ``compute_generative_perplexity`` (chunks), BD3-LM ``record_generative_perplexity`` (sliding).

    >>> plan_windows(7, 4)
    [Window(start=0, end=4, first=1), Window(start=4, end=7, first=5)]
    >>> plan_windows(7, 4, stride=2)
    [Window(start=0, end=4, first=1), Window(start=2, end=6, first=4), Window(start=4, end=7, first=6)]
    """
    check_count("max_length", max_length, least=2)
    if stride is None:
        starts = range(0, length - first, max_length)  # a last chunk of one token has no target
        return [Window(start, min(start + max_length, length), start + first) for start in starts]
    check_count("stride", stride, least=1)
    if stride >= max_length:
        raise fail(
            f"stride must be below max_length = {max_length}: later windows need context.",
            "Half of max_length is the usual choice.",
            stride=stride,
        )
    windows = [Window(0, min(max_length, length), first)]
    while (last := windows[-1]).end < length:
        windows.append(Window(last.start + stride, min(last.start + stride + max_length, length), last.end))
    return windows


def scored_targets(ids: Tensor, protocol: str, eos_id: int | None = None) -> Tensor:
    """Return which tokens of a window a protocol counts, bool (B, L); the first of a window is never a target.

    Args:
        ids: Tokens of B windows, (B, L).
        protocol: One of `PROTOCOLS`. ``"mdlm"`` counts a token that is no EOS, and the first EOS of the window
            (with EOS at its very first position, no other EOS counts); ``"bd3"`` counts no EOS; the others
            count all.
        eos_id: Needed by ``"mdlm"`` and ``"bd3"``.

    Raises:
        TokenDriftError: For an unknown protocol, or without an EOS where one is needed.

    >>> scored_targets(torch.tensor([[5, 0, 6, 0]]), "mdlm", eos_id=0)
    tensor([[False,  True,  True, False]])
    """
    check_choice("protocol", protocol, PROTOCOLS)
    if protocol in NEED_EOS:
        if eos_id is None:
            raise fail(f"protocol {protocol!r} needs eos_id.", "Pass eos_id, or protocol='all'.")
        eos = ids == eos_id
        counted = ~eos | (eos.cumsum(dim=-1) == 1) if protocol == "mdlm" else ~eos
    else:
        counted = torch.ones_like(ids, dtype=torch.bool)
    counted[..., 0] = False
    return counted


def log_perplexity(nll: Tensor, tokens: Tensor, protocol: str = "all") -> Tensor:
    r"""Return the logarithm of Gen.-PPL from what each sample contributed.

    With :math:`s_i` the summed NLL and :math:`c_i` the counted tokens of sample i:

    .. math::
        \text{mdlm, bd3, all: } \frac{\sum_i s_i}{\sum_i c_i}, \qquad
        \text{sdtt: } \frac1n\sum_i \frac{s_i}{c_i}, \qquad
        \text{sedd: } \log\frac1n\sum_i e^{s_i/c_i}

    (SEDD's mean over equally large batches of the mean over rows is the mean over rows.)

    Args:
        nll: Summed NLL of each sample, nats, (..., n).
        tokens: Counted tokens of each sample, (..., n).
        protocol: One of `PROTOCOLS`.

    Returns:
        Float64, shape (...).

    >>> log_perplexity(torch.tensor([6.0, 2.0]), torch.tensor([3, 1]))
    tensor(2., dtype=torch.float64)
    """
    check_choice("protocol", protocol, PROTOCOLS)
    nll, tokens = nll.double(), tokens.double()
    if protocol == "sdtt":
        return (nll / tokens).mean(dim=-1)
    if protocol == "sedd":
        return torch.logsumexp(nll / tokens, dim=-1) - math.log(nll.shape[-1])
    return nll.sum(dim=-1) / tokens.sum(dim=-1)
