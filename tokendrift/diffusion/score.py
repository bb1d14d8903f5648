r"""Concrete scores, score entropy, and their map to probabilities of clean tokens (SEDD, arXiv 2310.16834).

The concrete score of a position is the ratio :math:`s_j = q_t(x^{j})/q_t(x)`, where :math:`x^{j}` has token j in place
of :math:`i = x_t`; so :math:`s_i = 1`. With :math:`\kappa = V\alpha/(1-\alpha)` and p the law of x0 that a `Process`
uses, that of the clean token given the *other* positions (its posterior brings in the present token by Bayes' rule):

.. math:: s_j = \frac{\alpha}{1-\alpha}\,p_j = \frac{p_j}{e^\sigma - 1}\quad\text{(masked } i\text{)},\qquad
    s_j = \frac{1+\kappa p_j}{1+\kappa p_i}\quad\text{(uniform)}

Both conversions are exact and can be inverted, so a model of scores and a model of p are two forms of the same model.
The loss of the first is the denoising score entropy, that of the second is the NELBO, and the two are equal.
`ScoreDenoiser` makes any score network a denoiser, to be refined by the drifting loss and sampled like the others.

Functions take the process first: one with a mask is absorbing, one without is uniform.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tokendrift._checks import check_ids, fail
from tokendrift.diffusion._row_ops import EXCLUDED
from tokendrift.diffusion.process import Denoiser, Process, check_columns, check_objective, wide


def network_log_score(process: Process, output: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    r"""Return the log-scores (B, L, V) that SEDD reads from the output of a network.

    .. math:: \log s_j = \ell_j - \log(e^\sigma - 1) - \log(V - 1)\ \text{(absorbing)},\qquad
        \log s_j = \ell_j\ \text{(uniform)}

    and 0 at the present token. The offset puts an untrained network near the true size of the scores.

    Args:
        process: Masked or uniform.
        output: Raw output of the network (B, L, V).
        x_t: Noisy ids (B, L).
        sigma: ``-log alpha_t``, (B,).

    Raises:
        TokenDriftError: If the shapes do not belong together.

    Source: SEDD, model/transformer.py ``SEDD.forward``.
    """
    _check_rows(process, "output", output, x_t, sigma)
    log_s = wide(output)
    if process.mask_id is not None:
        log_s = log_s - _log_expm1(sigma, log_s) - math.log(process.vocab_size - 1)
    return log_s.scatter(-1, x_t.long()[..., None], 0.0)


def log_score(process: Process, log_p: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Return the log-scores (B, L, V) of log-probabilities of x0, by the map above.

    Observed tokens of a masked process, whose p is 1, have score ``e^sigma - 1`` towards the mask and none elsewhere
    (-1e6).

    Args:
        process: Masked or uniform.
        log_p: What `Process.log_probs` returns, (B, L, V).
        x_t: Noisy ids (B, L).
        sigma: ``-log alpha_t``, (B,).

    Raises:
        TokenDriftError: If the shapes do not belong together.
    """
    _check_rows(process, "log_p", log_p, x_t, sigma)
    here, odds = x_t.long()[..., None], _log_expm1(sigma, log_p)
    if process.mask_id is None:
        level = nn.functional.softplus(log_p + (math.log(process.vocab_size) - odds), threshold=40)
        return level - level.gather(-1, here)
    to_mask = torch.arange(process.vocab_size, device=log_p.device) == process.mask_id
    observed = torch.where(to_mask, odds, EXCLUDED).expand_as(log_p)
    masked = process.predicted(x_t)[..., None]
    return torch.where(masked, log_p - odds, observed).scatter(-1, here, 0.0)


def log_probs_from_score(process: Process, log_s: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    r"""Return the log-probabilities of x0 (B, L, V) that belong to log-scores: the inverse of `log_score`.

    .. math:: p_j = s_j\Big/\sum_{k\ne m} s_k\ \text{(masked)},\qquad
        p_j = \frac{c\,s_j - 1}{\kappa},\quad c = \frac{V + \kappa}{\sum_k s_k}\ \text{(uniform)}

    Scores of a network need not come from any p. For masks their sum should be ``1 / (e^sigma - 1)``; p does not
    depend on it. In the uniform case ``c s_j < 1`` would be a negative probability; such tokens get none (-1e6) and
    the rest is normalised. Near t = 1, where kappa is small, p then magnifies errors of s by ``1 / kappa``.

    Args:
        process: Masked or uniform.
        log_s: Log-scores (B, L, V), 0 at the present token.
        x_t: Noisy ids (B, L).
        sigma: ``-log alpha_t``, (B,).

    Raises:
        TokenDriftError: If the shapes do not belong together.
    """
    _check_rows(process, "log_s", log_s, x_t, sigma)
    if process.mask_id is not None:
        return process.log_probs(log_s, x_t)
    log_s = wide(log_s)
    log_kappa = math.log(process.vocab_size) - _log_expm1(sigma, log_s)
    # log(V + kappa) = log V + log(1 + alpha / (1 - alpha)) = log V + softplus(log kappa - log V)
    log_total = math.log(process.vocab_size) + nn.functional.softplus(log_kappa - math.log(process.vocab_size))
    level = log_s - torch.logsumexp(log_s, dim=-1, keepdim=True) + log_total  # log(1 + kappa p_j)
    possible = level > 0
    level = torch.where(possible, level, 1.0)  # any positive number: its gradient must stay finite
    weight = torch.where(possible, level + torch.log(-torch.expm1(-level)), EXCLUDED)
    return torch.log_softmax(weight, dim=-1).clamp_min(EXCLUDED)


def score_entropy(process: Process, log_s: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    r"""Return the denoising score entropy per token, nats, (B, L).

    .. math:: \ell = \sigma'_t\,\sum_{j\ne i} Q_j\,\big(s_j - r_j\log s_j + r_j(\log r_j - 1)\big)

    with r the score of the known x0 and Q the rate of the process: 1 towards the mask (the sum then runs over masked
    positions alone), 1/V for uniform noise. Its mean bounds the negative log-likelihood as the NELBO does, and

    * uniform: if s comes from p by `log_score`, it *is* DUO's NELBO of p, term by term;
    * masked: with :math:`p = s/\sum s` and :math:`C = (e^\sigma-1)\sum_{j\ne m} s_j`, it is MDLM's NELBO of p plus
      :math:`\frac{-\alpha'}{1-\alpha}(C - 1 - \log C) \ge 0`, which is zero where s comes from p: there C = 1.

    (Insert :math:`s_j = C r p_j` with :math:`r = 1/(e^\sigma-1)` at x0 and 0 elsewhere, and use
    :math:`\sigma' r = -\alpha'/(1-\alpha)`.)

    Args:
        process: Masked or uniform; its schedule gives the weight.
        log_s: Log-scores (B, L, V), 0 at the present token.
        x0: Clean ids (B, L).
        x_t: Noisy ids (B, L).
        t: Times (B,) in (0, 1].

    Raises:
        TokenDriftError: If the shapes do not belong together or ids are out of range.

    Source: SEDD, section 3 (graph_lib.py ``score_entropy``).
    """
    check_objective(process.vocab_size, log_s, x0, x_t, t, name="log_s")
    log_s, t = wide(log_s), wide(t)[:, None]
    alpha, noise = process.schedule.alpha(t), process.schedule.noise(t)
    rate = (-process.schedule.dalpha(t) / alpha).to(log_s.dtype)
    odds = (alpha / noise).to(log_s.dtype)  # 1 / (e^sigma - 1)
    at_clean = log_s.gather(-1, x0.long()[..., None])[..., 0]
    others = log_s.scatter(-1, x_t.long()[..., None], -torch.inf).exp().sum(dim=-1)  # sum of s over j != i
    if process.mask_id is not None:
        entropy = others - odds * at_clean + odds * (odds.log() - 1)
        return torch.where(process.predicted(x_t), rate * entropy, 0.0)
    size = process.vocab_size
    kappa = size * odds
    total = log_s.sum(dim=-1)  # its term at the present token is 0
    kept = -total / (1 + kappa) - (size - 1) / (1 + kappa) * (torch.log1p(kappa) + 1)
    moved = -total - kappa * at_clean - (size - 2) + (1 + kappa) * (torch.log1p(kappa) - 1)
    return rate / size * (others + torch.where(x_t == x0, kept, moved))


def score_posterior(process: Process, log_s: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    r"""Return SEDD's analytic reverse step (Tweedie tau-leaping) as probabilities of x_s, dense (B, L, V).

    With :math:`\Delta = \sigma_t - \sigma_s` it is the score carried back to time s, times the probability of the
    transition from there to :math:`i = x_t`:

    * masked i: :math:`(e^\Delta - 1)s_j` for j, and :math:`1 - (e^\Delta - 1)\sum_{j\ne m} s_j` for the mask;
    * uniform: :math:`\big(e^\Delta s_j - \tfrac{e^\Delta - 1}{V}\sum_k s_k\big)\big(e^{-\Delta}[j=i] +
      \tfrac{1-e^{-\Delta}}{V}\big)`.

    Both sum to one for any s; entries below zero are raised to it and the rest normalised. ``s = 0`` is the final
    denoising: all of :math:`\sigma_t`, and no mass on the mask. Where s comes from p by `log_score`, this is
    `Process.posterior`, so that the samplers of denoisers draw the same law from `ScoreDenoiser`.

    Args:
        process: Masked or uniform.
        log_s: Log-scores (B, L, V), 0 at the present token.
        x_t: Noisy ids (B, L).
        t: Present times (B,).
        s: Next times (B,), below t.

    Raises:
        TokenDriftError: If the shapes do not belong together.

    Source: SEDD, section 4 (sampling.py ``AnalyticPredictor``, ``Denoiser``).
    """
    _check_rows(process, "log_s", log_s, x_t, t)
    score, here = wide(log_s).exp(), x_t.long()[..., None]
    last = (s == 0)[:, None, None]
    noise_s = torch.where(s == 0, 0.0, process.schedule.noise(s))
    growth = (process.schedule.noise(t) - noise_s) / process.schedule.alpha(t)  # e^Delta - 1 = alpha_s / alpha_t - 1
    growth = growth.to(score.dtype)[:, None, None]
    if process.mask_id is None:
        step = (growth / (1 + growth) / process.vocab_size).expand_as(score)
        law = (score * (1 + growth) - growth / process.vocab_size * score.sum(dim=-1, keepdim=True)) * step.scatter_add(
            -1, here, (1 / (1 + growth)).expand(here.shape)
        )
    else:
        moved = growth * score.scatter(-1, here, 0.0)
        remain = (1 - moved.sum(dim=-1, keepdim=True)).masked_fill(last, 0.0)
        observed = torch.zeros_like(score).scatter(-1, here, 1.0)
        law = torch.where(process.predicted(x_t)[..., None], moved.scatter(-1, here, remain), observed)
    law = law.clamp_min(0)
    return law / law.sum(dim=-1, keepdim=True)


class ScoreDenoiser(nn.Module):
    """A score network as a denoiser: raw logits of x0 out of concrete scores.

    Objectives, samplers and the drifting loss take it like any other; gradients reach the network. For masks the
    log-scores are logits already, whatever their offset; for uniform noise they pass through
    `log_probs_from_score`.

    Args:
        network: Maps noisy ids (B, L) and sigma (B,) to SEDD's output (B, L, V), before or after
            `network_log_score`.
        process: Masked or uniform.

    >>> from tokendrift.diffusion import UniformDiffusion
    >>> process, x_t = UniformDiffusion(4), torch.tensor([[2]])
    >>> unsure = ScoreDenoiser(lambda x_t, sigma: torch.zeros(1, 1, 4), process)
    >>> unsure(x_t, torch.tensor([0.5])).softmax(-1)
    tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
    """

    def __init__(self, network: Denoiser, process: Process) -> None:
        super().__init__()
        self.network, self.process = network, process

    @property
    def time_conditioned(self) -> bool:
        """Whether sigma matters; for uniform noise the map itself depends on it."""
        return self.process.mask_id is None or bool(getattr(self.network, "time_conditioned", True))

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Return logits of x0 (B, L, V) for noisy ids (B, L) and sigma (B,)."""
        output = self.network(x_t, sigma)
        if self.process.mask_id is not None:
            return output
        return log_probs_from_score(self.process, output.scatter(-1, x_t.long()[..., None], 0.0), x_t, sigma)


def _log_expm1(sigma: Tensor, like: Tensor) -> Tensor:
    """Return log(e^sigma - 1) = log((1 - alpha) / alpha), (B, 1, 1), without overflow."""
    level = sigma.to(torch.promote_types(sigma.dtype, like.dtype))
    return (level + torch.log(-torch.expm1(-level))).to(like.dtype)[:, None, None]


def _check_rows(process: Process, name: str, value: Tensor, x_t: Tensor, sigma: Tensor) -> None:
    check_columns(name, value, process.vocab_size)
    check_ids("x_t", x_t, process.vocab_size, like=value)
    if not isinstance(sigma, Tensor) or sigma.shape != value.shape[:1]:
        raise fail(
            "sigma (or t) must have shape (B,): one noise level for each row.",
            "Pass process.sigma(t) for times t (B,).",
            sigma=sigma,
            **{name: value},
        )
