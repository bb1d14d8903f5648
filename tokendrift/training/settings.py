"""Where a configuration comes from: flags, a TOML file, and presets."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokendrift._checks import check_choice, fail
from tokendrift.training.config import KINDS, WORDS, RefineConfig, known

# What the paper states (section 4 and appendix F): batch, steps, rate, queues, temperatures, alpha, no base loss,
# micro-batches of 2. Which backbone had which of its two rates it does not say. Warm-up, clipping, averaging and
# precision are those that the backbones were trained with (mdlm and duo, configs/config.yaml).
_PAPER = {
    "dataset": "Skylion007/openwebtext",
    "objective": "drift",
    "steps": 13_000,
    "batch_size": 512,
    "micro_batch": 2,
    "queue_size": 1024,
    "temperatures": (0.02, 0.05, 0.2),
    "drift_scale": 1.0,
    "schedule": "constant",
    "warmup": 2500,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "clip": 1.0,
    "ema": 0.9999,
    "precision": "bf16",
    "judge": "gpt2-large",
    "evaluate_every": 1000,
}
# Ours, for either backbone: it names no checkpoint and no text, and its rate is twice that of a refinement without it.
_PAIRS = {
    "objective": "pairs",
    "chains": (2, 4),
    "base_weight": 0.1,
    "pair_decay": 0.95,
    "learning_rate": 2 * RefineConfig.learning_rate,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mdlm-owt": {"checkpoint": "kuleshov-group/mdlm-owt", "learning_rate": 3e-5, **_PAPER},
    "duo-owt": {"checkpoint": "s-sahoo/duo", "learning_rate": 5e-5, **_PAPER},
    "pairs": _PAIRS,
}


def make_config(
    *, preset: str | None = None, file: str | Path | None = None, values: Mapping[str, Any] | None = None
) -> RefineConfig:
    """Build a configuration from a preset, a TOML file over it, and single values over both.

    A file may name its preset itself: ``preset = "mdlm-owt"``. A source of text replaces the preset's.

    Raises:
        TokenDriftError: For an unknown key (the nearest one is named), a value of the wrong type or out of range, a
            file that is no TOML, or no checkpoint.

    >>> make_config(preset="duo-owt", values={"steps": 100}).learning_rate
    5e-05
    >>> make_config(values={"checkpoint": "base", "learning_rat": 1e-4})
    Traceback (most recent call last):
    tokendrift.errors.TokenDriftError: unknown key 'learning_rat'; the nearest is 'learning_rate'.
    """
    stated = {} if file is None else read_toml(Path(file))
    preset = preset if preset is not None else stated.get("preset")
    stated = {name: value for name, value in stated.items() if name != "preset"}
    if preset is not None:
        check_choice("preset", preset, tuple(PRESETS))
    chosen: dict[str, Any] = dict(PRESETS[preset]) if preset is not None else {}
    for layer in (stated, dict(values or {})):
        if layer.get("text"):
            chosen.pop("dataset", None)
        if layer.get("dataset"):
            chosen.pop("text", None)
        chosen |= known(layer)
    if "checkpoint" not in chosen:
        raise fail("no checkpoint to refine.", "Name one, in the command, the TOML file or by a preset.")
    return RefineConfig(**chosen)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail(f"{path} cannot be read as TOML: {error}.", "Texts stand in quotes, lists in brackets.") from None


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Return the values of settings written ``KEY=VALUE``; see `parse_value`.

    >>> parse_settings(["wrap=false", "evaluate_nfe=4,16"])
    {'wrap': False, 'evaluate_nfe': (4, 16)}
    """
    pairs = [setting.partition("=") for setting in settings]
    for name, sign, _ in pairs:
        if not sign:
            raise fail(f"a setting must have the form KEY=VALUE, and {name!r} has not.")
    return {name.strip(): parse_value(name.strip(), text.strip()) for name, _, text in pairs}


def parse_value(name: str, text: str) -> Any:
    """Return the value of a key given as text, as on a command line; lists are separated by commas.

    >>> parse_value("temperatures", "0.1,0.5"), parse_value("wrap", "false"), parse_value("window", "none")
    ((0.1, 0.5), False, None)
    """
    known({name: text})
    kind = KINDS[name]
    if kind.optional and text.lower() == "none":
        return None
    if kind.many:
        return tuple(_parsed(name, part.strip(), kind.base) for part in text.split(",") if part.strip())
    return _parsed(name, text, kind.base)


def _parsed(name: str, text: str, base: type) -> Any:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return words[text.lower()] if base is bool else base(text)
    except (KeyError, ValueError):
        raise fail(f"{name} must be {WORDS[base]}.", **{name: text}) from None
