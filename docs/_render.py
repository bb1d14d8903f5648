"""Rendering of formulas and doctests, at build time and without remote scripts.

Docstrings are written for ``help()`` and use the reStructuredText of mathematics; `Docstrings` rewrites that as
Markdown before mkdocstrings reads it. `on_page_content` turns every formula of a finished page into MathML, which
browsers draw themselves.
"""

from __future__ import annotations

import html
import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

DISPLAY = re.compile(r"^(?P<indent> *)\.\. math::(?P<body>.*\n(?:(?:(?P=indent) +.*)?\n)*)", re.MULTILINE)
DOCTEST = re.compile(r"^(?P<indent> *)>>> .*\n(?:(?P=indent)\S.*\n)*", re.MULTILINE)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


class Docstrings(griffe.Extension):
    """Rewrite ``.. math::``, ``:math:`` and doctests of every docstring as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring with its formulas in dollars and its doctests fenced."""
    text = DISPLAY.sub(_display, text + "\n")
    text = re.sub(r":math:`(.*?)`", lambda found: rf"\({found[1]}\)", text, flags=re.DOTALL)
    return DOCTEST.sub(_fence, text).rstrip("\n")


def _display(found: re.Match[str]) -> str:
    first, _, rest = found["body"].partition("\n")
    formulas = re.split(r"\n\s*\n", (first.strip() + "\n" + textwrap.dedent(rest)).strip())
    indent = found["indent"]
    blocks = [f"{indent}$$\n{textwrap.indent(formula.strip(), indent)}\n{indent}$$\n\n" for formula in formulas]
    return "\n" + "".join(blocks)


def _fence(found: re.Match[str]) -> str:
    indent = found["indent"]
    return f"\n{indent}```pycon\n{found[0]}{indent}```\n"


def on_page_content(content: str, **_: Any) -> str:
    """Replace what arithmatex marked by MathML; called by mkdocs for each page."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    block = found["tag"] == "div"
    mathml = convert(html.unescape(found["latex"]).strip(), display="block" if block else "inline")
    return f"<div>{mathml}</div>" if block else mathml
