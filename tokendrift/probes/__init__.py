r"""Structure probes: what a denoiser predicts far from its context, and what is lost when tokens are drawn in parallel.

Both append k positions of noise to clean prompts: masks, or uniformly random tokens. The denoiser is called with
the noise level of exactly that input, k noisy positions out of L: the time at which
:math:`1 - \alpha_t = k / L`. (At t = 1 a time-conditioned denoiser would rightly ignore the prompt as well.)
A masked denoiser predicts :math:`p(x_0^i \mid \text{what is not masked})`. A uniform-state denoiser at the optimum of
its bound predicts :math:`p(x_0^i \mid x_t^{j},\ j \ne i)`: it does not depend on the noise token at i, so that the
two can be compared. The influence of the other noise tokens is averaged over several draws of the noise.

Source: the two analyses of "On the Role of Discreteness in Diffusion LLMs" (arXiv 2512.22630), which shows predictions
turn into frequent words with distance, and defines the marginal trap.
"""

from tokendrift.probes.information_decay import (
    InformationDecay,
    Share,
    decay_table,
    heat_map,
    information_decay,
    plot_decay,
    unigram_law,
)
from tokendrift.probes.marginal_trap import (
    MarginalTrap,
    marginal_trap,
    matched_temperature,
    plot_trap,
    trap_change,
    trap_table,
)
from tokendrift.probes.probe import ProbeReport, probe_checkpoints

__all__ = [
    "InformationDecay",
    "MarginalTrap",
    "ProbeReport",
    "Share",
    "decay_table",
    "heat_map",
    "information_decay",
    "marginal_trap",
    "matched_temperature",
    "plot_decay",
    "plot_trap",
    "probe_checkpoints",
    "trap_change",
    "trap_table",
    "unigram_law",
]
