"""Kernels that shorten differences as well as weigh them, so that the drift has a potential."""

from __future__ import annotations

from torch import Tensor


class SharpLaplace:
    r"""The conservative kernel that moves points like the Laplace one.

    .. math::
        H = (1 + d/\tau)\, e^{-d/\tau}, \qquad \nabla_x H = e^{-d/\tau} (y - x) / \tau^2

    so the separate drift :math:`E_p[e^{-d/\tau}(y-x)]/E_p[H] - E_q[\dots]/E_q[H]` is :math:`\tau^2 \nabla_x \log` of
    the ratio of the two densities smoothed by H. With plain Laplace weights the drift has no potential.

    For a sharp kernel of your own, give a kernel a method ``pull``: the factor on every difference :math:`y - x`. If
    :math:`\nabla_x H \propto \mathrm{pull} \cdot H \cdot (y - x)`, the drift is the gradient of a log-ratio of
    densities smoothed by H. A kernel without ``pull`` has a pull of one; of those only the Gaussian is conservative.

    Source: arXiv 2604.06333, whose field is this one divided by tau squared.
    """

    def __call__(self, squared: Tensor, temperature: float) -> Tensor:
        """Return log H for squared distances of any shape."""
        ratio = squared.sqrt() / temperature
        return ratio.log1p() - ratio

    def pull(self, squared: Tensor, temperature: float) -> Tensor:
        """Return exp(-d / tau) / H for squared distances of any shape."""
        return 1 / (1 + squared.sqrt() / temperature)
