"""A folder that appears only when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError
from .directory import refuse_foreign


@contextmanager
def complete_folder(out: Path, nbytes: int, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `out` to write into; it takes `out`'s place when the block ends without an exception.

    Otherwise nothing remains of it, and what was at `out` is untouched.

    Args:
        out: where the folder is to appear.
        nbytes: about how much will be written.
        overwrite: replace a model directory that is at `out`.

    Raises:
        OutputError: `out` exists, or is not a model directory, its parent does not exist, it cannot be written to, or
            the block could not read a file.
    """
    with _one_line_errors(out, nbytes):
        check_place(out, overwrite)
        if shutil.disk_usage(out.parent).free < nbytes:
            raise _no_space(out, nbytes)
        workshop = Path(tempfile.mkdtemp(prefix=_workshop_prefix(out), dir=out.parent))
        new, old = workshop / "new", workshop / "old"
        try:
            new.mkdir()
            yield new
            check_place(out, overwrite)  # again: much may have happened meanwhile
            if os.path.lexists(out):
                out.rename(old)
            new.rename(out)
        finally:
            if old.exists() and new.exists():  # `out` was moved away, but nothing took its place
                _put_back(old, out)
            shutil.rmtree(workshop, ignore_errors=True)


def check_place(out: Path, overwrite: bool) -> None:
    """Whether a folder may appear at `out`, before the work that goes into it.

    Raises:
        OutputError: `out` exists and is not to be overwritten, or is no model directory, or its parent does not exist.
    """
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist; create it first")
    if os.path.lexists(out):
        if not overwrite:
            raise OutputError(f"{out}: exists already; --overwrite replaces a model directory")
        refuse_foreign(out)


def _put_back(old: Path, out: Path) -> None:
    try:
        old.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be put back ({error.strerror}); it is now {old}") from None


def _workshop_prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _no_space(out: Path, nbytes: int) -> OutputError:
    free = shutil.disk_usage(out.parent).free
    return OutputError(f"{out}: the disk is full: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


@contextmanager
def _one_line_errors(out: Path, nbytes: int) -> Iterator[None]:
    """An OSError as an OutputError that names `out`, or the file that the error is about if it lies elsewhere."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(out, nbytes) from None
        file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else out
        written = (file, *file.parents)
        if out in written or any(folder.name.startswith(_workshop_prefix(out)) for folder in written):
            raise OutputError(f"{out}: cannot write there: {error.strerror or error}") from None
        raise OutputError(f"{file}: {error.strerror or error}") from None
