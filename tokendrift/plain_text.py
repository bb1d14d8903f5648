"""Text of unknown origin in a terminal, a page or a spreadsheet: no control characters, and no formulas."""

from __future__ import annotations

import re
from typing import Any

# All control characters except tab and line feed; those that change the direction of the text around them; surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA = re.compile(r"\s*[=+\-@]|[\t\r]")


def printable(text: str) -> str:
    r"""Return a text in which each control character is U+FFFD; tabs and line feeds stay.

    >>> printable("\x1b[2Jname\n")
    '�[2Jname\n'
    """
    return _CONTROL.sub("\ufffd", text)


def spreadsheet_cell(value: Any) -> Any:
    """Return a value for a CSV file; a text that a spreadsheet would take for a formula gets an apostrophe before it.

    >>> [spreadsheet_cell(value) for value in ("=1+1", "base", -0.5)]
    ["'=1+1", 'base', -0.5]
    """
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if _FORMULA.match(value) else value)
