"""Masked (absorbing-state) diffusion: the process of MDLM (arXiv 2406.07524)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from tokendrift._checks import check_mask_id
from tokendrift.diffusion._row_ops import EXCLUDED
from tokendrift.diffusion.process import LEAST_NOISE, Device, Mixture, Process, check_objective, wide
from tokendrift.diffusion.schedules import Schedule


class MaskedDiffusion(Process):
    """Tokens turn into the mask token one by one; the model fills masks in.

    Args:
        vocab_size: V, the mask entry included.
        mask_id: Id of the mask token; the last entry by default.
        schedule: Signal level over time; log-linear by default.

    Raises:
        TokenDriftError: If mask_id is not an entry of the vocabulary.
    """

    mask_id: int

    def __init__(self, vocab_size: int, mask_id: int | None = None, schedule: Schedule | None = None) -> None:
        super().__init__(vocab_size, schedule)
        self.mask_id = vocab_size - 1 if mask_id is None else mask_id
        check_mask_id(self.mask_id, vocab_size)

    def prior(self, shape: tuple[int, ...], *, generator: Generator | None = None, device: Device = None) -> Tensor:
        return torch.full(shape, self.mask_id, dtype=torch.int64, device=device)

    def predicted(self, x_t: Tensor) -> Tensor:
        return x_t == self.mask_id

    def log_probs(self, logits: Tensor, x_t: Tensor) -> Tensor:
        """Return SUBS log-probabilities: no mass on the mask, observed positions copied.

        Source: MDLM, section 3.2.3 (diffusion.py ``_subs_parameterization``), without its in-place edit.
        """
        column = torch.arange(self.vocab_size, device=logits.device)
        open_logits = torch.where(column == self.mask_id, -torch.inf, wide(logits))
        log_p = torch.log_softmax(open_logits, dim=-1).clamp_min(EXCLUDED)
        copied = torch.where(column == x_t[..., None], 0.0, EXCLUDED).to(log_p.dtype)
        return torch.where(self.predicted(x_t)[..., None], log_p, copied)

    def nelbo(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        r"""Return the continuous-time NELBO per token, nats, (B, L).

        .. math:: \ell_{bl} = \frac{-\alpha'_t}{1-\alpha_t}\,(-\log p(x_0))

        on masked positions and exactly 0 elsewhere. For the log-linear schedule the weight is 1/t. The mean
        over all positions bounds the negative log-likelihood per token. See `nll` for what it reads and holds.
        Source: MDLM, equation 10.

        Args:
            logits: Raw denoiser output (B, L, V).
            x0: Clean ids (B, L).
            x_t: Noisy ids (B, L).
            t: Times (B,) in [0, 1].
        """
        check_objective(self.vocab_size, logits, x0, x_t, t)
        nll = self.nll(logits, x0, x_t)
        t = t.to(torch.promote_types(t.dtype, nll.dtype))
        weight = -self.schedule.dalpha(t) / self.schedule.noise(t).clamp_min(LEAST_NOISE)
        return weight.to(nll.dtype)[:, None] * nll

    def posterior(self, logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        r"""Return q(x_s | x_t): a mask stays with (1-alpha_s)/(1-alpha_t), else draws from p.

        ``t`` and ``s`` have shape (B,); ``s = 0`` means alpha_s = 1. Source: MDLM, equation 7.
        """
        p = self.log_probs(logits, x_t).exp()
        noise_t = self.schedule.noise(t)[:, None, None]
        noise_s = torch.where(s == 0, 0.0, self.schedule.noise(s))[:, None, None]
        stay = torch.nn.functional.one_hot(x_t.long(), self.vocab_size).to(p.dtype)
        moved = (stay * noise_s + p * (noise_t - noise_s)) / noise_t
        return torch.where(self.predicted(x_t)[..., None], moved, stay)

    def mixture(self, log_p: Tensor | None, x_t: Tensor, t: float, s: float) -> Mixture:
        """Return the reverse step as chances: masks stay or draw from p, the rest stays."""
        alpha_t, alpha_s = self.levels(t, s)
        leave = self.predicted(x_t).double() * ((alpha_s - alpha_t) / (1 - alpha_t))
        return Mixture(1 - leave, leave)
