"""MessagePack in a file, read one value after another; byte strings stay where they are.

The caller says what comes next, and anything else is an error. So nothing in a file decides how much memory is taken,
or how deep a structure goes.
"""

from __future__ import annotations

from .mapped import MappedFile
from .untrusted import quoted

_LONGEST_TEXT = 1024  # bytes

# What a value's first byte says: its kind, a number, and how many more bytes the number has when it is not there yet.
# The number is an integer itself, or how many members an array or a map has, or bytes a text, binary or extension.
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

    Each method that is named after a kind takes one value of it, and raises CheckpointError when there is another one,
    or none, or when it does not end in time.
    """

    def __init__(self, file: MappedFile, start: int, end: int):
        self.file, self.position, self.end = file, start, end

    def kind(self) -> str:
        """What comes next; "nothing" at the end."""
        if self.position == self.end:
            return "nothing"
        return _HEADS.get(self.file.view(self.position, 1)[0], ("something else",))[0]

    def array(self) -> int:
        """The number of members, which follow."""
        return self._number("array")

    def map(self) -> int:
        """The number of keys, which follow, each with its value."""
        return self._number("map")

    def integer(self) -> int:
        """A number that is not negative."""
        return self._number("integer")

    def boolean(self) -> bool:
        return bool(self._number("boolean"))

    def text(self) -> str:
        length = self._number("text")
        if length > _LONGEST_TEXT:
            raise self.file.damaged(f"it has a name of {length:,} bytes")
        start = self._pass(length)
        try:
            return bytes(self.file.view(start, length)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.file.damaged(f"a name at byte {start:,} is not text: {quoted(error)}") from None

    def binary(self) -> Reader:
        """A reader of the bytes, which are passed over."""
        return self._inside(self._number("binary"))

    def extension(self, code: int) -> Reader:
        """A reader of what is inside a value of the application's own type `code`."""
        length = self._number("extension")
        found = self.file.view(self._pass(1), 1)[0]
        if found != code:
            raise self.file.damaged(f"extension type {code} was expected at byte {self.position:,}, not {found}")
        return self._inside(length)

    def finish(self) -> None:
        """Raises CheckpointError if more follows."""
        if self.position != self.end:
            raise self.file.damaged(f"nothing was expected at byte {self.position:,}, not {self.kind()}")

    def _number(self, kind: str) -> int:
        """The number in the head of a value, which must be of this kind."""
        if (found := self.kind()) != kind:
            raise self.file.damaged(f"{kind} was expected at byte {self.position:,}, not {found}")
        _, number, width = _HEADS[self.file.view(self._pass(1), 1)[0]]
        return int.from_bytes(self.file.view(self._pass(width), width), "big") if width else number

    def _inside(self, length: int) -> Reader:
        start = self._pass(length)
        return Reader(self.file, start, self.position)

    def _pass(self, length: int) -> int:
        """Go on by `length` bytes; returns where they start."""
        start = self.position
        if length > self.end - start:
            raise self.file.damaged(f"a value at byte {start:,} does not end before byte {self.end:,}")
        self.position += length
        return start
