r"""DUO's curriculum: uniform-state diffusion seen as the argmax of a Gaussian one (arXiv 2506.10892, section 4).

Noise a one-hot vector, :math:`w = \tilde\alpha\,x_0 + \tilde\sigma\,\epsilon` with
:math:`\tilde\alpha^2 = \mathrm{sigmoid}(-\gamma)` and :math:`\tilde\sigma^2 = \mathrm{sigmoid}(\gamma)`. Its largest
entry follows the uniform-state law exactly, at the signal level that `GaussianDuality` computes. A model may therefore
read the tempered softmax of w in place of its argmax and train against the same bound: the soft input leaks what the
hard one hides, which makes the gradient less noisy, and a falling temperature takes the leak away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendrift._checks import check_count, check_positive, fail
from tokendrift.diffusion.process import Corruption
from tokendrift.diffusion.schedules import Schedule
from tokendrift.diffusion.uniform import UniformDiffusion

HARD = 1e-10  # temperature at and after the last step: softmax(w / 1e-10) is the argmax
REACH, STEP = 10.0, 1 / 16  # the trapezoid rule: deviations left and right, and width


@dataclass(frozen=True)
class GaussianDuality(Schedule):
    r"""The uniform-state schedule of the argmax of a Gaussian diffusion whose :math:`\gamma` is linear in t.

    .. math:: \alpha_t = \frac{V P - 1}{V - 1},\qquad
        P = \int \varphi(z - e^{-\gamma_t/2})\,\Phi(z)^{V-1}\,dz,\qquad \gamma_t = \gamma_0 + t(\gamma_1 - \gamma_0)

    P is the chance that the clean token's entry is the largest. Both integrals, that of P and that of its derivative,
    are computed by the trapezoid rule in float64 (321 points; exact to rounding, since the integrands are analytic
    and decay like a Gaussian) instead of being read from a table.

    Used with `UniformDiffusion` directly, it trains on the same noise levels with hard inputs.

    Args:
        vocab_size: V.
        gamma_min: Log noise-to-signal ratio at t = 0.
        gamma_max: The same at t = 1, above gamma_min.

    Raises:
        TokenDriftError: If gamma_max is not above gamma_min.

    Source: DUO, equation 10 and appendix (algo.py ``_gamma_to_alphat_integral``).

    >>> GaussianDuality(50257).alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    tensor([0.9283, 0.0383], dtype=torch.float64)
    """

    vocab_size: int
    gamma_min: float = -3.5
    gamma_max: float = -1.75

    def __post_init__(self) -> None:
        check_count("vocab_size", self.vocab_size, least=2)
        if not -math.inf < self.gamma_min < self.gamma_max < math.inf:
            raise fail("gamma_max must lie above gamma_min.", gamma_min=self.gamma_min, gamma_max=self.gamma_max)

    def gamma(self, t: Tensor) -> Tensor:
        """Return the log noise-to-signal ratio of the Gaussian diffusion."""
        return self.gamma_min + t * (self.gamma_max - self.gamma_min)

    def alpha(self, t: Tensor) -> Tensor:
        largest, *_ = self._integrals(t)
        return ((self.vocab_size * largest - 1) / (self.vocab_size - 1)).to(t.dtype)

    def noise(self, t: Tensor) -> Tensor:
        _, not_largest, _ = self._integrals(t)
        return (self.vocab_size / (self.vocab_size - 1) * not_largest).to(t.dtype)

    def dalpha(self, t: Tensor) -> Tensor:
        *_, slope = self._integrals(t)  # dP/dm with m = exp(-gamma/2), so dm/dt = -m/2 dgamma/dt
        rate = -torch.exp(-self.gamma(t.double()) / 2) / 2 * (self.gamma_max - self.gamma_min)
        return (self.vocab_size / (self.vocab_size - 1) * slope * rate).to(t.dtype)

    def _integrals(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return P, 1 - P and dP/dm in float64, m the mean of the clean token's entry in units of the noise."""
        offset = torch.arange(-REACH, REACH + STEP, STEP, dtype=torch.float64, device=t.device)
        mean = torch.exp(-self.gamma(t.double()) / 2)[..., None]
        density = torch.exp(-(offset**2) / 2) * (STEP / math.sqrt(2 * math.pi))
        log_largest = (self.vocab_size - 1) * torch.special.log_ndtr(mean + offset)
        largest, other = density * torch.exp(log_largest), -density * torch.expm1(log_largest)
        # The offset has mean 0, so that either form gives the slope; the smaller integrand keeps its digits.
        slope = torch.where(largest.sum(-1) < 0.5, (offset * largest).sum(-1), -(offset * other).sum(-1))
        return largest.sum(-1), other.sum(-1), slope


class GaussianUniformDiffusion(UniformDiffusion):
    r"""Uniform-state diffusion whose corruption also gives the tempered softmax of the Gaussian behind x_t.

    `corrupt` returns :math:`x_t = \arg\max w` and, as ``soft``, :math:`w/\tau`; `Corruption.denoise` hands the
    latter to the denoiser, which embeds its softmax. Objective and posterior are those of the hard x_t.

    Args:
        vocab_size: V.
        temperature: :math:`\tau` of the softmax.
        gamma_min: Log noise-to-signal ratio at t = 0.
        gamma_max: The same at t = 1.

    Raises:
        TokenDriftError: If the temperature is not above 0 or gamma_max not above gamma_min.

    Source: DUO, section 4.2 (algo.py ``DUO.nll``). The noise is a tensor (B, L, V), as there.
    """

    def __init__(
        self, vocab_size: int, temperature: float, *, gamma_min: float = -3.5, gamma_max: float = -1.75
    ) -> None:
        super().__init__(vocab_size, GaussianDuality(vocab_size, gamma_min, gamma_max))
        self.temperature = check_positive("temperature", temperature)

    def _corrupted(self, x0: Tensor, t: Tensor, generator: torch.Generator | None) -> Corruption:
        gamma = self.schedule.gamma(t)[:, None, None]  # type: ignore[attr-defined]
        shape = (*x0.shape, self.vocab_size)
        w = torch.randn(shape, generator=generator, device=x0.device).mul_(gamma.sigmoid().sqrt())
        w.scatter_add_(-1, x0[..., None], (-gamma).sigmoid().sqrt().to(w.dtype).expand(*x0.shape, 1))
        x_t = w.argmax(dim=-1)
        return Corruption(x_t, self.predicted(x_t), t, self.sigma(t), w.div_(self.temperature))


@dataclass(frozen=True)
class GaussianCurriculum:
    r"""Which process to train with at which step: soft inputs that harden, then the hard process itself.

    The temperature stays at its first value until ``first_step``, falls geometrically until ``last_step``, and is
    1e-10 from there on; after ``last_step`` training goes on with ``process``. Defaults are those of DUO's training.

    Attributes:
        process: The process of the end, and of validation and sampling.
        temperatures: :math:`\tau` at first_step and the one it falls towards.
        first_step: Where the temperature starts to fall.
        last_step: Last step with a soft input.
        gamma_min: Log noise-to-signal ratio at t = 0.
        gamma_max: The same at t = 1.

    Raises:
        TokenDriftError: If a temperature is not above 0, or last_step lies before first_step.

    Source: DUO, algo.py ``_compute_gumbel_tau_inverse``.

    >>> curriculum = GaussianCurriculum(UniformDiffusion(50258), first_step=0, last_step=100)
    >>> [round(curriculum.temperature(step), 4) for step in (0, 50, 99)]
    [0.1, 0.0316, 0.0102]
    >>> curriculum.at(101) is curriculum.process
    True
    """

    process: UniformDiffusion
    temperatures: tuple[float, float] = (0.1, 0.01)
    first_step: int = 100_000
    last_step: int = 200_000
    gamma_min: float = -3.5
    gamma_max: float = -1.75

    def __post_init__(self) -> None:
        for temperature in self.temperatures:
            check_positive("temperatures", temperature)
        check_count("first_step", self.first_step)
        check_count("last_step", self.last_step, least=self.first_step)
        GaussianDuality(self.process.vocab_size, self.gamma_min, self.gamma_max)  # its own checks, before training

    def temperature(self, step: int) -> float:
        """Return the temperature of the softmax at a step."""
        if step >= self.last_step:
            return HARD
        first, last = self.temperatures
        if step <= self.first_step:
            return first
        share = (step - self.first_step) / (self.last_step - self.first_step)
        return float(first * (last / first) ** share)

    def at(self, step: int) -> UniformDiffusion:
        """Return the process to train with at a step (counted from 0)."""
        if step > self.last_step:
            return self.process
        return GaussianUniformDiffusion(
            self.process.vocab_size, self.temperature(step), gamma_min=self.gamma_min, gamma_max=self.gamma_max
        )
