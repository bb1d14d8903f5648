"""The schedule of soft inputs in DUO's training (arXiv 2506.10892)."""

from __future__ import annotations

from dataclasses import dataclass

from tokendrift._checks import check_count, check_positive
from tokendrift.diffusion.gaussian import GaussianUniformDiffusion
from tokendrift.diffusion.uniform import UniformDiffusion

HARD = 1e-10  # temperature at and after the last step: softmax(w / 1e-10) is the argmax


@dataclass(frozen=True)
class GaussianCurriculum:
    r"""The process to train with at each step: first with soft inputs, which become harder, then the process itself.

    The temperature keeps its first value until ``first_step`` and falls geometrically until ``last_step``, where it is
    1e-10. After ``last_step``, training continues with ``process``. The defaults are those of DUO's training.

    Attributes:
        process: The process of the end, and of validation and sampling.
        temperatures: :math:`\tau` at first_step and the one it falls towards.
        first_step: Where the temperature starts to fall.
        last_step: Last step with a soft input.
        gamma_min: Log noise-to-signal ratio at t = 0; see `GaussianDuality.between` for small vocabularies.
        gamma_max: The same at t = 1.
        top_k: See `GaussianUniformDiffusion`; None for the plain form.

    Raises:
        TokenDriftError: If a temperature is not above 0, last_step lies before first_step, gamma_max is not above
            gamma_min, or top_k not in [1, V).

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
    top_k: int | None = None

    def __post_init__(self) -> None:
        for temperature in self.temperatures:
            check_positive("temperatures", temperature)
        check_count("first_step", self.first_step)
        check_count("last_step", self.last_step, least=self.first_step)
        self._soft(HARD)  # its checks, before training

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
        return self._soft(self.temperature(step))

    def _soft(self, temperature: float) -> GaussianUniformDiffusion:
        return GaussianUniformDiffusion(
            self.process.vocab_size,
            temperature,
            gamma_min=self.gamma_min,
            gamma_max=self.gamma_max,
            top_k=self.top_k,
        )
