"""Text and JSON from files that nobody vouches for: safe to print, safe to parse, bounded in size."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import CheckpointError

LONGEST_JSON = 16 << 20  # bytes; the largest real index file is a hundred times smaller


def quoted(text: object, longest: int = 120) -> str:
    """A name out of a file as it may stand in a one-line message: no control characters, no endless text."""
    text = str(text)
    if len(text) > longest:
        text = f"{text[: longest - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def parse_json(text: bytes, where: str) -> dict:
    """The JSON object that `text` holds, its keys unique.

    Raises:
        CheckpointError: `text` is too long, is not JSON in UTF-8, or not an object.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a key occurs twice")
        return entries

    if len(text) > LONGEST_JSON:
        raise CheckpointError(f"{where}: {len(text):,} bytes of JSON are more than a checkpoint has")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({quoted(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, or does not hold a JSON object.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    return parse_json(text, str(path))
