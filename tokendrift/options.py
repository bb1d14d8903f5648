"""Options of a command from a configuration or a function: names, types, defaults and descriptions in one place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

Command = TypeVar("Command", bound=Callable[..., None])


def descriptions(described: Callable[..., Any]) -> dict[str, str]:
    """Return what a docstring says of each attribute or argument, in its section ``Attributes:`` or ``Args:``.

    >>> from tokendrift.sampling.to_file import SampleConfig
    >>> descriptions(SampleConfig)["n"]
    'Number of samples. Default: 64.'
    """
    _, _, rest = re.split(r"^(Attributes|Args):\n", inspect.getdoc(described) or "", maxsplit=1, flags=re.MULTILINE)
    section = rest.partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section, flags=re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}


def options_of(
    source: Callable[..., Any], *, omit: Collection[str] = (), **settings: Mapping[str, Any]
) -> Callable[[Command], Command]:
    """Give a command an option for each field of a configuration, or argument of a function, for its ``**options``.

    A field without a default becomes an argument, and a tuple becomes an option that can be repeated. Of several types
    of a field, the option has text if that is one of them. A parameter that the command has itself replaces the field
    of that name. The help text of an option is the description in the docstring, which states the default where there
    is one.

    Args:
        source: A dataclass whose docstring has a section ``Attributes:``, or a function whose docstring has a section
            ``Args:``.
        omit: Names of fields that do not become options. Default: none.
        **settings: By the name of a field: what is passed to ``typer.Option`` beyond the help, such as
            ``{"names": ("-n",), "min": 1}``, another help text, or another type as ``{"type": str}``.
    """

    def decorate(command: Command) -> Command:
        help_texts, types = descriptions(source), get_type_hints(source)
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = []
        for name, field in inspect.signature(source).parameters.items():
            if name in omit or any(name == each.name for each in own):
                continue
            extra = {"help": help_texts[name], "show_default": False, "type": types[name], **settings.get(name, {})}
            annotation, default = extra.pop("type"), field.default
            kind: Any = typer.Argument if default is field.empty else typer.Option
            flags = (f"--{name.replace('_', '-')}",) if annotation is bool else ()  # without one that says no
            about = kind(*extra.pop("names", flags), **extra)
            if get_origin(annotation) is tuple:
                annotation, default = list[get_args(annotation)[0]], list(default)  # type: ignore[misc]
            elif str in get_args(annotation):
                annotation = str | None if default is None else str
            parameters.append(own[0].replace(name=name, default=default, annotation=Annotated[annotation, about]))
        # Parameters without a default come first, as Python asks.
        whole = sorted([*parameters, *own], key=lambda p: p.default is not p.empty)
        command.__signature__ = inspect.Signature(whole)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in whole}
        return command

    return decorate
