"""A file mapped into memory. What has been read can be given back, so that large files need little memory."""

from __future__ import annotations

import mmap
from pathlib import Path

from ..errors import CheckpointError
from .untrusted import opened


class MappedFile:
    """A file mapped read-only.

    Raises:
        CheckpointError: the file is missing, empty or unreadable.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with opened(path) as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # mmap refuses empty files with it
            raise CheckpointError(f"{path}: the file is empty") from None
        self.size = len(self._map)

    def view(self, start: int, length: int) -> memoryview:
        """The bytes [start, start + length), without a copy.

        Raises:
            CheckpointError: the file does not reach that far.
        """
        self.require(0 <= start <= start + length <= self.size, "it is shorter than its own directory says")
        return memoryview(self._map)[start : start + length]

    def forget(self, start: int, length: int) -> None:
        """Give the memory of the bytes [start, start + length) back; they are read from the file again when needed."""
        if length and hasattr(mmap, "MADV_DONTNEED"):
            first_page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first_page, start + length - first_page)

    def require(self, fact: bool, otherwise: str) -> None:
        """Check a fact that holds for every file of this format; raise `damaged` if it does not hold here.

        Args:
            otherwise: what is wrong if it does not hold.
        """
        if not fact:
            raise self.damaged(otherwise)

    def damaged(self, why: str) -> CheckpointError:
        """The error to raise when the file turns out to be damaged."""
        return CheckpointError(f"{self.path}: truncated or damaged, copy or download it again ({why})")
