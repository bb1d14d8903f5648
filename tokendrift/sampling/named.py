"""The table of samplers by name, as commands and configuration files spell them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from tokendrift._checks import fail, nearest
from tokendrift.sampling.ancestral import Analytic, Ancestral
from tokendrift.sampling.chain import Sampler
from tokendrift.sampling.first_hitting import FirstHitting
from tokendrift.sampling.psi import Psi
from tokendrift.sampling.remdm import ReMDM, remdm_loop

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": lambda eta: Ancestral(),
    "analytic": lambda eta: Analytic(),
    "first-hitting": lambda eta: FirstHitting(),
    "remdm-cap": lambda eta: ReMDM("cap", eta),
    "remdm-rescale": lambda eta: ReMDM("rescale", eta),
    "remdm-conf": lambda eta: ReMDM("conf", eta),
    "remdm-loop": remdm_loop,
    "psi": lambda eta, high, middle, low, profile="linear": Psi(high, middle, low, profile=profile),
}
"""Samplers by name; add your own with ``SAMPLERS["mine"] = lambda eta: MySampler()``.

Each entry is a function that returns a `Sampler`. Its first argument is eta, the chance of remasking. Further arguments
come from the name, as strings: ``psi:A,B,C`` calls the entry ``psi`` with eta, ``"A"``, ``"B"`` and ``"C"``.
"""


def sampler_names() -> list[str]:
    """Return how each sampler of the table is spelled, with its required arguments in capitals.

    >>> sampler_names()[-1]
    'psi:HIGH,MIDDLE,LOW'
    """
    spelled = []
    for name, build in SAMPLERS.items():
        _, *others = inspect.signature(build).parameters.values()
        arguments = [one.name.upper() for one in others if one.default is one.empty]
        spelled.append(f"{name}:{','.join(arguments)}" if arguments else name)
    return spelled


def named_sampler(name: str, *, eta: float = 0.02) -> Sampler:
    """Return the sampler of a name.

    Args:
        name: A name in `SAMPLERS`, such as ``"ancestral"`` or ``"remdm-cap"``. Arguments follow after a colon, with
            commas between them: ``"psi:pure-pc,constant-0.5,pure-posterior"`` gives three modes of `Psi`; a fourth
            argument is its profile.
        eta: Chance of remasking of the ReMDM samplers. Default: 0.02.

    Raises:
        TokenDriftError: If the table has no such name, or the number of arguments is wrong.

    >>> named_sampler("remdm-cap", eta=0.1)
    ReMDM(rule='cap', eta=0.1)
    """
    key, colon, rest = name.partition(":")
    arguments = [eta, *(rest.split(",") if colon else [])]
    build = SAMPLERS.get(key)
    try:
        if build is None:
            raise TypeError
        inspect.signature(build).bind(*arguments)
    except TypeError:
        raise fail(
            f"sampler must be one of {', '.join(sampler_names())}.",
            ("" if build else nearest(key, SAMPLERS))
            or "Arguments of a sampler follow its name, for example psi:pure-posterior,max-capped-0.02,pure-posterior",
            sampler=name,
        ) from None
    return build(*arguments)
