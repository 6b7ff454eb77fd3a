"""The records of a zip file that are stored without compression, as in PyTorch's archives.

Layout: APPNOTE.TXT of PKWARE, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end,
with zip64). All positions and sizes in the file are checked.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import CheckpointError
from .mapped import MappedFile
from .untrusted import quoted

_LARGEST_DIRECTORY = 16 << 20  # bytes: some hundred thousand records
_CHUNK = 16 << 20
_IN_ZIP64_FIELD = 0xFFFFFFFF  # instead of a value that is in the zip64 extra field


@dataclass
class Record:
    """A record of a zip file, as the file's directory describes it."""

    file: MappedFile
    name: str
    header: int  # byte position of the local header
    size: int
    crc: int
    verified: bool = False

    def start(self) -> int:
        """The position of its first byte."""
        signature, _, flags, method, *_, name_length, extra_length = _unpack(self.file, "<4s5H3I2H", self.header)
        stored_name = bytes(self.file.view(self.header + 30, name_length))
        agrees = signature == b"PK\3\4" and not method and not flags & 1 and stored_name == self.name.encode()
        self.file.require(agrees, f"the header of record {quoted(self.name)} is wrong")
        start = self.header + 30 + name_length + extra_length
        self.file.view(start, self.size)  # raises when the file ends before the record does
        return start

    def verify(self) -> None:
        """Compare it with its checksum, the first time. PyTorch can be told to write 0 instead of checksums."""
        if self.verified or self.crc == 0:
            return
        start, actual = self.start(), 0
        for chunk in range(start, start + self.size, _CHUNK):
            length = min(_CHUNK, start + self.size - chunk)
            actual = zlib.crc32(self.file.view(chunk, length), actual)
            self.file.forget(chunk, length)
        self.file.require(actual == self.crc, f"record {quoted(self.name)} does not match its checksum")
        self.verified = True

    def content(self, longest: int) -> bytes:
        """The content of a small record, compared with its checksum.

        Raises:
            CheckpointError: it is damaged or has more than `longest` bytes.
        """
        start = self.start()
        if self.size > longest:
            what = f"record {quoted(self.name)} has {self.size:,} bytes"
            raise CheckpointError(f"{self.file.path}: {what}, more than {longest:,}")
        self.verify()
        return bytes(self.file.view(start, self.size))


def zip_records(file: MappedFile) -> dict[str, Record]:
    """The records of a zip file, by name.

    Raises:
        CheckpointError: the file is truncated or damaged, or a record is compressed or encrypted.
    """
    start, length = _directory(file)
    directory = bytes(file.view(start, length))
    records: dict[str, Record] = {}
    position = 0
    while position < length:
        record, position = _entry(file, directory, position)
        file.require(record.name not in records, f"record {quoted(record.name)} occurs twice")
        records[record.name] = record
    return records


def _unpack(file: MappedFile, layout: str, start: int) -> tuple:
    return struct.unpack(layout, file.view(start, struct.calcsize(layout)))


def _directory(file: MappedFile) -> tuple[int, int]:
    """The position and length of the central directory."""
    tail_start = max(0, file.size - 22 - 0xFFFF)
    tail = bytes(file.view(tail_start, file.size - tail_start))
    end = tail_start + tail.rfind(b"PK\5\6")
    file.require(tail_start <= end <= file.size - 22, "no zip directory at its end")
    *_, length, start, comment_length = _unpack(file, "<4s4H2IH", end)
    file.require(end + 22 + comment_length == file.size, "bytes after its zip directory")
    if end >= 20 and bytes(file.view(end - 20, 4)) == b"PK\6\7":
        _, _, end, _ = _unpack(file, "<4sIQI", end - 20)
        signature, *_, length, start = _unpack(file, "<4sQ2H2I4Q", end)
        file.require(signature == b"PK\6\6", "its zip64 directory is wrong")
    in_place = start + length == end and length <= _LARGEST_DIRECTORY
    file.require(in_place, "its zip directory is not where it should be")
    return start, length


def _entry(file: MappedFile, directory: bytes, position: int) -> tuple[Record, int]:
    """The entry of the central directory at `position`, and the position of the next one."""
    name_start = position + 46
    is_entry = name_start <= len(directory) and directory[position : position + 4] == b"PK\1\2"
    file.require(is_entry, "its zip directory is cut off")
    flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length, *_, header = struct.unpack(
        "<4H3I5H2I", directory[position + 8 : name_start]
    )
    name_end = name_start + name_length
    extra = directory[name_end : name_end + extra_length]
    next_position = name_end + extra_length + comment_length
    try:
        name = directory[name_start:name_end].decode("utf-8")
    except UnicodeDecodeError:
        raise file.damaged("a record's name is not UTF-8") from None
    file.require(next_position <= len(directory), "its zip directory is cut off")
    if method or flags & 1:
        what = f"record {quoted(name)} is {'compressed' if method else 'encrypted'}"
        raise CheckpointError(f"{file.path}: {what}, which torch.save never does: save it again")
    size, packed, header = _zip64(file, extra, [size, packed, header])
    file.require(packed == size, f"record {quoted(name)} has two sizes")
    return Record(file, name, header, size, crc), next_position


def _zip64(file: MappedFile, extra: bytes, values: list[int]) -> list[int]:
    """Replace values that do not fit 32 bits by those of the zip64 extra field (id 1), which are in order."""
    wide: Iterator[int] = iter(())
    while len(extra) >= 4:
        kind, length = struct.unpack("<2H", extra[:4])
        if kind == 1 and length <= len(extra) - 4:
            wide = iter(struct.unpack(f"<{length // 8}Q", extra[4 : 4 + length // 8 * 8]))
        extra = extra[4 + length :]
    try:
        return [next(wide) if value == _IN_ZIP64_FIELD else value for value in values]
    except StopIteration:
        raise file.damaged("a record lacks its 64-bit size") from None
