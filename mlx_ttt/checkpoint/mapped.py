"""A file as memory, of which only what is being looked at stays resident."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from ..errors import CheckpointError


class MappedFile:
    """A file mapped read-only.

    Raises:
        CheckpointError: the file is missing, empty or unreadable.
    """

    def __init__(self, path: Path):
        self.path = path
        if not os.path.isfile(path):
            raise CheckpointError(f"{path}: no such file")
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # what mmap says of a file without bytes
            raise CheckpointError(f"{path}: the file is empty") from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        self.size = len(self._map)

    def view(self, start: int, length: int) -> memoryview:
        """The bytes [start, start + length), not copied.

        Raises:
            CheckpointError: the file does not reach that far.
        """
        if not 0 <= start <= start + length <= self.size:
            raise self.damaged("it is shorter than its own directory says")
        return memoryview(self._map)[start : start + length]

    def forget(self, start: int, length: int) -> None:
        """Give back the pages of [start, start + length): the next look reads them from the file again."""
        if length and hasattr(mmap, "MADV_DONTNEED"):
            first_page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first_page, start + length - first_page)

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: truncated or damaged, copy or download it again ({why})")
