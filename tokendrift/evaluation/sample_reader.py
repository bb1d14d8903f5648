"""Samples from files: JSON, or text whose paragraphs or lines are the samples."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tokendrift._checks import TYPES, fail
from tokendrift.errors import TokenDriftError
from tokendrift.files import file_kind, read_text
from tokendrift.sampling import BadLine, SampleSet
from tokendrift.text_files import HEADER, JSON_KINDS, is_blank, json_list, parsed

LARGEST_ID = 2**31 - 1  # of a token, which every tokenizer and every model can hold
LONGEST = 2**24  # characters or ids of a sample
MOST = 10**6  # samples of a file
DEEPEST = 20  # lists and objects within each other in a header
STATED = {"n": int, "complete": bool, "steps": int, "length": int, "tokenizer": str, "checkpoint": str}  # in a header

SEVERAL = "Split the file into several."


class _SampleLine(NamedTuple):
    ids: list[int] | None
    text: str | None
    nfe: int | None


def read_samples(
    path: str | os.PathLike[str], *, skip_bad: bool = False, lines: bool = False, skip_blank: bool = False
) -> SampleSet:
    """Read samples from a file, gzipped (``.gz``) or not.

    A ``.jsonl``, ``.ndjson`` or ``.json`` file has one object a line, with ``"ids"`` (a list of integers), ``"text"``,
    or both, and ``"nfe"`` if it is known; a text alone will do in place of the object. The first line may be a header
    ``{"tokendrift": {...}}`` instead, whose object becomes the metadata. All lines then belong to one run, and its NFE
    is the largest of theirs. A file with a header is read in this format whatever its ending. Instead of lines, such a
    file may hold one JSON list of objects or texts, or one object with such a list, as the code of MDLM, DUO and ReMDM
    writes it under ``"generated_seqs"``. Any other file is UTF-8 text whose paragraphs, separated by blank lines, are
    the samples.

    Args:
        path: The file.
        skip_bad: Leave out lines that cannot be read and list them in ``bad_lines``; otherwise the first such line is
            an error. Default: False.
        lines: Whether each line of a text file that is not blank is a sample, instead of each paragraph. Default:
            False.
        skip_blank: Whether to leave out entries whose text is null or blank, as training does; a blank text that a
            model has generated is a sample. Default: False.

    Raises:
        TokenDriftError: If the file cannot be read, holds no sample or more than a million, has a bad line, or mixes
            lines with text alone and lines with ids alone, or lines of several NFE. A sample of more than 2^24
            characters or ids is a bad line, too. Also if the header announces another number of samples than there are,
            or fewer in an unfinished file; with ``skip_bad``, such a file is read, and its metadata say that it is not
            complete.
    """
    place = Path(path)
    content = read_text(place, argument="samples file")
    if file_kind(place) not in JSON_KINDS and not has_header(content):
        runs = groupby(content.split("\n"), key=lambda line: bool(line.strip()))
        paragraphs = [list(run) for written, run in runs if written]
        texts = [line for part in paragraphs for line in part] if lines else ["\n".join(part) for part in paragraphs]
        if not texts:
            raise _empty(place, ())
        if max(map(len, texts)) > LONGEST:
            raise fail(f"{place} holds a sample of more than {LONGEST:,} characters.", SEVERAL)
        _check_most(place, len(texts))
        return SampleSet(texts=texts)
    metadata: dict[str, Any] = {}
    found: list[_SampleLine] = []
    bad: list[BadLine] = []
    blank = 0
    for number, parse in _entries(content, place):
        try:
            entry = parse()
            if skip_blank and is_blank(entry):
                blank += 1
                continue
            entry = _as_object(entry)
            if HEADER in entry and not found and not bad:
                metadata = _header(entry[HEADER])
            else:
                found.append(_sample(entry))
        except ValueError as error:
            if not skip_bad:
                raise TokenDriftError(
                    f"line {number} of {place} holds no sample: {error}.\n"
                    "  Correct the line, or leave such lines out with skip_bad, which reports them."
                ) from None
            bad.append(BadLine(number, str(error)))
        _check_most(place, len(found) + len(bad))
    if not found:
        raise _empty(place, tuple(bad))
    metadata = _checked_count(place, len(found) + len(bad) + blank, metadata, skip_bad=skip_bad)
    return _together(place, found, metadata, tuple(bad))


def _checked_count(place: Path, count: int, metadata: dict[str, Any], *, skip_bad: bool) -> dict[str, Any]:
    """Return the metadata of a file with so many samples; require those that a complete file announces."""
    announced = metadata.get("n")
    if announced is None or count == announced or (count < announced and not metadata.get("complete")):
        return metadata
    if not skip_bad:
        raise fail(
            f"{place} holds {count} samples, but its header announces {announced}: the file was changed.",
            "Run the tokendrift sample command that made it again, which completes it; or pass skip_bad (--skip-bad) "
            "to read the samples that are there.",
        )
    return metadata | {"complete": False}


def _check_most(place: Path, count: int) -> None:
    if count > MOST:
        raise fail(f"{place} holds more than {MOST:,} samples.", SEVERAL)


def _entries(content: str, place: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Yield the entries of a JSON file by number, from 1, as functions that parse them."""
    listed = json_list(io.BytesIO(content.encode()), place)
    if listed is not None:
        yield from ((number, lambda entry=entry: entry) for number, entry in enumerate(listed, start=1))
        return
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines would also break at U+2028 within a text
        if line.strip():
            yield number, partial(_parse, line)


def has_header(content: str) -> bool:
    """Return whether the first line of a file is the header that `tokendrift sample` writes."""
    first = parsed(content.lstrip().partition("\n")[0])
    return isinstance(first, dict) and HEADER in first


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from None


def _as_object(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"text": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON object was expected, not {type(entry).__name__}")
    return entry


def _header(metadata: object) -> dict[str, Any]:
    if not isinstance(metadata, dict):
        raise ValueError(f'the value of "{HEADER}" must be an object, not {type(metadata).__name__}')
    level: list[Any] = [metadata]
    for _ in range(DEEPEST):
        level = [child for value in level for child in _children(value)]
    if level:
        raise ValueError(f'the value of "{HEADER}" is nested too deeply')
    for name, kind in STATED.items():
        value = metadata.get(name)
        if value is not None and type(value) is not kind:
            raise ValueError(f'"{name}" in "{HEADER}" must be {TYPES[kind]}, not {value!r:.80}')
    return metadata


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _sample(entry: dict[str, Any]) -> _SampleLine:
    ids, text, nfe = entry.get("ids"), entry.get("text"), entry.get("nfe")
    if ids is None and text is None:
        raise ValueError('it has neither "text" nor "ids"')
    if text is not None and not isinstance(text, str):
        raise ValueError('"text" must be a string')
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError('"text" contains half of a surrogate pair, which is not a character')
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and 0 <= i <= LARGEST_ID for i in ids)):
        raise ValueError('"ids" must be a list of integers of at least 0, each below 2^31')
    if nfe is not None and (type(nfe) is not int or not 0 <= nfe <= LARGEST_ID):
        raise ValueError('"nfe" must be an integer of at least 0, below 2^31')
    if max(len(ids or ()), len(text or "")) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST:,} characters or ids")
    return _SampleLine(ids, text, nfe)


def _together(
    place: Path, lines: Sequence[_SampleLine], metadata: dict[str, Any], bad: tuple[BadLine, ...]
) -> SampleSet:
    have_ids, have_text = ([line[i] is not None for line in lines] for i in range(2))
    if not (all(have_ids) or all(have_text)):
        raise TokenDriftError(
            f"{place} contains some lines with only text and others with only ids.\n  Give all lines the same fields."
        )
    costs = {line.nfe for line in lines}
    if metadata and None not in costs:
        # One run, whose header says so: rows may have taken part in fewer calls than the batch had.
        costs = {max(nfe for nfe in costs if nfe is not None)}
    if len(costs) > 1:
        shown = ", ".join(map(str, sorted(costs, key=lambda nfe: (nfe is None, nfe or 0))))
        raise TokenDriftError(
            f"{place} mixes samples of different NFE ({shown}); they cannot be measured as one set.\n"
            "  Split the file by NFE."
        )
    return SampleSet(
        ids=[line.ids for line in lines if line.ids is not None] if all(have_ids) else None,
        texts=[line.text for line in lines if line.text is not None] if all(have_text) else None,
        nfe=costs.pop(),
        metadata=metadata,
        bad_lines=bad,
        flops=_flops(metadata),
    )


def _flops(metadata: Mapping[str, Any]) -> float | None:
    """Return the FLOPs of a sample that a header states, None where it states no positive number."""
    stated = metadata.get("flops")
    if isinstance(stated, bool) or not isinstance(stated, (int, float)) or not 0 < stated < math.inf:
        return None
    return float(stated)


def _empty(place: Path, bad: tuple[BadLine, ...]) -> TokenDriftError:
    lines = f" ({len(bad)} lines were left out, the first is line {bad[0].number}: {bad[0].reason})" if bad else ""
    return fail(f"{place} holds no sample{lines}.", "A .jsonl file has one object with text or ids on each line.")
