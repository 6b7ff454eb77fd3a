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


@contextmanager
def complete_folder(out: Path, nbytes: int, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `out` to write into; it takes `out`'s place when the block ends without an exception.

    Otherwise nothing remains of it, and what was at `out` is untouched.

    Args:
        out: where the folder is to appear.
        nbytes: about how much will be written.
        overwrite: replace a model directory that is at `out`.

    Raises:
        OutputError: `out` exists, its parent does not, or it cannot be written to.
    """
    workshop = None
    try:
        _check(out, nbytes, overwrite)
        workshop = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        new = workshop / "new"
        new.mkdir()
        yield new
        _put_in_place(new, out, workshop / "replaced")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(out, nbytes) from None
        raise OutputError(f"{out}: cannot write there: {error.strerror or error}") from None
    finally:
        if workshop:
            shutil.rmtree(workshop, ignore_errors=True)


def _check(out: Path, nbytes: int, overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist; create it first")
    if os.path.lexists(out):
        if not overwrite:
            raise OutputError(f"{out}: exists already; --overwrite replaces it")
        if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
            raise OutputError(f"{out}: is not a model directory, so --overwrite leaves it alone; choose another place")
    if shutil.disk_usage(out.parent).free < nbytes:
        raise _no_space(out, nbytes)


def _no_space(out: Path, nbytes: int) -> OutputError:
    free = shutil.disk_usage(out.parent).free
    return OutputError(f"{out}: the disk is full: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def _put_in_place(new: Path, out: Path, replaced: Path) -> None:
    """Rename `new` to `out`; an old `out` is moved aside first and moved back if that fails."""
    if not out.exists():
        new.rename(out)
        return
    out.rename(replaced)
    try:
        new.rename(out)
    except BaseException:
        replaced.rename(out)
        raise
