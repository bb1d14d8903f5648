"""Samples in a JSON Lines file that grows batch by batch, and that an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokendrift._checks import fail
from tokendrift.files import writable
from tokendrift.text_files import HEADER

# Fields of the header that are filled in at the end; the others must not change.
MEASURED = ("nfe", "flops", "complete")


class SampleFile:
    """A file of samples: a header line, then one JSON object for each sample.

    The header is ``{"tokendrift": {...}}`` with everything that the samples depend on. At the end their NFE and the
    floating-point operations (FLOPs) of a sample are added; until then, ``complete`` is false. A sample has ``ids``,
    ``text`` if there is a tokenizer, and ``nfe``. When the file is opened again, lines from the first that is no such
    sample on are dropped, and a file that has lost samples since it was complete is incomplete again.

    Args:
        path: The file; folders above it are made.
        settings: What the samples depend on, fit for JSON. A file with other settings is refused.

    Attributes:
        count: Number of samples in the file.
        complete: Whether the run was finished.
        nfe: ``{"mean": ..., "max": ...}`` of the samples' forward calls if the run was finished, else empty.
        flops: Mean FLOPs of a sample if the run was finished and they were counted, else None.

    Raises:
        TokenDriftError: If the file exists and is not a file of samples, belongs to other settings, or cannot be
            written to.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.count, self.complete = 0, False
        self.nfe: dict[str, float] = {}
        self.flops: float | None = None
        with writable(path):
            if path.exists() and path.stat().st_size:
                self._read()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_line(self._header()))

    def keep(self, count: int) -> None:
        """Drop all samples after the first ``count``, and whatever a crash left of a line."""
        with writable(self.path), self.path.open("r+b") as file:
            for _ in range(1 + count):
                file.readline()
            file.truncate(file.tell())
        self.count = count

    def append(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write some samples; if this is interrupted, the incomplete part is dropped when the run is resumed."""
        with writable(self.path), self.path.open("ab") as file:
            file.write(b"".join(_line(sample) for sample in samples))
        self.count += len(samples)

    def finish(self, flops_per_evaluation: int | None = None) -> None:
        """Put the measured NFE and FLOPs into the header, which says from then on that the file is complete.

        Args:
            flops_per_evaluation: See `tokendrift.sampling.cost`. Default: not counted.

        Raises:
            TokenDriftError: If the file does not hold the samples that its header announces.
        """
        nfe = [sample["nfe"] for sample in self._samples()]
        if len(nfe) != self.settings.get("n", self.count) or not nfe:
            raise fail(
                f"{self.path} holds {len(nfe)} of {self.settings.get('n', self.count)} samples: it was changed while "
                "it was written.",
                "Run the same command again to draw the others.",
            )
        self.nfe, self.complete = _summary(nfe), True
        self.flops = None if flops_per_evaluation is None else flops_per_evaluation * self.nfe["mean"]
        self._replace_header()

    def _replace_header(self) -> None:
        """Write the header anew. The file is replaced as a whole or not at all."""
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            with writable(self.path), self.path.open("rb") as file, part.open("wb") as new:
                file.readline()
                new.write(_line(self._header()))
                new.writelines(file)
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)

    def _header(self) -> dict[str, Any]:
        return {HEADER: self.settings | {"nfe": self.nfe or None, "flops": self.flops, "complete": self.complete}}

    def _samples(self) -> Iterator[dict[str, Any]]:
        """Yield the samples, up to the first line that is none."""
        length = self.settings.get("length")
        with self.path.open("rb") as file:
            file.readline()
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    sample = json.loads(line)
                    ids, nfe = sample["ids"], sample["nfe"]
                    if type(nfe) is not int or type(ids) is not list or {*map(type, ids)} - {int}:
                        return
                    if len(ids) != (length or len(ids)):
                        return
                except (ValueError, KeyError, TypeError, RecursionError):
                    return
                yield sample

    def _read(self) -> None:
        try:
            with self.path.open("rb") as file:
                header = json.loads(file.readline())[HEADER]
            before = {name: value for name, value in header.items() if name not in MEASURED}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise fail(
                f"{self.path} exists and is not a file of samples of this command.", "Choose another output."
            ) from None
        changed = [name for name in self.settings | before if self.settings.get(name) != before.get(name)]
        if changed:
            shown = "\n".join(
                f"    {n}: {before.get(n)!r:.200} there, {self.settings.get(n)!r:.200} now" for n in changed
            )
            raise fail(
                f"{self.path} was begun with other settings:\n{shown}",
                "Resume with the same settings, or choose another output.",
            )
        nfe = [sample["nfe"] for sample in self._samples()]
        self.count = len(nfe)
        with self.path.open("rb") as file:
            lines = sum(1 for _ in file) - 1
        if header.get("complete") is not True:
            return
        self.nfe, self.flops = _summary(nfe), header.get("flops")
        self.complete = self.settings.get("n", lines) == lines == self.count and header.get("nfe") == self.nfe
        if not self.complete:
            self.nfe, self.flops = {}, None
            self._replace_header()


def _summary(nfe: Sequence[int]) -> dict[str, float]:
    return {"mean": sum(nfe) / len(nfe), "max": max(nfe)} if nfe else {}


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
