"""Finds the source line of an address in a kernel's library: reads the DWARF 4 line table of a 64-bit ELF file."""

from __future__ import annotations

import bisect
import struct
from pathlib import Path


class LineTable:
    """The line tables of one library or program."""

    def __init__(self, library: Path):
        self._rows: list[tuple[int, str, int]] = []  # (address, file, line), sorted by address
        section = _section(library.read_bytes(), b".debug_line")
        at = 0
        while at < len(section):
            at = self._add_unit(section, at)
        self._rows.sort(key=lambda row: row[0])
        self._addresses = [row[0] for row in self._rows]

    def find(self, address: int) -> tuple[str, int]:
        """Returns the file and line of the instruction at `address` (relative to the start of the library)."""
        i = bisect.bisect_right(self._addresses, address) - 1
        while i > 0 and self._rows[i][2] == 0:  # line 0: merged from several lines
            i -= 1
        return self._rows[i][1:] if i >= 0 else ("?", 0)

    def _add_unit(self, data: bytes, at: int) -> int:
        length, version, header_length = struct.unpack_from("<IHI", data, at)
        end, program = at + 4 + length, at + 10 + header_length
        if version != 4:  # a unit of a linked library, not the kernel's
            return end
        min_instruction, _, _, line_base, line_range, opcode_base = struct.unpack_from("<BBBbBB", data, at + 10)
        operands = data[at + 16 : at + 16 + opcode_base - 1]
        at += 16 + opcode_base - 1
        while data[at]:  # directories
            at = data.index(b"\0", at) + 1
        at += 1
        files = [""]
        while data[at]:
            stop = data.index(b"\0", at)
            files.append(data[at:stop].decode())
            at = stop + 1
            for _ in range(3):
                _, at = _uleb(data, at)
        self._run(data, program, end, files, (min_instruction, line_base, line_range, opcode_base, operands))
        return end

    def _run(self, data: bytes, at: int, end: int, files: list[str], header: tuple) -> None:
        min_instruction, line_base, line_range, opcode_base, operands = header
        address, file, line = 0, 1, 1
        while at < end:
            opcode = data[at]
            at += 1
            if opcode >= opcode_base:
                address += (opcode - opcode_base) // line_range * min_instruction
                line += line_base + (opcode - opcode_base) % line_range
                self._rows.append((address, files[file], line))
            elif opcode == 0:
                size, at = _uleb(data, at)
                if data[at] == 1:  # end of sequence
                    address, file, line = 0, 1, 1
                elif data[at] == 2:
                    (address,) = struct.unpack_from("<Q", data, at + 1)
                at += size
            elif opcode == 1:
                self._rows.append((address, files[file], line))
            elif opcode == 2:
                step, at = _uleb(data, at)
                address += step * min_instruction
            elif opcode == 3:
                step, at = _sleb(data, at)
                line += step
            elif opcode == 4:
                file, at = _uleb(data, at)
            elif opcode == 8:
                address += (255 - opcode_base) // line_range * min_instruction
            elif opcode == 9:
                address += struct.unpack_from("<H", data, at)[0]
                at += 2
            else:
                for _ in range(operands[opcode - 1]):
                    _, at = _uleb(data, at)


def _section(elf: bytes, wanted: bytes) -> bytes:
    headers, count, names = *struct.unpack_from("<Q", elf, 0x28), *struct.unpack_from("<HH", elf, 0x3C)
    sections = [struct.unpack_from("<IIQQQQ", elf, headers + 64 * i) for i in range(count)]
    strings = sections[names][4]
    for name, _, _, _, offset, size in sections:
        if elf[strings + name : elf.index(b"\0", strings + name)] == wanted:
            return elf[offset : offset + size]
    return b""


def _uleb(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _sleb(data: bytes, at: int) -> tuple[int, int]:
    value, stop = _uleb(data, at)
    bits = 7 * (stop - at)
    return (value - (1 << bits) if value >> (bits - 1) else value), stop
