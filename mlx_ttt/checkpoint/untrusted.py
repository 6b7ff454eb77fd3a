"""Text and JSON from files that nobody vouches for: safe to print, safe to parse, bounded in size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from ..errors import CheckpointError, TTTError

LONGEST_JSON = 16 << 20  # bytes; the largest real index file is a hundred times smaller


def quoted(value: object, longest: int = 200) -> str:
    """A name out of a file, or an error about one, as it may stand in a one-line message.

    No control characters and no endless text; an error's lines are joined, and one without words gives its class.
    """
    if isinstance(value, BaseException):
        value = " ".join(str(value).split()) or type(value).__name__
    text = str(value)
    if len(text) > longest:
        text = f"{text[: longest - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_bytes(path: Path, longest: int, kind: type[TTTError] = CheckpointError) -> bytes:
    """A file that is small enough to read whole.

    Args:
        longest: bytes that it may have.
        kind: the class of the error, which names the file.

    Raises:
        CheckpointError, or what `kind` says: it cannot be read, or is longer.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe could wait forever
            raise kind(f"{path}: not a file")
        with path.open("rb") as file:
            data = file.read(longest + 1)
    except FileNotFoundError:
        raise kind(f"{path}: no such file") from None
    except OSError as error:
        raise kind(f"{path}: {error.strerror}") from None
    if len(data) > longest:
        raise kind(f"{path}: has more than {longest:,} bytes, more than a checkpoint has there")
    return data


def parse_json(text: bytes, where: str, kind: type[TTTError] = CheckpointError) -> dict:
    """The JSON object that `text` holds, its keys unique.

    Raises:
        CheckpointError, or what `kind` says: `text` is not JSON in UTF-8, or not an object.
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
    """The JSON object in a file; arguments and errors are those of `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, longest, kind), str(path), kind)
