"""Documents from text files and JSON, gzipped or not: streamed from any position, or all at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from tokendrift._checks import fail
from tokendrift.files import check_text_kind, file_kind, open_bytes, read_text, readable

PIECE = 1 << 16  # bytes of a long document that are tokenised at a time
LONG = 4 * PIECE  # bytes of a line beyond which it is read in several parts
HEAD = 1 << 20  # bytes of a file by which it is recognised
JSON_KINDS = (".jsonl", ".ndjson", ".json")
COMPLETE = "Pass a file that exists and is complete."
SAMPLES = "generated_seqs"  # where the code of MDLM, DUO and ReMDM writes the texts that it has generated
HEADER = "tokendrift"  # field of the first line of a file that `tokendrift sample` has written

Place = dict[str, int]


class Piece(NamedTuple):
    """A document, or the next part of a long one.

    Attributes:
        text: The text; blank only where it ends a document whose earlier parts were not.
        ends: Whether the document ends with this piece.
        start: Position from which reading returns this piece first.
    """

    text: str
    ends: bool
    start: Place


class Documents(Protocol):
    """A source of text that always gives the same pieces in the same order."""

    def read(self, start: Place | None = None) -> Iterator[Piece]:
        """Yield the pieces from a position (default: the beginning) to the end of the source."""
        ...


class TextFiles:
    """Documents of text files and of JSON, file after file.

    Blank documents are left out, a byte order mark at the start of a file is dropped, and every line ends with a line
    feed. Long documents come in pieces, so that a file of any size, with or without line breaks, takes little memory.

    Args:
        paths: Files. ``.jsonl``, ``.ndjson`` and ``.json`` contain one JSON object or text on each line, or one JSON
            list, or one object with a list of texts, as `json_list` reads it. All other files are UTF-8 text. Files
            whose names end with ``.gz`` are decompressed. Case does not matter.
        documents: Unit of a text file that is one document: the ``"file"``, a ``"paragraph"`` (separated by blank
            lines) or a ``"line"``.
        field: Field of the JSON objects that holds the text.

    Raises:
        TokenDriftError: If a file is missing, or of a kind that is no text (``.parquet``, ``.csv``, ``.zst`` and
            others); while reading, if it is not UTF-8, or a line is not such an object.
    """

    def __init__(self, paths: Sequence[str | Path], *, documents: str = "file", field: str = "text") -> None:
        self.paths = [Path(path) for path in paths]
        self.documents, self.field = documents, field
        if others := [str(path) for path in self.paths if path.exists() and not path.is_file()]:
            raise fail(
                f"text must name files, and these are folders or pipes: {', '.join(others)}.",
                "Pass the files of a folder, and write what comes through a pipe to a file: text is read repeatedly.",
            )
        missing = [str(path) for path in self.paths if not path.is_file()]
        if missing or not self.paths:
            raise fail(
                f"these text files do not exist: {', '.join(missing) or 'none were given'}.", "Pass text or JSON lines."
            )
        for path in self.paths:
            check_text_kind(path, "text")

    def identity(self) -> list[list[Any]]:
        """Return the size and the SHA-256 of the first MiB of each file, which change if a file is edited or grows."""
        found = []
        for path in self.paths:
            with readable(path, COMPLETE, what="text"), path.open("rb") as file:
                found.append([str(path), path.stat().st_size, hashlib.sha256(file.read(HEAD)).hexdigest()])
        return found

    def read(self, start: Place | None = None) -> Iterator[Piece]:
        """Yield the pieces from a position to the end of the files."""
        start = start or {"file": 0, "byte": 0, "line": 0}
        for number in range(start["file"], len(self.paths)):
            place = start if number == start["file"] else {"file": number, "byte": 0, "line": 0}
            if file_kind(self.paths[number]) in JSON_KINDS:
                yield from self._entries(number, place)
            else:
                yield from _pieces(self._lines(number, place, LONG), self.documents)

    def _lines(self, number: int, place: Place, limit: int) -> Iterator[_TextLine]:
        """Yield the lines from a position, those of more bytes than the limit (-1: no limit) in several parts."""
        path, at, rest = self.paths[number], dict(place), b""
        with readable(path, COMPLETE, what="text"), open_bytes(path) as file:
            file.seek(place["byte"])
            while raw := rest + file.readline(limit - len(rest)):
                whole = raw.endswith(b"\n") or len(raw) != limit
                raw, rest = (raw, b"") if whole else _cut(raw)
                try:
                    text = raw.decode("utf-8" if at["byte"] else "utf-8-sig")
                except UnicodeDecodeError as error:
                    raise fail(f"{path}, line {at['line'] + 1} is not UTF-8: {error}.", "Convert the file.") from None
                yield _TextLine(text.replace("\r\n", "\n").replace("\r", "\n"), at, whole)
                at = {"file": number, "byte": at["byte"] + len(raw), "line": at["line"] + whole}

    def _entries(self, number: int, place: Place) -> Iterator[Piece]:
        """Yield the texts of a JSON file: its lines, or the entries of its list."""
        path = self.paths[number]
        with readable(path, COMPLETE, what="text"), open_bytes(path) as file:
            listed = json_list(file, path, self.field)
        found: Iterator[tuple[Any, Place]]
        if listed is None:
            found = ((parsed(line.text), line.at) for line in self._lines(number, place, -1) if line.text.strip())
        else:
            first = place["line"]
            found = ((v, {"file": number, "byte": 0, "line": n}) for n, v in enumerate(listed[first:], first))
        for value, at in found:
            if is_blank(value, self.field) or (not at["line"] and isinstance(value, dict) and HEADER in value):
                continue
            text = value.get(self.field) if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise fail(
                    f"{path}, line {at['line'] + 1} is not a JSON object with a text in the field {self.field!r}.",
                    "Put one object on each line, and pass the name of its field as text_field.",
                    line="no JSON" if value is _BROKEN else value,
                )
            yield Piece(text, True, at)


class _TextLine(NamedTuple):
    text: str
    at: Place
    whole: bool  # whether the line ends here


def _cut(raw: bytes) -> tuple[bytes, bytes]:
    """Cut a part of a long line before its last space, or else between two characters."""
    at = raw.rfind(b" ")
    if at <= 0:
        at = len(raw) - 1
        while at > 1 and raw[at] & 0xC0 == 0x80:  # the middle of a character in UTF-8
            at -= 1
    return raw[:at], raw[at:]


def _pieces(lines: Iterator[_TextLine], documents: str) -> Iterator[Piece]:
    """Yield the documents of lines: the whole file, or each paragraph or line; long ones in pieces of `PIECE` bytes."""
    held: list[_TextLine] = []
    size = 0
    # A place with "part" lies within a document, of which an earlier piece was not blank.
    for line in lines:
        blank = documents == "paragraph" and not line.text.strip()
        if size >= PIECE and not blank:
            begun = _piece(held, False, documents)
            yield from begun
            if begun:
                line = line._replace(at={**line.at, "part": 1})  # noqa: PLW2901
            held, size = [], 0
        if not blank:
            held.append(line)
            size += len(line.text)
        if blank or (documents == "line" and line.whole):
            yield from _piece(held, True, documents)
            held, size = [], 0
    yield from _piece(held, True, documents)


def _piece(held: Sequence[_TextLine], ends: bool, documents: str) -> list[Piece]:
    """Return lines as one piece, or none where they hold no text and no document is open."""
    if not held:
        return []
    at, text = held[0].at, "".join(line.text for line in held)
    if documents == "paragraph":
        text = text if "part" in at else text.lstrip()
        text = text.rstrip() if ends else text
    elif documents == "line":
        text = text.rstrip("\n")
    return [Piece(text, ends, at)] if text.strip() or "part" in at else []


# ------------------------------------------------------------------------------------------------------------- JSON


def json_list(file: IO[bytes], path: str | os.PathLike[str], field: str = "text") -> list[Any] | None:
    """Return the entries of a file that holds one JSON value, or None if it is JSON Lines.

    The value is a list, or an object with one list of texts, such as the files that the code of MDLM, DUO and ReMDM
    writes, with their texts under ``generated_seqs``. Any other object is the only entry, as is one that has a text or
    ids itself.

    Args:
        file: The file, from its beginning.
        path: Its path, for messages.
        field: Field of an entry that holds its text. Default: ``"text"``.

    Raises:
        TokenDriftError: If an object has several lists of texts and none is called ``generated_seqs``.
    """
    first = next((line for line in file if line.strip().removeprefix(b"\xef\xbb\xbf")), b"")
    value = parsed(first.decode("utf-8-sig", errors="replace"))
    if value is not _BROKEN and any(line.strip() for line in file):
        return None
    if value is _BROKEN:
        if not first.lstrip(b"\xef\xbb\xbf \t").startswith((b"{", b"[")):
            return None
        value = parsed((first + file.read()).decode("utf-8-sig", errors="replace"))
    if value is _BROKEN or isinstance(value, list):
        return value if isinstance(value, list) else None
    entries = value if isinstance(value, dict) else {}
    lists = {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, list) and any(isinstance(one, str) for one in entry)
    }
    if SAMPLES in lists:
        return lists[SAMPLES]
    if not lists or field in entries or "ids" in entries:
        return [value]
    if len(lists) > 1:
        raise fail(f"{path} has several lists of texts: {', '.join(lists)}.", f"Name the right one {SAMPLES!r}.")
    return next(iter(lists.values()))


def is_blank(entry: Any, field: str = "text") -> bool:
    """Tell whether an entry of a JSON file has no text: null, or a text of nothing but white space, and no ids."""
    if isinstance(entry, dict):
        if field not in entry or entry.get("ids"):
            return False
        entry = entry[field]
    return entry is None or (isinstance(entry, str) and not entry.strip())


def read_documents(path: str | os.PathLike[str], *, argument: str = "text file") -> list[str]:
    """Return the documents of a file: the text of a text file as a whole, or the texts of JSON.

    Args:
        path: A file as for `TextFiles`.
        argument: What the file was passed as, for the message of the error.

    Raises:
        TokenDriftError: If it cannot be read, or holds no text.
    """
    if file_kind(path) in JSON_KINDS and Path(path).is_file():
        found = [piece.text for piece in TextFiles([Path(path)]).read()]
    else:
        text = read_text(path, argument=argument)
        found = [text] if text.strip() else []
    if not found:
        raise fail(f"{argument} {path} is empty.", "Pass a file with text.")
    return found


_BROKEN = object()


def parsed(text: str) -> Any:
    """Return the value of JSON, or a mark where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _BROKEN
