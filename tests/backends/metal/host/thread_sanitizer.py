"""A second opinion on races: clang's own ThreadSanitizer.

The harness finds races by itself, from barriers; `DataRace` does not depend on this. ThreadSanitizer does not know
simdgroups, `mem_flags` or threadgroups, and may miss a race, but it is independent of the harness. It needs a program
of its own. Its first use on a machine compiles its library, which takes minutes.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable, Sequence

import numpy as np

from . import toolchain
from .debug_lines import LineTable
from .errors import KernelError
from .lower import Buffer, Lowered

_REPORT = re.compile(r"WARNING: ThreadSanitizer: data race.*?\n={18}", re.S)
_STACK = re.compile(r"(Write|Read|Previous write|Previous read) of size.*?\n\n", re.S)
_FRAME = re.compile(r"\+0x([0-9a-f]+)\)")


def race_reports(
    lowered: Lowered,
    buffers: Sequence[tuple[Buffer, np.ndarray, bool]],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    seed: int,
    where: Callable[[tuple[str, int]], str],
) -> list[str]:
    """Runs one dispatch under ThreadSanitizer, and returns its reports, one line each, without repetitions.

    `buffers` has each buffer with its array and whether its contents are known to the kernel; `where` words a line.
    """
    program = toolchain.compile_thread_sanitizer(lowered.cpp)
    data = [struct.pack("<8I", len(buffers), *grid, *threadgroup, seed)]
    for buffer, array, initialised in buffers:
        name = buffer.name.encode()
        data += [struct.pack("<4I", len(name), array.nbytes, buffer.writable, initialised), name, array.tobytes()]
    environment = {"TSAN_OPTIONS": "symbolize=0:exitcode=0:report_bugs=1"}
    done = subprocess.run([str(program)], input=b"".join(data), capture_output=True, env=environment)
    text = done.stderr.decode(errors="replace")
    if done.returncode:
        raise KernelError(f"under ThreadSanitizer the kernel ended with status {done.returncode}: {text[-300:]}")
    lines = LineTable(program)
    found = {}
    for report in _REPORT.findall(text):
        sides = [
            f"{side[1].lower()} at {where(_in_kernel(side[0], lines, lowered))}" for side in _STACK.finditer(report)
        ]
        found[" and ".join(sides)] = None
    return list(found)


def _in_kernel(stack: str, lines: LineTable, lowered: Lowered) -> tuple[str, int]:
    """The innermost line of a stack that is the kernel's, not the shim's."""
    places = [lines.find(int(address, 16) - 1) for address in _FRAME.findall(stack)]
    return next((place for place in places if place in lowered.lines), ("?", 0))
