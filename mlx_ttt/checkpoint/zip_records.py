"""The records of a zip file that stores them uncompressed, as PyTorch's archives do.

Layout: APPNOTE.TXT of PKWARE, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end,
with zip64). Everything the file says about itself is checked against its size.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from ..errors import CheckpointError
from .mapped import MappedFile
from .untrusted import quoted

_LARGEST_DIRECTORY = 16 << 20  # bytes: some hundred thousand records
_CHUNK = 16 << 20
_UNKNOWN_32 = 0xFFFFFFFF  # the value is in the zip64 extra field


@dataclass(frozen=True)
class Record:
    name: str
    header: int  # byte position of the local header
    size: int
    crc: int


class ZipRecords:
    """The records of a zip file, by name.

    Raises:
        CheckpointError: the file is truncated or damaged, or a record is compressed or encrypted.
    """

    def __init__(self, file: MappedFile):
        self.file = file
        self._verified: set[str] = set()
        self._records: dict[str, Record] = {}
        start, length = self._directory()
        directory = bytes(file.view(start, length))
        position = 0
        while position < length:
            record, position = self._entry(directory, position)
            if record.name in self._records:
                raise file.damaged(f"record {quoted(record.name)} occurs twice")
            self._records[record.name] = record

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __iter__(self):
        return iter(self._records)

    def locate(self, name: str) -> tuple[int, int]:
        """Position of a record's first byte and its size in bytes."""
        record = self._records[name]
        header = self._unpack("<4s5H3I2H", record.header, 30)
        signature, _, flags, method, *_, name_length, extra_length = header
        stored_name = bytes(self.file.view(record.header + 30, name_length))
        if signature != b"PK\3\4" or method or flags & 1 or stored_name != name.encode():
            raise self.file.damaged(f"the header of record {quoted(name)} is wrong")
        start = record.header + 30 + name_length + extra_length
        self.file.view(start, record.size)  # raises when the file ends before the record does
        return start, record.size

    def verify(self, name: str) -> None:
        """Compare a record with its checksum, once. PyTorch writes zero when told not to compute any."""
        crc = self._records[name].crc
        if name in self._verified or crc == 0:
            return
        start, size = self.locate(name)
        actual = 0
        for chunk in range(start, start + size, _CHUNK):
            length = min(_CHUNK, start + size - chunk)
            actual = zlib.crc32(self.file.view(chunk, length), actual)
            self.file.forget(chunk, length)
        if actual != crc:
            raise self.file.damaged(f"record {quoted(name)} does not match its checksum")
        self._verified.add(name)

    def read(self, name: str, longest: int) -> bytes:
        """A small record, verified.

        Raises:
            CheckpointError: it is damaged or has more than `longest` bytes.
        """
        start, size = self.locate(name)
        if size > longest:
            raise CheckpointError(f"{self.file.path}: record {quoted(name)} has {size:,} bytes, more than {longest:,}")
        self.verify(name)
        return bytes(self.file.view(start, size))

    def _unpack(self, layout: str, start: int, length: int) -> tuple:
        return struct.unpack(layout, self.file.view(start, length))

    def _directory(self) -> tuple[int, int]:
        """Position and length of the central directory."""
        file = self.file
        tail_start = max(0, file.size - 22 - 0xFFFF)
        tail = bytes(file.view(tail_start, file.size - tail_start))
        end = tail_start + tail.rfind(b"PK\5\6")
        if end < tail_start or end + 22 > file.size:
            raise file.damaged("no zip directory at its end")
        (_, _, _, _, _, length, start, comment_length) = self._unpack("<4s4H2IH", end, 22)
        if end + 22 + comment_length != file.size:
            raise file.damaged("bytes after its zip directory")
        if end >= 20 and bytes(file.view(end - 20, 4)) == b"PK\6\7":
            (_, _, end, _) = self._unpack("<4sIQI", end - 20, 20)
            (signature, *_, length, start) = self._unpack("<4sQ2H2I4Q", end, 56)
            if signature != b"PK\6\6":
                raise file.damaged("its zip64 directory is wrong")
        if start + length != end or length > _LARGEST_DIRECTORY:
            raise file.damaged("its zip directory is not where it should be")
        return start, length

    def _entry(self, directory: bytes, position: int) -> tuple[Record, int]:
        """The entry of the central directory at `position`, and the position of the next one."""
        fixed_end = position + 46
        if fixed_end > len(directory) or directory[position : position + 4] != b"PK\1\2":
            raise self.file.damaged("its zip directory is cut off")
        (flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length) = struct.unpack(
            "<4H3I3H", directory[position + 8 : position + 34]
        )
        (header,) = struct.unpack("<I", directory[position + 42 : fixed_end])
        name_end = fixed_end + name_length
        extra = directory[name_end : name_end + extra_length]
        next_position = name_end + extra_length + comment_length
        try:
            name = directory[fixed_end:name_end].decode("utf-8")
        except UnicodeDecodeError:
            raise self.file.damaged("a record's name is not UTF-8") from None
        if next_position > len(directory):
            raise self.file.damaged("its zip directory is cut off")
        if method or flags & 1:
            kind = "compressed" if method else "encrypted"
            raise CheckpointError(
                f"{self.file.path}: record {quoted(name)} is {kind}, which torch.save never does: save it again"
            )
        size, packed, header = self._zip64(extra, [size, packed, header])
        if packed != size:
            raise self.file.damaged(f"record {quoted(name)} has two sizes")
        return Record(name, header, size, crc), next_position

    def _zip64(self, extra: bytes, values: list[int]) -> list[int]:
        """Replace the values that do not fit 32 bits by those of the zip64 extra field (id 1), in its order."""
        wide = iter(())
        while len(extra) >= 4:
            kind, length = struct.unpack("<2H", extra[:4])
            if kind == 1 and length <= len(extra) - 4:
                wide = iter(struct.unpack(f"<{length // 8}Q", extra[4 : 4 + length // 8 * 8]))
            extra = extra[4 + length :]
        try:
            return [next(wide) if value == _UNKNOWN_32 else value for value in values]
        except StopIteration:
            raise self.file.damaged("a record lacks its 64-bit size") from None
