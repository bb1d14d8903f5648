"""Reading text files, writing files atomically, locks, and digests of files and weights."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from torch import nn

from tokendrift._checks import fail
from tokendrift.errors import TokenDriftError

BLOCK = 1 << 20  # bytes read at a time for a digest
NO_TEXT = (".parquet", ".arrow", ".feather", ".csv", ".tsv", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz")


class FileError(TokenDriftError, OSError):
    """A file that cannot be read or written. The message names the file, the reason, and what to do."""


def file_kind(path: str | os.PathLike[str]) -> str:
    """Return the suffix of a file in lower case, without the ``.gz`` of a packed one.

    >>> file_kind("samples.JSONL.gz")
    '.jsonl'
    """
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


@contextmanager
def foreign_errors(complaint: str, remedy: str) -> Iterator[None]:
    """Turn whatever the block raises into one error: the complaint, the reason, and what to do.

    Parsers of what is of unknown origin raise all kinds of exceptions, `RecursionError` for deep nesting among them,
    and the panics of libraries written in Rust, which are no `Exception`.

    Args:
        complaint: What failed, such as "config.json cannot be read".
        remedy: What to do about it.

    Raises:
        TokenDriftError: If the block raises an error.
    """
    try:
        yield
    except TokenDriftError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        kind = FileError if isinstance(error, OSError) else TokenDriftError
        raise kind(f"{complaint}: {reason(error)}.\n  {remedy}") from error


def readable(path: str | os.PathLike[str], remedy: str, *, what: str = "file") -> AbstractContextManager[None]:
    """Return `foreign_errors` for a block that reads a file, which was passed as ``what``."""
    return foreign_errors(f"{what} {path} cannot be read", remedy)


def is_failure(error: BaseException) -> bool:
    """Return whether an exception is an error or a panic, rather than an interruption."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """Return what an exception says, in one line without a full stop; its type where it says nothing."""
    said = getattr(error, "strerror", None) or str(error).strip()
    return said.splitlines()[0].rstrip(". ") if said else type(error).__name__


def check_text_kind(path: str | os.PathLike[str], argument: str) -> None:
    """Require a file whose name is not that of a table or an archive."""
    if file_kind(path) in NO_TEXT:
        raise TokenDriftError(
            f"{argument} {path} is not a text file: its suffix is {file_kind(path)}.\n"
            "  Text files and JSON lines are read, gzipped or not. To train on others, put the files into a folder of "
            "their own and pass that as dataset; else convert them, for instance by to_json of the package datasets."
        )


def open_bytes(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading; one whose name ends with ``.gz`` is unpacked on the way."""
    return cast(IO[bytes], (gzip.open if Path(path).suffix.lower() == ".gz" else open)(path, "rb"))


def read_text(path: str | os.PathLike[str], *, argument: str = "file") -> str:
    """Return the content of a UTF-8 text file, gzipped or not.

    A byte order mark at its start is dropped, and every line ends with a line feed.

    Args:
        path: The file.
        argument: What the file was passed as, for the message of the error.

    Raises:
        TokenDriftError: If it cannot be read, is not UTF-8, or is a table or an archive.
    """
    check_text_kind(path, argument)
    with readable(path, "Pass a file that exists and is complete.", what=argument):
        try:
            with open_bytes(path) as file:
                return file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise FileError(
                f"{argument} {path} is not UTF-8 text (byte {error.start}).\n  Pass a plain text file in UTF-8."
            ) from None


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission in the block into one error; what was written before stays."""
    try:
        yield
    except OSError as error:
        raise fail(
            f"{path} cannot be written: {error.strerror or error}.", "Free some space, or write elsewhere."
        ) from None


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file whole or not at all: if writing fails or is interrupted, an older file of that name remains.

    A symbolic link is kept, and the file that it points to is replaced. A path that is not a regular file, such as a
    pipe or ``/dev/stdout``, is written to directly. Missing folders are made.

    Raises:
        FileError: If the folder cannot be written to or the disk is full.
    """
    place, older = Path(path), ""
    try:
        older = " The older file is unchanged." if place.is_file() else ""
        if place.exists() and not place.is_file():
            place.write_text(text, encoding="utf-8", newline="\n")
        else:
            _replace(place.resolve(), text)
    except (OSError, RuntimeError) as error:  # before Python 3.13 a circle of links raises RuntimeError
        why = getattr(error, "strerror", None) or error
        raise FileError(
            f"{place} could not be written: {why}.{older}\n  Free some space, or write elsewhere."
        ) from error


def check_writable(*paths: Path | None) -> None:
    """Require paths that `write_atomically` can write to, before the work whose results they take; None is passed over.

    Raises:
        FileError: If one is a folder, or lies below a file or in a folder that cannot be written to.
    """
    for path in (each for each in paths if each is not None):
        place = Path(os.path.realpath(path))
        folder = next(each for each in place.parents if os.access(each, os.F_OK))
        if os.access(place, os.F_OK) and not place.is_file():
            why = "it is a folder" if place.is_dir() else ""  # a pipe is written to directly
        elif not folder.is_dir():
            why = f"{folder} is a file"
        else:
            why = "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} denies the permission to write"
        if why:
            raise FileError(f"{path} cannot be written: {why}.\n  Choose another output.")


def _replace(place: Path, text: str) -> None:
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8", newline="\n")
        flush_to_disk(part)  # a full disk may show only here
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def exclusive(lock: Path, target: Path) -> Iterator[None]:
    """Hold a lock inside the block. It ends with the process, however that ends, and leaves no file.

    Args:
        lock: File of the lock, on a file system that all contenders share.
        target: What is locked, for the message of the error.

    Raises:
        TokenDriftError: If another process holds it, which the error names, or if the file cannot be made.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    with writable(target):
        lock.parent.mkdir(parents=True, exist_ok=True)
        holder = lock.read_text(encoding="utf-8", errors="replace") if lock.exists() else ""
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise fail(
                f"{target} is in use by {holder or 'another process'}.",
                "Wait until it has ended, or choose another output.",
            ) from None
    try:
        with suppress(OSError):
            lock.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # while it is held: nobody else can have taken it
        held.release()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def weight_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's ``state_dict``, in hexadecimal digits: equal digests mean equal weights."""
    from safetensors.torch import save

    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(save({name: tensor.detach().cpu().contiguous()}))
    return found.hexdigest()
