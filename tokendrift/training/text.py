"""Documents from text files, JSON Lines and Hugging Face datasets, read as a stream from any position."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from tokendrift._checks import fail

if TYPE_CHECKING:
    from tokendrift.training.config import RefineConfig

PIECE = 1 << 16  # bytes of a long document that are tokenised at a time
HEAD = 1 << 20  # bytes of a file by which it is recognised
JSON_LINES = (".jsonl", ".ndjson", ".json")
NO_TEXT = (".parquet", ".arrow", ".feather", ".csv", ".tsv", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz")
SAVED = ("dataset_info.json", "dataset_dict.json")  # what `datasets` leaves in a folder that it has saved

Place = dict[str, int]


class Piece(NamedTuple):
    """A document, or the next part of a long one.

    Attributes:
        text: The text, never empty.
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
    """Documents of text files and JSON lines, file after file.

    Args:
        paths: Files. ``.jsonl``, ``.ndjson`` and ``.json`` contain one JSON object on each line; all other files are
            UTF-8 text. Files whose names end with ``.gz`` are decompressed. Case does not matter.
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
        missing = [str(path) for path in self.paths if not path.is_file()]
        if missing or not self.paths:
            raise fail(
                f"these text files do not exist: {', '.join(missing) or 'none were given'}.", "Pass text or JSON lines."
            )
        for path in self.paths:
            if _kind(path) in NO_TEXT:
                raise fail(
                    f"text {path} is not a text file: its suffix is {_kind(path)}.",
                    "Text files and JSON lines are read, gzipped or not. For others put the files into a folder of "
                    "their own and pass that as dataset, or convert them.",
                )

    def identity(self) -> list[list[Any]]:
        """Return the size and the SHA-256 of the first MiB of each file, which change if a file is edited or grows."""
        found = []
        for path in self.paths:
            with path.open("rb") as file:
                found.append([str(path), path.stat().st_size, hashlib.sha256(file.read(HEAD)).hexdigest()])
        return found

    def read(self, start: Place | None = None) -> Iterator[Piece]:
        """Yield the pieces from a position to the end of the files."""
        start = start or {"file": 0, "byte": 0, "line": 0}
        for number in range(start["file"], len(self.paths)):
            place = start if number == start["file"] else {"file": number, "byte": 0, "line": 0}
            lines = self._lines(number, place)
            cut: Callable[[Iterator[_TextLine]], Iterator[Piece]]
            if _kind(self.paths[number]) in JSON_LINES:
                cut = self._objects
            else:
                cut = {"file": _whole, "paragraph": _paragraphs, "line": _single}[self.documents]
            yield from cut(lines)

    def _lines(self, number: int, place: Place) -> Iterator[_TextLine]:
        path, line = self.paths[number], place["line"]
        with cast(IO[bytes], (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb")) as file:
            file.seek(place["byte"])
            byte = file.tell()
            for raw in file:
                at = {"file": number, "byte": byte, "line": line}
                try:
                    yield _TextLine(raw.decode("utf-8-sig" if byte == 0 else "utf-8"), at)
                except UnicodeDecodeError as error:
                    raise fail(f"{path}, line {line + 1} is not UTF-8: {error}.", "Convert the file.") from None
                byte, line = byte + len(raw), line + 1

    def _objects(self, lines: Iterator[_TextLine]) -> Iterator[Piece]:
        for line in lines:
            if not line.text.strip():
                continue
            try:
                text = json.loads(line.text)[self.field]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                where = f"{self.paths[line.at['file']]}, line {line.at['line'] + 1}"
                raise fail(
                    f"{where} is not a JSON object with a text in the field {self.field!r}.",
                    "Put one object on each line, and pass the name of its field as text_field.",
                    line=line.text.rstrip(),
                )
            if text.strip():
                yield Piece(text, True, line.at)


def _kind(path: Path) -> str:
    """Return the suffix of a file as it is unpacked."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


class _TextLine(NamedTuple):
    text: str
    at: Place


def _whole(lines: Iterator[_TextLine]) -> Iterator[Piece]:
    """Yield a file in pieces of about `PIECE` bytes that end with a line; only the last one ends the document."""
    held: list[_TextLine] = []
    size = 0
    for line in lines:
        if size >= PIECE:
            yield Piece("".join(part.text for part in held), False, held[0].at)
            held, size = [], 0
        held.append(line)
        size += len(line.text)
    if held and any(part.text for part in held):
        yield Piece("".join(part.text for part in held), True, held[0].at)


def _paragraphs(lines: Iterator[_TextLine]) -> Iterator[Piece]:
    held: list[_TextLine] = []
    for line in chain(lines, [None]):
        if line is not None and line.text.strip():
            held.append(line)
        elif held:
            yield Piece("".join(part.text for part in held).strip(), True, held[0].at)
            held = []


def _single(lines: Iterator[_TextLine]) -> Iterator[Piece]:
    for line in lines:
        if line.text.strip():
            yield Piece(line.text.rstrip("\r\n"), True, line.at)


class DatasetRows:
    """Documents of a Hugging Face dataset, streamed; needs the package ``datasets``.

    Args:
        name: Name on the hub, a folder of data files, or a folder written by ``save_to_disk``.
        config: Configuration of the dataset.
        split: Split.
        field: Column that holds the text.

    Raises:
        TokenDriftError: If ``datasets`` is missing, the dataset cannot be opened, or has no such split or column.
    """

    def __init__(self, name: str, config: str | None = None, *, split: str = "train", field: str = "text") -> None:
        try:
            import datasets
        except ImportError as error:
            raise fail(f"{error}; it is needed to read {name!r}.", "Install it with pip install datasets.") from None
        self.name, self.field = name, field
        try:
            if any((Path(name) / mark).is_file() for mark in SAVED):
                rows: Any = datasets.load_from_disk(name)
                rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
            else:
                rows = datasets.load_dataset(name, config, split=split, streaming=True)
        except Exception as error:  # whatever `datasets` and what it calls may raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise fail(
                f"the dataset {name!r}, split {split!r}, cannot be opened: {reason}",
                "Check dataset, dataset_config and dataset_split; without a network, pass a folder.",
            ) from None
        columns = rows.column_names
        if columns is not None and field not in columns:
            raise fail(f"the dataset {name!r} has no column {field!r}.", f"Its columns are {', '.join(columns)}.")
        self.rows = rows

    def read(self, start: Place | None = None) -> Iterator[Piece]:
        """Yield the rows from a position to the end of the dataset."""
        first = start["row"] if start else 0
        for number, row in enumerate(self.rows.skip(first), first):
            text = row[self.field]
            if not isinstance(text, str):
                raise fail(f"row {number} of {self.name!r} has no text in column {self.field!r}.", **{self.field: text})
            if text.strip():
                yield Piece(text, True, {"row": number})


def open_text(config: RefineConfig) -> Documents:
    """Return the text source of a configuration.

    Raises:
        TokenDriftError: If it names none, or the source cannot be opened.
    """
    if config.dataset is not None:
        options = {"split": config.dataset_split, "field": config.text_field}
        return DatasetRows(config.dataset, config.dataset_config, **options)
    if not config.text:
        raise fail("no text to train on.", "Pass text files or a dataset.")
    return TextFiles(config.text, documents=config.documents, field=config.text_field)
