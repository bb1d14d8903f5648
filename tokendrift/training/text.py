"""Documents to train on: text files and JSON, or rows of Hugging Face datasets, read as a stream from any position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendrift._checks import fail
from tokendrift.models.hub import check_local
from tokendrift.text_files import PIECE, Documents, Piece, Place, TextFiles

if TYPE_CHECKING:
    from tokendrift.training.config import RefineConfig

SAVED = ("dataset_info.json", "dataset_dict.json")  # what `datasets` leaves in a folder that it has saved

__all__ = ["PIECE", "DatasetRows", "Documents", "Piece", "Place", "TextFiles", "open_text"]


class DatasetRows:
    """Documents of a Hugging Face dataset, streamed; needs the package ``datasets``. Blank rows are left out.

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
            check_local(name, "dataset")
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
            text = row[self.field] or ""
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
