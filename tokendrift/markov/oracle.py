"""The optimal denoiser of the language: the errors of its samples are caused by few steps alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tokendrift._checks import check_ids, fail
from tokendrift.diffusion import Process
from tokendrift.markov.language import MarkovLanguage

SPARE = 1e-12  # share of each transition spread over all words, so that impossible contexts have an answer, too


class ExactDenoiser:
    r"""The optimum of the process's own bound, computed by passing messages along the chain.

    The logits of position i are :math:`\log p(x_0^i \mid x_t^{j},\ j \ne i)`: with evidence
    :math:`e_j(v) = q(x_t^j \mid x_0^j = v)`,

    .. math::
        p_i(v) \propto f_i(v)\, b_i(v), \qquad f_1 = \pi,\quad f_{i+1} = (f_i e_i) P, \qquad
        b_L = 1,\quad b_{i-1} = P (b_i e_i)

    (f a row, b a column). Masked: :math:`e_j` is 1 at a mask and an indicator elsewhere. Uniform-state:
    :math:`e_j(v) = \alpha [v = x_t^j] + (1-\alpha)/V`; to leave out :math:`x_t^i` itself is what DUO's bound asks for.
    The bound of this denoiser is the entropy of the language.

    Args:
        language: The language.
        process: Uniform over its words, or masked with the mask behind them.

    Raises:
        TokenDriftError: If the process has another vocabulary.

    Source: sampling with an exact oracle in place of a network, after arXiv 2602.19619.

    >>> language = MarkovLanguage(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), length=3)
    >>> denoiser = ExactDenoiser(language, language.process("masked"))
    >>> denoiser(torch.tensor([[2, 0, 2]]), torch.ones(1)).argmax(dim=-1)[0, 0]  # 2 is the mask; 1 stands before 0
    tensor(1)
    """

    time_conditioned = True

    def __init__(self, language: MarkovLanguage, process: Process) -> None:
        self.language, self.process = language, process
        words, mask = language.words, process.mask_id
        if process.vocab_size != words + (mask is not None) or mask not in (None, words):
            raise fail(
                f"process must be uniform over V = {words} words, or masked with mask_id = {words} behind them.",
                "Use language.process('uniform') or language.process('masked').",
                process=process,
            )
        self._steps = (1 - SPARE) * language.transitions + SPARE / words

    def __call__(self, x_t: Tensor, sigma: Tensor | None) -> Tensor:
        """Return logits, float32 (B, L, V), -inf at the mask; the noise level sigma (B,) matters without masks."""
        ids = check_ids("x_t", x_t, self.process.vocab_size).long()
        evidence = self._evidence(ids, sigma)
        forward = torch.empty_like(evidence)
        backward = torch.ones_like(evidence)
        steps = self._steps.to(ids.device)
        forward[:, 0] = self.language.stationary.to(ids.device)
        for i in range(1, ids.shape[1]):
            forward[:, i] = _normalised((forward[:, i - 1] * evidence[:, i - 1]) @ steps)
            backward[:, -1 - i] = _normalised((backward[:, -i] * evidence[:, -i]) @ steps.T)
        log_p = _normalised(forward * backward).log().float()
        if self.process.mask_id is None:
            return log_p
        return torch.nn.functional.pad(log_p, (0, 1), value=-torch.inf)

    def _evidence(self, ids: Tensor, sigma: Tensor | None) -> Tensor:
        """Return q(x_t | x_0 = v) at every position for every word, float64 (B, L, V)."""
        words = self.language.words
        if self.process.mask_id is not None:
            seen = torch.nn.functional.one_hot(ids, words + 1)[..., :words].double()
            return torch.where((ids == words)[..., None], 1.0, seen)
        if sigma is None or sigma.shape != ids.shape[:1]:
            raise fail("sigma must have shape (B,): one noise level -log(alpha_t) for each row.", sigma=sigma, x_t=ids)
        alpha = torch.exp(-sigma.to(ids.device).double())[:, None, None]
        return alpha * torch.nn.functional.one_hot(ids, words) + (1 - alpha) / words


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)
