"""Samplers by name, as commands and configuration files spell them."""

from __future__ import annotations

from tokendrift._checks import fail
from tokendrift.sampling.ancestral import Analytic, Ancestral
from tokendrift.sampling.chain import Sampler
from tokendrift.sampling.first_hitting import FirstHitting
from tokendrift.sampling.psi import Psi
from tokendrift.sampling.remdm import ReMDM, remdm_loop

NAMES = ("ancestral", "analytic", "first-hitting", "remdm-cap", "remdm-rescale", "remdm-conf", "remdm-loop", "psi:...")


def named_sampler(name: str, *, eta: float = 0.02) -> Sampler:
    """Return the sampler of a name.

    Args:
        name: ``ancestral``, ``analytic``, ``first-hitting``, ``remdm-cap``, ``remdm-rescale``, ``remdm-conf``,
            ``remdm-loop``, or ``psi:HIGH,MIDDLE,LOW`` with three modes of `Psi` and, after another comma, a profile.
        eta: Chance of remasking, of the ReMDM samplers.

    Raises:
        TokenDriftError: For any other name.

    >>> named_sampler("remdm-cap", eta=0.1)
    ReMDM(rule='cap', eta=0.1)
    """
    if name in ("ancestral", "analytic", "first-hitting"):
        return {"ancestral": Ancestral, "analytic": Analytic, "first-hitting": FirstHitting}[name]()
    if name == "remdm-loop":
        return remdm_loop(eta)
    if name in ("remdm-cap", "remdm-rescale", "remdm-conf"):
        return ReMDM(name.removeprefix("remdm-"), eta)
    modes = name.removeprefix("psi:").split(",")
    if name.startswith("psi:") and len(modes) in (3, 4):
        high, middle, low, profile = [*modes, "linear"][:4]
        return Psi(high, middle, low, profile=profile)
    raise fail(
        f"sampler must be one of {', '.join(NAMES)}.",
        "psi takes three modes: psi:pure-posterior,max-capped-0.02,pure-posterior",
        sampler=name,
    )
