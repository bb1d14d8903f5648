"""Options of a command that are the fields of a configuration: names, types, defaults and descriptions in one place."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

Command = TypeVar("Command", bound=Callable[..., None])


def descriptions(config: type) -> dict[str, str]:
    """Return the description of each attribute, as the section ``Attributes:`` of the docstring has it.

    >>> from tokendrift.sampling.to_file import SampleConfig
    >>> descriptions(SampleConfig)["n"]
    'Number of samples. Default: 64.'
    """
    section = inspect.getdoc(config).partition("Attributes:\n")[2].partition("\n\n")[0]  # type: ignore[union-attr]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section, flags=re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}


def options_of(config: type, **settings: Mapping[str, Any]) -> Callable[[Command], Command]:
    """Give a command an option for each field of a configuration, in place of its ``**options``.

    A field without a default becomes an argument, and a tuple becomes an option that can be repeated. A parameter that
    the command has itself replaces the field of that name. The help text of an option is the description of the
    attribute in the docstring, which states the default where there is one.

    Args:
        config: A dataclass whose docstring has a section ``Attributes:``.
        **settings: By the name of a field: what is passed to ``typer.Option`` beyond the help, such as
            ``{"names": ("-n",), "min": 1}``, or another help text.
    """

    def decorate(command: Command) -> Command:
        help_texts, types = descriptions(config), get_type_hints(config)
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = []
        for field in dataclasses.fields(config):
            if any(field.name == each.name for each in own):
                continue
            extra = {"help": help_texts[field.name], "show_default": False, **settings.get(field.name, {})}
            required = field.default is dataclasses.MISSING
            kind: Any = typer.Argument if required else typer.Option
            about = kind(*extra.pop("names", ()), **extra)
            default: Any = inspect.Parameter.empty if required else field.default
            annotation = types[field.name]
            if get_origin(annotation) is tuple:
                annotation, default = list[get_args(annotation)[0]], list(default)  # type: ignore[misc]
            parameters.append(own[0].replace(name=field.name, default=default, annotation=Annotated[annotation, about]))
        # Parameters without a default come first, as Python asks.
        whole = sorted([*parameters, *own], key=lambda p: p.default is not p.empty)
        command.__signature__ = inspect.Signature(whole)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in whole}
        return command

    return decorate
