"""First-hitting sampling of masked models: one token at a time, at the time of its own event."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokendrift._checks import fail
from tokendrift.diffusion.process import Mixture
from tokendrift.sampling.chain import Chain


@dataclass(frozen=True)
class FirstHitting:
    r"""Draw the time of the next unmasking in each row, then one token: ancestral sampling with infinitely many steps.

    With n masks left at noise level :math:`m = 1-\alpha`, the next one falls at
    :math:`m \leftarrow m\,u^{1/n}`, at a position chosen uniformly. Every row has its own clock. A row costs as many
    forwards as it has masks; the number of steps follows and is not given.

    Source: Zheng et al. (arXiv 2409.02908), with the bookkeeping a row.
    """

    sets_steps: ClassVar[bool] = True

    def __call__(self, chain: Chain, steps: int | None) -> Iterator[Mixture]:
        """Yield steps that fill one mask in each row that has any."""
        if chain.process.mask_id is None:
            raise fail("first-hitting requires a masked process.", "Use Ancestral or Psi.", process=chain.process)
        if steps is not None:
            raise fail("first-hitting takes one step for each mask, so steps must be left out.", steps=steps)
        start, _ = chain.process.levels(1.0, 1.0)
        noise = torch.full((len(chain.ids),), 1 - start, dtype=torch.float64)
        while True:
            masked = chain.free & chain.process.predicted(chain.ids)
            left = masked.sum(dim=1)
            if not left.any():
                return
            # The clocks are kept on the CPU, in float64, where noise levels are: this waits for an accelerator.
            clock, place = chain.uniform(2).unbind(1)
            noise = noise * clock.cpu() ** (1 / left.cpu().clamp_min(1))
            chain.at_sigma(-torch.log1p(-noise))
            rank = (place * left).long().clamp_max(left - 1)
            hit = (masked & (masked.cumsum(dim=1) == rank[:, None] + 1)).double()
            yield Mixture(1 - hit, hit)
