"""Text and JSON from untrusted files: made safe to print, parsed strictly, bounded in size."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError, TTTError

LONGEST_JSON = 16 << 20  # bytes; the largest known index file is a hundred times smaller


def quoted(value: object, longest: int = 200) -> str:
    """A value out of a file, or an error, as text for a one-line message: short and without control characters.

    An error's lines are joined; an error without a message gives the name of its class.

    Args:
        longest: characters to show at most.
    """
    if isinstance(value, BaseException):
        value = " ".join(str(value).split()) or type(value).__name__
    text = str(value)
    if len(text) > longest:
        text = f"{text[: longest - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def opened(path: Path, kind: type[TTTError] = CheckpointError) -> Iterator[BinaryIO]:
    """A context manager that gives a file to read from.

    Args:
        kind: the class of the error to raise.

    Raises:
        TTTError (of the class `kind`): there is no such file, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe could wait forever
            raise kind(f"{path}: not a file")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise kind(f"{path}: no such file") from None
    except OSError as error:
        raise kind(f"{path}: {error.strerror}") from None


def read_bytes(path: Path, longest: int, kind: type[TTTError] = CheckpointError) -> bytes:
    """The content of a small file.

    Args:
        longest: how many bytes it may have.
        kind: the class of the error to raise.

    Raises:
        TTTError (of the class `kind`): it cannot be read, or is longer.
    """
    with opened(path, kind) as file:
        data = file.read(longest + 1)
    if len(data) > longest:
        raise kind(f"{path}: has more than {longest:,} bytes, more than a checkpoint has there")
    return data


def parse_json(text: bytes, where: str, kind: type[TTTError] = CheckpointError) -> dict:
    """The JSON object in `text`, whose keys must be unique.

    Args:
        where: the file, for the error message.
        kind: the class of the error to raise.

    Raises:
        TTTError (of the class `kind`): `text` is not JSON in UTF-8, or not an object.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a key occurs twice")
        return entries

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise kind(f"{where}: not valid JSON ({quoted(error)})") from None
    if not isinstance(value, dict):
        raise kind(f"{where}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_json(path: Path, longest: int = LONGEST_JSON, kind: type[TTTError] = CheckpointError) -> dict:
    """The JSON object in a file. Arguments and errors are those of `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, longest, kind), str(path), kind)
