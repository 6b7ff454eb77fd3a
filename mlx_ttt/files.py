"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
