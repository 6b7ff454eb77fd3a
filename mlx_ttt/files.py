"""Files that are written whole or not at all, and the number of their format."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError, TTTError


@contextmanager
def written_whole(file: Path, suffix: str = "") -> Iterator[Path]:
    """A path beside `file` to write to. What is there afterwards replaces `file`; after an error, nothing does.

    Args:
        suffix: appended to the name, for libraries that insist on one.

    Raises:
        OSError: the folder cannot be written to.
    """
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as beside:
        complete = Path(beside) / f"{file.name}{suffix}"
        yield complete
        os.replace(complete, file)


def output_file(file: str | Path) -> Path:
    """The path that is to be written, with links followed. Lets a caller check it before a long computation.

    Raises:
        OutputError: there is something else than a file, or the folder does not exist or is not writable.
    """
    path = Path(os.path.realpath(file))
    if path.exists() and not path.is_file():
        raise OutputError(f"{file}: exists and is not a file; choose another name")
    if not path.parent.is_dir():
        raise OutputError(f"{file}: there is no such folder")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{file}: the folder is not writable")
    return path


def check_format(file: Path | str, found: object, known: int, kind: type[TTTError]) -> int:
    """The number of a file's format, which must not be newer than what this version reads.

    Args:
        found: what the file says, a number or its digits.
        known: the newest format that can be read.
        kind: the class of the error to raise.

    Raises:
        TTTError (of the class `kind`): the format is newer, or none.
    """
    digits = str(found)
    if isinstance(found, bool) or not (digits.isascii() and digits.isdigit()) or not int(digits[:9]) >= 1:
        raise kind(f"{file}: damaged: its format is no number")
    if int(digits[:9]) > known:
        raise kind(
            f"{file}: has format {digits[:9]}, which a newer version of mlx-ttt wrote; this one reads up to {known}:"
            " pip install --upgrade mlx-ttt"
        )
    return int(digits)
