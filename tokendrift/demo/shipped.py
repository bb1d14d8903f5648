"""The small models that ship with the package."""

from __future__ import annotations

from pathlib import Path

from tokendrift._checks import check_choice

PRETRAINED = Path(__file__).parent / "pretrained"


def pretrained_path(name: str) -> Path:
    """Return the path of a model or of the tokenizer that ships with the package.

    Every model folder holds a copy of the tokenizer, so that the commands work on it as it is.

    Args:
        name: ``"masked"`` or ``"uniform"`` for a denoiser, ``"judge"`` for the causal language model that scores
            samples, ``"tokenizer.json"`` for the tokenizer that they share.

    Raises:
        TokenDriftError: If the package has nothing of that name.

    >>> pretrained_path("masked").name
    'masked'
    """
    check_choice("name", name, tuple(sorted(path.name for path in PRETRAINED.iterdir())))
    return PRETRAINED / name
