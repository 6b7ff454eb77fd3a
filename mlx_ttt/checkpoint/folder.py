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
    """A context manager that gives an empty folder to write into, and moves it to `out` at the end of the block.

    If the block raises an exception, the folder is deleted and what was at `out` stays as it was.

    Args:
        out: where the folder is to appear.
        nbytes: about how much will be written.
        overwrite: replace a model directory that is at `out`.

    Raises:
        OutputError: `out` exists and is not to be replaced or is no model directory, its parent does not exist, it
            cannot be written to, or the block could not read a file.
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
            check_place(out, overwrite)  # again: writing may have taken minutes
            if os.path.lexists(out):
                out.rename(old)
            new.rename(out)
        finally:
            if old.exists() and new.exists():  # `out` was moved away, but the new folder did not get there
                _put_back(old, out)
            shutil.rmtree(workshop, ignore_errors=True)


def check_place(out: Path, overwrite: bool) -> None:
    """Check that a folder may appear at `out`.

    Raises:
        OutputError: `out` exists and is not to be replaced or is no model directory, or its parent does not exist.
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


def is_workshop(folder: Path) -> bool:
    """Whether a folder is one that `complete_folder` works in; if nobody does, a process was killed there."""
    return folder.name.startswith(".") and ".partial-" in folder.name


def _workshop_prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _no_space(out: Path, nbytes: int) -> OutputError:
    free = shutil.disk_usage(out.parent).free
    return OutputError(f"{out}: the disk is full: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


@contextmanager
def _one_line_errors(out: Path, nbytes: int) -> Iterator[None]:
    """Turn an OSError into an OutputError that names `out`, or the file it is about if that lies elsewhere."""
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
