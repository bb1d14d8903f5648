"""What a function evaluation costs, in counted floating-point operations."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tokendrift.diffusion.process import Denoiser, Process
from tokendrift.sampling.loop import sample

ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which PyTorch does not count itself


def flops_per_evaluation(denoiser: Denoiser, process: Process, length: int) -> int:
    """Return the floating-point operations of one function evaluation for one sequence.

    Counted are those of matrix products and attention in a forward call with the logits of all positions, two for each
    multiplication and addition; elementwise operations are not. The count depends on the network and the length alone.

    Args:
        denoiser: See `sample`.
        process: `MaskedDiffusion` or `UniformDiffusion`.
        length: L, the number of tokens that the network reads.
    """

    def attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    with FlopCounterMode(display=False, custom_mapping={ATTENTION_ON_CPU: attention}) as counter:
        sample(denoiser, process, (1, length), steps=1, seed=0)
    return int(counter.get_total_flops())
