"""Temperature, top-k and nucleus (top-p): how the denoiser's distribution is changed before a draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendrift._checks import check_choice, check_count, check_positive, fail
from tokendrift.diffusion.process import wide

NUCLEUS = ("keep", "drop")
FIRST_WIDTH, WIDTH_GROWTH = 256, 16  # a nucleus is looked for among the likeliest 256, then 4096, then all


@dataclass(frozen=True)
class Shaping:
    """Temperature, then top-k, then nucleus. With the defaults, the model's own distribution is kept.

    Attributes:
        temperature: Divides the logits; below 1 sharpens every prediction.
        top_k: Keep the k likeliest tokens, and those that are as likely as the last of them.
        top_p: Keep the likeliest tokens up to this probability.
        nucleus: Whether the token that crosses top_p is kept: ``"keep"`` as in DUO and SDTT, or ``"drop"`` as in ReMDM
            and BD3-LM (the likeliest token always stays). For top_p = 0.6 and probabilities (0.5, 0.3, 0.15, 0.05),
            ``"keep"`` leaves two tokens and ``"drop"`` one.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    nucleus: str = "keep"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        if self.top_k is not None:
            check_count("top_k", self.top_k, least=1)
        if check_positive("top_p", self.top_p) > 1:
            raise fail("top_p must lie in (0, 1]; 1 keeps every token.", top_p=self.top_p)
        check_choice("nucleus", self.nucleus, NUCLEUS)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return unnormalised log-probabilities (K, V) in at least float32, -inf where a token was cut.

        Args:
            logits: Raw logits (K, V), any float dtype; not written to, and returned where nothing is to be done.
        """
        shaped = wide(logits)
        if self.temperature != 1:
            shaped = shaped / self.temperature
        if self.top_k is not None and self.top_k < shaped.shape[1]:
            least = shaped.topk(self.top_k, dim=-1).values[:, -1:]
            shaped = shaped.masked_fill(shaped < least, -torch.inf)
        if self.top_p < 1:
            shaped = self._cut_nucleus(shaped)
        return shaped

    def _cut_nucleus(self, shaped: Tensor) -> Tensor:
        """Return log-probabilities with everything outside the nucleus of each row closed."""
        out, size = torch.full_like(shaped, -torch.inf), shaped.shape[1]
        total = torch.logsumexp(shaped, dim=-1, keepdim=True)
        rows, width = torch.arange(len(shaped), device=shaped.device), min(FIRST_WIDTH, size)
        while len(rows):
            value, index = shaped[rows].topk(width, dim=-1)  # falling
            p = (value - total[rows]).double().exp_()
            reached = p.cumsum(dim=-1)
            kept = (reached - p if self.nucleus == "keep" else reached) <= self.top_p
            kept[:, 0] = True  # the likeliest always stays
            found = ~kept[:, -1] | (width == size)
            done = rows[found]
            out[done[:, None], index[found]] = value[found].masked_fill_(~kept[found], -torch.inf)
            rows, width = rows[~found], min(width * WIDTH_GROWTH, size)
        return out
