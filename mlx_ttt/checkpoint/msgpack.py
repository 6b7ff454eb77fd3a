"""Reads MessagePack from a file, one value after another; byte strings are not copied.

The caller says which kind of value must come next, and any other is an error. So a damaged file cannot make the reader
allocate memory or recurse.
"""

from __future__ import annotations

from .mapped import MappedFile
from .untrusted import quoted

_LONGEST_TEXT = 1024  # bytes

# By the first byte of a value: its kind, a number, and how many bytes follow that hold the number instead (0: none).
# The number is an integer's value, how many members an array or map has, or the length of text, binary or extension.
_HEADS = (
    {
        first + n: (kind, n, 0)
        for kind, first, count in (
            ("integer", 0x00, 128),
            ("map", 0x80, 16),
            ("array", 0x90, 16),
            ("text", 0xA0, 32),
            ("boolean", 0xC2, 2),
        )
        for n in range(count)
    }
    | {
        first + n: (kind, 0, width << n)
        for kind, first, width, count in (
            ("binary", 0xC4, 1, 3),
            ("extension", 0xC7, 1, 3),
            ("integer", 0xCC, 1, 4),
            ("text", 0xD9, 1, 3),
            ("array", 0xDC, 2, 2),
            ("map", 0xDE, 2, 2),
        )
        for n in range(count)
    }
    | {0xD4 + n: ("extension", 1 << n, 0) for n in range(5)}
)


class Reader:
    """Reads the values between two positions of a file.

    Each method that is named after a kind reads one value of that kind. It raises CheckpointError if the next value is
    of another kind, if there is none, or if it reaches beyond the end.
    """

    def __init__(self, file: MappedFile, start: int, end: int):
        self.file, self.position, self.end = file, start, end

    def kind(self) -> str:
        """The kind of the next value; "nothing" at the end."""
        if self.position == self.end:
            return "nothing"
        return _HEADS.get(self.file.view(self.position, 1)[0], ("something else",))[0]

    def array(self) -> int:
        """The number of members. They are read next, one by one."""
        return self._number("array")

    def map(self) -> int:
        """The number of entries. Their keys and values are read next, in turns."""
        return self._number("map")

    def integer(self) -> int:
        """An integer that is not negative."""
        return self._number("integer")

    def boolean(self) -> bool:
        return bool(self._number("boolean"))

    def text(self) -> str:
        length = self._number("text")
        self.file.require(length <= _LONGEST_TEXT, f"it has a name of {length:,} bytes")
        start = self.position
        try:
            return bytes(self._next(length)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.file.damaged(f"a name at byte {start:,} is not text: {quoted(error)}") from None

    def binary(self) -> Reader:
        """A reader of the bytes; this one goes on behind them."""
        return self._inside(self._number("binary"))

    def extension(self, code: int) -> Reader:
        """A reader of the content of an extension of type `code`; this one goes on behind it."""
        length = self._number("extension")
        (found,) = self._next(1)
        expected = f"extension type {code} was expected at byte {self.position:,}"
        self.file.require(found == code, f"{expected}, not {found}")
        return self._inside(length)

    def finish(self) -> None:
        """Raise CheckpointError if there are more values."""
        self._expect("nothing")

    def _number(self, kind: str) -> int:
        """Read the head of a value, which must be of this kind; returns its number (see _HEADS)."""
        self._expect(kind)
        (first,) = self._next(1)
        _, number, width = _HEADS[first]
        return int.from_bytes(self._next(width), "big") if width else number

    def _expect(self, kind: str) -> None:
        found = self.kind()
        self.file.require(found == kind, f"{kind} was expected at byte {self.position:,}, not {found}")

    def _inside(self, length: int) -> Reader:
        """A reader of the next `length` bytes, which this one skips."""
        self._next(length)
        return Reader(self.file, self.position - length, self.position)

    def _next(self, length: int) -> memoryview:
        """The next `length` bytes."""
        start, ends = self.position, length <= self.end - self.position
        self.file.require(ends, f"a value at byte {start:,} does not end before byte {self.end:,}")
        self.position += length
        return self.file.view(start, length)
