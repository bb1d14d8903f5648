"""Dataclasses of settings: their types, values given as text, TOML, and help texts."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from tokendrift._checks import TYPES, check_choice, fail

TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class SettingType(typing.NamedTuple):
    """Type of a setting.

    Attributes:
        base: ``str``, ``int``, ``float`` or ``bool``.
        optional: Whether None is allowed.
        many: Whether the value is a tuple of the base type.
        choices: The texts that are allowed; empty if any is.
    """

    base: type
    optional: bool = False
    many: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """Base of dataclasses of settings: every value is converted to the type of its field, or refused.

    Fields may be annotated with ``str``, ``int``, ``float``, ``bool``, a ``Literal`` of texts, one of these or None, or
    a tuple of one of these. Fields of other types are left as they are.
    """

    def __post_init__(self) -> None:
        for name, kind in setting_types(type(self)).items():
            object.__setattr__(self, name, converted(name, getattr(self, name), kind))


def setting_types(settings: type[Settings]) -> dict[str, SettingType]:
    """Return the type of each setting of a dataclass, in the order of its fields."""
    hints = typing.get_type_hints(settings)
    found = {field.name: _setting_type(hints[field.name]) for field in dataclasses.fields(settings)}
    return {name: kind for name, kind in found.items() if kind.base in TYPES}


def _setting_type(annotation: Any) -> SettingType:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _setting_type(next(each for each in arguments if each is not type(None)))._replace(optional=True)
    if origin is tuple:
        return SettingType(arguments[0], many=True)
    if origin is Literal:
        return SettingType(str, choices=arguments)
    return SettingType(annotation)


def converted(name: str, value: Any, kind: SettingType) -> Any:
    """Return a value in the type of its setting.

    Raises:
        TokenDriftError: If the value has another type, or is none of the choices.
    """
    if value is None and kind.optional:
        return None
    if kind.many:
        if not isinstance(value, (list, tuple)):
            raise fail(f"{name} must be a list in which each entry is {TYPES[kind.base]}.", **{name: value})
        return tuple(converted(name, each, kind._replace(many=False)) for each in value)
    if kind.choices:
        check_choice(name, value, kind.choices)
    if kind.base is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    fits = isinstance(value, (int, float) if kind.base is float else kind.base)
    if not fits or (isinstance(value, bool) and kind.base is not bool):
        raise fail(f"{name} must be {TYPES[kind.base]}.", **{name: value})
    try:
        return float(value) if kind.base is float else value
    except OverflowError:
        raise fail(f"{name} is too large.", **{name: value}) from None


def from_text(name: str, text: str, kind: SettingType) -> Any:
    """Return the value of a setting given as text, as on a command line; lists are separated by commas.

    >>> from_text("temperatures", "0.1,0.5", SettingType(float, many=True))
    (0.1, 0.5)
    >>> from_text("window", "none", SettingType(int, optional=True))
    """
    if kind.optional and text.lower() == "none":
        return None
    if kind.many:
        one = kind._replace(many=False)
        return tuple(from_text(name, part.strip(), one) for part in text.split(",") if part.strip())
    try:
        return TRUTH[text.lower()] if kind.base is bool else kind.base(text)
    except (KeyError, ValueError):
        raise fail(f"{name} must be {TYPES[kind.base]}.", **{name: text}) from None


def to_toml(value: Any) -> str:
    """Return a value as it is written in a TOML file."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, (str, bool)):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML allows no more than others
    return repr(value)


def describe_setting(settings: type[Settings], name: str) -> str:
    """Return what the docstring of a dataclass says of one of its settings, with the default value.

    >>> from tokendrift.training import LoopConfig, RefineConfig
    >>> describe_setting(RefineConfig, "steps")
    'Number of optimiser steps. Default: 1000.'
    """
    entry = re.search(rf"^ {{4}}{name}: (.*(?:\n {{8}}.*)*)", inspect.getdoc(settings) or "", re.MULTILINE)
    text = " ".join(entry[1].replace("`", "").split()) if entry else ""
    field = next(each for each in dataclasses.fields(settings) if each.name == name)
    plain = field.default not in (dataclasses.MISSING, None, ())
    return f"{text} Default: {to_toml(field.default)}." if plain else text
