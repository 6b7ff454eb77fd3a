"""Turns Metal source into C++ that clang compiles with shim/metal_shim.h.

Only this is rewritten, and the line numbers stay:

- `threadgroup float x[64];` in a kernel becomes a reference to an array of the arena that the runtime checks;
- `0.5` becomes `0.5f`: Metal has no double, and reads a literal without suffix as a float;
- `float4(…)` and `vec<T, 4>(…)` become `msl::make_vector<…>(…)`: C++ has no constructors for clang's vectors;
- MLX's explicit instantiation at the end is dropped. An entry point with its template arguments takes its place: it
  passes each parameter of the kernel a buffer, or the position that its attribute names.

The shim defines the rest: address spaces, vector types, attributes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

FILE = "kernel.metal"  # the name of the source where it has no #line of its own

_POSITIONS = {
    "thread_position_in_grid": "at->in_grid",
    "thread_position_in_threadgroup": "at->in_group",
    "threadgroup_position_in_grid": "at->group_in_grid",
    "threads_per_threadgroup": "at->threads_per_group",
    "dispatch_threads_per_threadgroup": "at->threads_per_group",
    "threadgroups_per_grid": "at->groups_per_grid",
    "threads_per_grid": "at->threads_per_grid",
    "thread_index_in_threadgroup": "&at->index",
    "thread_index_in_simdgroup": "&at->lane",
    "simdgroup_index_in_threadgroup": "&at->simdgroup",
    "simdgroups_per_threadgroup": "&at->simdgroups_per_group",
    "threads_per_simdgroup": "&at->threads_per_simdgroup",
    "thread_execution_width": "&at->threads_per_simdgroup",
}


@dataclass(frozen=True)
class Buffer:
    """A buffer parameter of a kernel."""

    name: str
    space: str  # "device" or "constant"
    writable: bool


@dataclass(frozen=True)
class Lowered:
    """A kernel as C++."""

    cpp: str
    buffers: tuple[Buffer, ...]  # in the order of the parameters
    lines: dict[tuple[str, int], str]  # (file, line) → text, for error messages


def lower(source: str, kernel: str | None = None, template: str | None = None) -> Lowered:
    """Lowers `source`, to run `kernel` of its kernels (default: the only one).

    `template` gives its template arguments, like "<float, 64>"; default: those of MLX's instantiation, if there is one.
    """
    body, instantiated = _drop_instantiation(source)
    clean = blank_comments(body)
    name = kernel or re.search(r"(?:\[\[\s*kernel\s*\]\]|\bkernel)\s+void\s+(\w+)\s*\(", clean)[1]
    parameters = _parameters(clean, name)
    buffers, arguments = [], []
    for i, parameter in enumerate(parameters):
        attribute = re.search(r"\[\[\s*(\w+)", parameter)
        if attribute and attribute[1] in _POSITIONS:
            arguments.append(f"msl::position<F, {i}>({_POSITIONS[attribute[1]]})")
            continue
        buffers.append(_buffer(parameter))
        arguments.append(f"msl::buffer<F, {i}>(buffers[{len(buffers) - 1}])")
    cpp = "\n".join(
        [
            '#include "metal_shim.h"',
            f'#line 1 "{FILE}"',
            _replace(_VECTOR, _lower_constructor, _replace(_DOUBLE, _lower_literal, _lower_threadgroup_arrays(body))),
            '#line 1 "entry point"',
            f"using F = decltype(&{name}{template or instantiated});",
            'extern "C" void msl_entry(void* const* buffers, const msl_position* at) {',
            f"  {name}{template or instantiated}({', '.join(arguments)});",
            "}",
            "",
        ]
    )
    return Lowered(cpp, tuple(buffers), _lines(body))


def blank_comments(source: str, strings: bool = False) -> str:
    """Returns `source` with comments, and strings too if asked, replaced by blanks: offsets and lines stay."""

    def blank(match: re.Match) -> str:
        keep = match[0][0] == '"' and not strings
        return match[0] if keep else re.sub(r"[^\n]", " ", match[0])

    return re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, source, flags=re.S)


def _drop_instantiation(source: str) -> tuple[str, str]:
    end = re.search(r"\n\s*template\s*\[\[host_name.*?decltype\(\w+(<.*>)?\)", source, re.S)
    return (source[: end.start()] + "\n", end[1] or "") if end else (source, "")


def _parameters(clean: str, name: str) -> list[str]:
    start = re.search(rf"\bvoid\s+{name}\s*\(", clean).end()
    depth, parts, begin = 0, [], start
    for i in range(start, len(clean)):
        c = clean[i]
        if c in "([{<":
            depth += 1
        elif c in ")]}>" and depth:
            depth -= 1
        elif c == ")" or c == ",":
            parts.append(clean[begin:i].strip())
            begin = i + 1
            if c == ")":
                return parts
    raise ValueError(f"the parameter list of {name} has no end")


def _buffer(parameter: str) -> Buffer:
    declaration = re.sub(r"\[\[.*?\]\]", "", parameter)
    space = re.search(r"\b(device|constant)\b", declaration)
    if not space:
        raise ValueError(f"kernel parameter is neither a buffer nor a known position: {parameter}")
    pointee = declaration[: declaration.rindex("*" if "*" in declaration else "&")]
    writable = space[1] == "device" and not re.search(r"\bconst\b", pointee)
    return Buffer(re.search(r"(\w+)\s*$", declaration)[1], space[1], writable)


_TYPE = r"[\w:]+(?:<[^;{}()]*?>)?"
_DECLARATOR = r"\w+\s*(?:\[[^\];]+\]\s*)*"
_ARRAYS = re.compile(rf"\bthreadgroup\s+({_TYPE})\s+({_DECLARATOR}(?:,\s*{_DECLARATOR})*);")


def _lower_threadgroup_arrays(source: str) -> str:
    number = itertools.count()

    def lower_declaration(declaration: re.Match) -> str:
        lowered = []
        for declarator in declaration[2].split(","):
            name, dimensions = re.match(r"\s*(\w+)(.*)", " ".join(declarator.split())).groups()
            array = f'msl::threadgroup_array<{declaration[1]}{dimensions}>({next(number)}, "{name}")'
            lowered.append(f"threadgroup {declaration[1]} (&{name}){dimensions} = {array};")
        return " ".join(lowered) + "\n" * declaration[0].count("\n")

    return _replace(_ARRAYS, lower_declaration, source)


_DOUBLE = re.compile(r"(?<![\w.])((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])")
_VECTOR = re.compile(r"\b(?:metal::)?(?:vec\s*<([^<>;]+)>|([a-z]+?)([234]))\s*(?=\()")
_SCALARS = {"float", "half", "bfloat", "int", "uint", "short", "ushort", "char", "uchar", "long", "ulong", "bool"}


def _lower_literal(literal: re.Match) -> str:
    return literal[0] + "f"


def _lower_constructor(call: re.Match) -> str:
    if call[1]:
        return f"msl::make_vector<{call[1]}>"
    return f"msl::make_vector<{call[2]}, {call[3]}>" if call[2] in _SCALARS else call[0]


def _replace(pattern: re.Pattern, replacement: Callable[[re.Match], str], source: str) -> str:
    """`pattern.sub(replacement, source)`, but not in comments and strings."""
    out, at = [], 0
    for match in pattern.finditer(blank_comments(source, strings=True)):
        out += [source[at : match.start()], replacement(match)]
        at = match.end()
    return "".join(out) + source[at:]


def _lines(body: str) -> dict[tuple[str, int], str]:
    lines, file, number = {}, FILE, 1
    for text in body.split("\n"):
        directive = re.match(r'\s*#\s*line\s+(\d+)(?:\s+"([^"]*)")?', text)
        if directive:
            number, file = int(directive[1]), directive[2] or file
            continue
        lines[file, number] = text.strip()
        number += 1
    return lines
