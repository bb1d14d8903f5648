"""Uniform-state diffusion: the process of UDLM and DUO (arXiv 2506.10892)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from tokendrift._checks import fail
from tokendrift._operators import wide_dtype
from tokendrift.diffusion._row_ops import uniform_terms
from tokendrift.diffusion.process import LEAST_NOISE, Device, Mixture, Process, check_objective, wide


class UniformDiffusion(Process):
    """Tokens turn into uniformly random ones; the model may change every position at every step.

    Args:
        vocab_size: V. No mask token; an entry kept for one is an ordinary state.
        schedule: Signal level over time; log-linear by default.
    """

    def prior(self, shape: tuple[int, ...], *, generator: Generator | None = None, device: Device = None) -> Tensor:
        ids = torch.empty(shape, dtype=torch.int64, device=device)
        return ids.random_(0, self.vocab_size, generator=generator)

    def predicted(self, x_t: Tensor) -> Tensor:
        return torch.ones_like(x_t, dtype=torch.bool)

    def log_probs(self, logits: Tensor, x_t: Tensor) -> Tensor:
        """Return ``log_softmax`` of the logits; x_t does not matter."""
        return torch.log_softmax(wide(logits), dim=-1)

    def nelbo(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        r"""Return DUO's NELBO per token, nats, (B, L).

        With :math:`\kappa = V\alpha/(1-\alpha)`, :math:`i = x_t`,
        :math:`r_j = (1+\kappa[j=x_0])/(1+\kappa[i=x_0])` and
        :math:`\hat r_j = (1+\kappa p_j)/(1+\kappa p_i)`:

        .. math:: \ell = \frac{-\alpha'}{V\alpha}\sum_j\Big(r_j\log\frac{r_j}{\hat r_j} - r_j + \hat r_j\Big)

        Evaluated with :math:`L_j = \mathrm{softplus}(\log\kappa + \log p_j) = \log(1 + \kappa p_j)` instead of
        logarithms of sums, so that float32 holds at both ends of time, in one pass over V. Beside the gradient
        nothing of the size of the logits is made.

        Args:
            logits: Raw denoiser output (B, L, V).
            x0: Clean ids (B, L).
            x_t: Noisy ids (B, L).
            t: Times (B,) in [0, 1].

        Source: DUO, equation 5 (algo.py ``DUO_BASE.nll_per_token``).
        """
        check_objective(self.vocab_size, logits, x0, x_t, t)
        size, same, dtype = self.vocab_size, x_t == x0, wide_dtype(logits.dtype)
        t = t.to(torch.promote_types(t.dtype, dtype))[:, None]
        alpha, dalpha = self.schedule.alpha(t), self.schedule.dalpha(t)
        kappa = (size * alpha / self.schedule.noise(t).clamp_min(LEAST_NOISE)).expand(x_t.shape)
        rows, noisy, clean = logits.flatten(0, 1), x_t.long().flatten(), x0.long().flatten()
        terms = uniform_terms(rows, noisy, clean, kappa.to(dtype).flatten())
        total, p_noisy, p_clean = terms.view(3, *x_t.shape)
        at_noisy = torch.log1p(kappa * p_noisy)
        gap = torch.log1p(kappa) - torch.log1p(kappa * p_clean)  # what L at x0 lacks of its largest value
        # r is 1/(1 + kappa) off x0 and 1 at x0 where the token is the clean one, else 1 and 1 + kappa. Each line is
        # sum_j r_j (log r_j - log rhat_j), ordered so that large terms meet their opposites first.
        r_off = torch.where(same, 1 / (1 + kappa), torch.ones_like(kappa))
        kept = -r_off * ((total - at_noisy) + (size - 1) * gap)
        moved = torch.log1p(kappa) - (total - size * at_noisy) + kappa * (gap + at_noisy)
        excess = (size + kappa) * (torch.exp(-at_noisy) - r_off)  # sum_j (rhat_j - r_j), by sum_j p_j = 1
        rate = torch.where(alpha > 0, -dalpha / (size * alpha), 0.0)  # without signal, the loss is 0
        return (rate * (torch.where(same, kept, moved) + excess)).to(dtype)

    def completion_logits(self, logits: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        r"""Return the logits plus :math:`\log(1 + V\alpha/(1-\alpha))` at x_t.

        What minimises the NELBO predicts a position from all others, so that what the token at the position itself
        tells is added here: :math:`q(x_0 = j \mid x_t) \propto p_j\,(\alpha [j = x_t] + (1-\alpha)/V)`.
        """
        noise = self.schedule.noise(t).clamp_min(LEAST_NOISE)
        shown = torch.log1p(self.vocab_size * self.schedule.alpha(t) / noise)[:, None, None]
        logits = wide(logits)
        return logits.scatter_add(2, x_t.long()[..., None], shown.to(logits).expand(-1, x_t.shape[1], 1))

    def posterior(self, logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        r"""Return q(x_s | x_t) (B, L, V) for times (B,); ``s = 0`` means alpha_s = 1.

        Source: DUO, equation 4 (algo.py ``DUO_BASE._posterior_from_x0``).
        """
        size = self.vocab_size
        p = self.log_probs(logits, x_t).exp()
        alpha_t, noise_t = (level[:, None, None] for level in (self.schedule.alpha(t), self.schedule.noise(t)))
        noise_s = torch.where(s == 0, 0.0, self.schedule.noise(s))[:, None, None]
        gained = noise_t - noise_s  # alpha_s - alpha_t
        alpha_s = alpha_t + gained
        here = torch.nn.functional.one_hot(x_t.long(), size).to(p.dtype)
        p_here = p.gather(-1, x_t.long()[..., None])
        top = alpha_t * (size * p + noise_s / alpha_s) * here  # alpha_t / alpha_s - alpha_t
        top = top + gained * p + gained / alpha_s * noise_s / size
        return top / (alpha_t * size * p_here + noise_t)

    def mixture(self, log_p: Tensor | None, x_t: Tensor, t: float, s: float) -> Mixture:
        r"""Return the exact three-way form of the posterior, which needs only p at the present token.

        With :math:`D = \alpha_t V p_i + 1 - \alpha_t` and :math:`a = \alpha_t/\alpha_s`: stay with
        :math:`(\alpha_t V p_i + a - \alpha_t)/D`, draw from p with :math:`(\alpha_s-\alpha_t)/D`, draw
        uniformly with :math:`(1-a)(1-\alpha_s)/D`.
        """
        if log_p is None:
            raise fail(
                "log_p is missing: uniform diffusion needs the log-probability of the present tokens.",
                "Pass log_p, (B, L): process.log_probs(logits, x_t) at the ids x_t.",
            )
        alpha_t, alpha_s = self.levels(t, s)
        evidence = alpha_t * self.vocab_size * log_p.double().exp()
        total = evidence + 1 - alpha_t
        return Mixture((evidence + alpha_t / alpha_s - alpha_t) / total, (alpha_s - alpha_t) / total)
