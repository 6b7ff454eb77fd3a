"""Finds what a C++ compiler accepts and Metal does not.

The rules look at the tokens of a whole Metal source, without comments and strings: what `mx.fast.metal_kernel`
generates, or a .metal file. They follow `#line` directives and look at both branches of preprocessor conditions.

Address spaces and implicit conversions to bfloat need types, so clang checks them: see
`HostKernel.check_address_spaces` and `HostKernel.check_conversions`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .lower import FILE, blank_comments


@dataclass(frozen=True, order=True)
class Finding:
    """One place that Metal would reject."""

    file: str
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text} [{self.rule}]"


@dataclass(frozen=True)
class _Token:
    text: str
    file: str
    line: int
    scope: str = ""  # "program", "struct", "enum", "function", "kernel"
    function: str = ""  # the name of the enclosing function or kernel

    @property
    def is_name(self) -> bool:
        return self.text[0].isalpha() or self.text[0] == "_"


def lint(source: str, file: str = FILE) -> list[Finding]:
    """Returns what Metal would reject in `source`, in the order of its lines."""
    tokens, macros = _tokenize(source, file)
    tokens = list(_with_scopes(tokens))
    findings = [f for rule in _RULES for f in rule(tokens)]
    findings += [f for body in macros for rule in _WORD_RULES for f in rule(body)]
    return sorted(set(findings))


_SPACES = frozenset({"device", "constant", "threadgroup", "thread", "ray_data", "object_data"})
_QUALIFIERS = frozenset({"const", "volatile", "constexpr", "inline", "static", "typename", "METAL_FUNC"}) | _SPACES
_SCALARS = [
    "void",
    "bool",
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "half",
    "float",
    "bfloat",
]
_TYPES = frozenset(
    [
        *_SCALARS,
        *(f"{scalar}{n}" for scalar in _SCALARS for n in (2, 3, 4)),
        *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)),
        *("signed", "unsigned", "size_t", "ptrdiff_t", "auto", "vec", "float16_t", "bfloat16_t"),
        *("simdgroup_matrix", "simdgroup_float8x8", "simdgroup_half8x8", "simdgroup_bfloat8x8"),
    ]
)
_NOT_IN_METAL = {
    "double": "Metal has no double",
    "goto": "Metal has no goto",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "new": "Metal has no dynamic memory",
    "delete": "Metal has no dynamic memory",
    "virtual": "Metal has no virtual functions",
    "dynamic_cast": "Metal has no run-time types",
    "typeid": "Metal has no run-time types",
    "thread_local": "Metal has no thread_local; a local variable is in thread memory",
    "asm": "Metal has no inline assembly",
    "std": "Metal has no namespace std; its library is in namespace metal",
    "concept": "Metal has no C++20",
    "requires": "Metal has no C++20",
    "consteval": "Metal has no C++20",
    "constinit": "Metal has no C++20",
    "co_await": "Metal has no C++20",
    "co_yield": "Metal has no C++20",
    "co_return": "Metal has no C++20",
}
_AFTER_3_1 = {
    "coherent": "3.2",
    "memory_coherence_device": "3.2",
    "memory_coherence_threadgroup": "3.2",
    "atomic_thread_fence": "3.2",
    "os_log": "3.2",
    "os_log_default": "3.2",
    "metal_logging": "3.2",
    "metal_tensor": "4.0",
    "tensor_handle": "4.0",
    "cooperative_tensor": "4.0",
    "mpp": "4.0",
}


def _finding(token: _Token, rule: str, text: str) -> Finding:
    return Finding(token.file, token.line, rule, text)


def _words_that_metal_lacks(tokens: Sequence[_Token]) -> Iterator[Finding]:
    for i, token in enumerate(tokens):
        deleted = token.text == "delete" and i and tokens[i - 1].text == "="  # f() = delete
        if token.text in _NOT_IN_METAL and not deleted:
            yield _finding(token, "not-in-metal", f"`{token.text}`: {_NOT_IN_METAL[token.text]}")
        elif token.text == "long" and i + 1 < len(tokens) and tokens[i + 1].text in ("long", "double"):
            yield _finding(token, "not-in-metal", f"`long {tokens[i + 1].text}`: Metal's widest integer is long")
        elif re.fullmatch(r"[\d.]+(e[+-]?\d+)?l", token.text, re.I) and not token.text.lower().strip("l").isdigit():
            yield _finding(token, "not-in-metal", f"`{token.text}`: Metal has no long double")


def _words_after_metal_3_1(tokens: Sequence[_Token]) -> Iterator[Finding]:
    for token in tokens:
        if token.text in _AFTER_3_1:
            since = _AFTER_3_1[token.text]
            yield _finding(token, "after-metal-3.1", f"`{token.text}` needs Metal {since}; macOS 14 has 3.1")


def _lambdas(tokens: Sequence[_Token]) -> Iterator[Finding]:
    for i, token in enumerate(tokens):
        if token.text != "[" or not i or (tokens[i - 1].is_name and tokens[i - 1].text != "return"):
            continue
        if tokens[i - 1].text in (")", "]", ">"):
            continue
        end = _closing(tokens, i)
        if end + 1 < len(tokens) and tokens[end + 1].text in ("(", "{"):
            yield _finding(token, "lambda", "Metal has no lambdas before version 4")


def _types_of(tokens: Sequence[_Token]) -> set[str]:
    """Every name that the source makes a type."""
    names = set(_TYPES)
    for before, token in itertools.pairwise(tokens):
        if before.text in ("struct", "class", "typename", "using", "enum") and token.is_name:
            names.add(token.text)
    for i, token in enumerate(tokens):
        if token.text == "typedef":
            end = next(j for j in range(i, len(tokens)) if tokens[j].text == ";")
            names.add(next(t.text for t in reversed(tokens[i:end]) if t.is_name))
    return names - {"metal"}


def _pointers_without_space(tokens: Sequence[_Token]) -> Iterator[Finding]:
    types = _types_of(tokens)
    for i, token in enumerate(tokens):
        if token.text not in types or (i and tokens[i - 1].text in (".", "->", "struct", "class", "using", "typename")):
            continue
        at, spaces = i + 1, {t.text for t in _specifiers_before(tokens, i)} & _SPACES
        if at < len(tokens) and tokens[at].text == "<":
            at = _closing(tokens, at) + 1
        while at < len(tokens) and tokens[at].text in _QUALIFIERS:
            spaces |= {tokens[at].text} & _SPACES
            at += 1
        # `float (&x)[8]`, but not the conversion `float(*x)`
        after = [t.text for t in tokens[at : at + 5]]
        array = len(after) == 5 and after[0] + after[3] == "()" and after[4] in ("[", "(")
        sign = tokens[at + array].text if at + array < len(tokens) else ""
        if sign in ("*", "&", "&&") and not spaces:
            kind = "pointer" if sign == "*" else "reference"
            yield _finding(
                token, "no-address-space", f"{kind} to `{token.text}` without device, threadgroup, constant or thread"
            )


def _specifiers_before(tokens: Sequence[_Token], i: int) -> Iterator[_Token]:
    while i and (tokens[i - 1].text in _QUALIFIERS or tokens[i - 1].text in ("::", "metal", "unsigned", "signed")):
        i -= 1
        yield tokens[i]


def _c_style_casts(tokens: Sequence[_Token]) -> Iterator[Finding]:
    for i, token in enumerate(tokens):
        if token.text != "(" or (
            i and ((tokens[i - 1].is_name and tokens[i - 1].text != "return") or tokens[i - 1].text in (">", ")", "]"))
        ):
            continue
        end = _closing(tokens, i)
        inside = [t.text for t in tokens[i + 1 : end]]
        follows = tokens[end + 1] if end + 1 < len(tokens) else None
        if (
            inside
            and inside[-1] in ("*", "&")
            and _SPACES & set(inside)
            and follows
            and (follows.is_name or follows.text in ("(", "&"))
        ):
            yield _finding(
                token, "pointer-cast", f"`({' '.join(inside)})` hides a change of address space; use reinterpret_cast"
            )


def _variables_out_of_place(tokens: Sequence[_Token]) -> Iterator[Finding]:
    for statement in _statements(tokens):
        words = [t.text for t in statement]
        first = statement[0]
        declared = words[: words.index("=")] if "=" in words else words
        is_pointer = "*" in declared or "&" in declared
        is_variable = (
            "(" not in declared and ")" not in declared and len([w for w in declared if w not in _QUALIFIERS]) >= 2
        )
        if first.scope == "function" and words[0] == "threadgroup" and not is_pointer and is_variable:
            yield _finding(
                first, "threadgroup-variable", "a threadgroup variable may be declared only in a kernel's own body"
            )
        if (
            first.scope in ("function", "kernel")
            and words[0] == "static"
            and not {"constant", "constexpr"} & set(words)
        ):
            yield _finding(first, "static-variable", "Metal has no static variables that can change")
        outside = first.scope == "program" or (first.scope == "struct" and "static" in words)
        if outside and is_variable and not _NO_VARIABLE & set(words) and "constant" not in words:
            yield _finding(
                first, "program-variable", "a variable outside functions must be in constant memory: add `constant`"
            )


_NO_VARIABLE = frozenset(
    {"using", "typedef", "struct", "class", "enum", "namespace", "template", "friend", "static_assert", "union"}
)


def _statements(tokens: Sequence[_Token]) -> Iterator[list[_Token]]:
    """Runs of tokens of one scope, up to a semicolon or an initializer's brace."""
    run: list[_Token] = []
    for token in tokens:
        if token.text in (";", "{", "}"):
            if run and (token.text == ";" or (token.text == "{" and run[-1].text == "=")):
                yield run
            run = []
        else:
            run.append(token)


def _recursion(tokens: Sequence[_Token]) -> Iterator[Finding]:
    bodies = [t.function for before, t in itertools.pairwise(tokens) if t.function != before.function]
    defined = {name for name in bodies if bodies.count(name) == 1}  # tokens do not say which overload is called
    calls: dict[str, dict[str, _Token]] = {}
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token.function and token.text in defined and after.text == "(" and before.text not in ("::", ".", "->"):
            calls.setdefault(token.function, {}).setdefault(token.text, token)
    for function in calls:
        reached, frontier = set(), [function]
        while frontier:
            for callee in calls.get(frontier.pop(), {}):
                if callee not in reached:
                    reached.add(callee)
                    frontier.append(callee)
        if function in reached:
            token = next(iter(calls[function].values()))
            yield _finding(token, "recursion", f"`{function}` comes back to itself; Metal has no recursion")


_WORD_RULES = (_words_that_metal_lacks, _words_after_metal_3_1)
_RULES = (*_WORD_RULES, _lambdas, _pointers_without_space, _c_style_casts, _variables_out_of_place, _recursion)


def _tokenize(source: str, file: str) -> tuple[list[_Token], list[list[_Token]]]:
    """The tokens outside preprocessor lines, and the bodies of macros. Of attributes, only `[[kernel]]` is kept."""
    tokens: list[_Token] = []
    bodies: list[list[_Token]] = []
    words: dict[str, list[str]] = {}  # of macros without parameters, which are replaced
    line, lines = 1, iter(blank_comments(source).split("\n"))
    for text in lines:
        place = line
        line += 1
        if re.match(r"\s*#", text):
            while text.endswith("\\"):
                text = text[:-1] + next(lines, "")
                line += 1
            directive = re.match(r'\s*#\s*line\s+(\d+)(?:\s+"([^"]*)")?', text)
            if directive:
                line, file = int(directive[1]), directive[2] or file
            macro = re.match(r"\s*#\s*define\s+(\w+)(\([^)]*\))?(.*)", text)
            if macro:
                bodies.append(list(_split(macro[3], file, place)))
                if not macro[2]:
                    words.setdefault(macro[1], [token.text for token in bodies[-1]])
            continue
        text = re.sub(r"\[\[\s*kernel\b[^\]]*\]\]", "kernel", text)
        for token in _split(text, file, place):
            tokens += [_Token(word, file, place) for word in words.get(token.text, [token.text])]
    return _without_attributes(tokens), bodies


def _split(text: str, file: str, line: int) -> Iterator[_Token]:
    for match in re.finditer(r'"[^"]*"|\'[^\']*\'|\.?\d(?:[eE][+-]|[\w.])*|[A-Za-z_]\w*|::|->|&&|\|\||[^\s\w]', text):
        yield _Token(match[0], file, line)


def _without_attributes(tokens: list[_Token]) -> list[_Token]:
    kept: list[_Token] = []
    i = 0
    while i < len(tokens):
        if tokens[i].text == "[" and i + 1 < len(tokens) and tokens[i + 1].text == "[":
            i = _closing(tokens, i) + 1
        else:
            kept.append(tokens[i])
            i += 1
    return kept


def _closing(tokens: Sequence[_Token], i: int) -> int:
    """The index of the bracket that closes the one at `i`; `i` itself if that is a less-than sign."""
    opening = tokens[i].text
    closing = {"(": ")", "[": "]", "{": "}", "<": ">"}[opening]
    depth = 0
    for j in range(i, len(tokens)):
        depth += (tokens[j].text == opening) - (tokens[j].text == closing)
        if not depth:
            return j
        if opening == "<" and tokens[j].text in (";", "{", "}"):
            break
    return i if opening == "<" else len(tokens) - 1


def _with_scopes(tokens: Sequence[_Token]) -> Iterator[_Token]:
    """The same tokens, each with the scope and function that it is in."""
    scopes, header = [("program", "")], []
    for token in tokens:
        if token.text == "}" and len(scopes) > 1:
            scopes.pop()
        yield _Token(token.text, token.file, token.line, *scopes[-1])
        if token.text == "{":
            scopes.append(_scope_of(header, scopes[-1]))
        if token.text in ("{", "}", ";"):
            header = []
        else:
            header.append(token)


def _scope_of(header: Sequence[_Token], outer: tuple[str, str]) -> tuple[str, str]:
    if outer[0] in ("function", "kernel", "enum"):
        return outer
    header = _outside_brackets(header)
    words = [t.text for t in header]
    if "namespace" in words:
        return ("program", "")
    if "enum" in words:
        return ("enum", "")
    if {"struct", "class", "union"} & set(words) and "(" not in words:
        return ("struct", "")
    if "=" in words and "operator" not in words:
        return outer
    if "(" in words:
        name = next((a.text for a, b in itertools.pairwise(header) if b.text == "(" and a.is_name), "")
        return ("kernel" if "kernel" in words else "function", name)
    return outer


def _outside_brackets(header: Sequence[_Token]) -> list[_Token]:
    """A declaration without template parameters and without what is inside parentheses."""
    kept: list[_Token] = []
    i = 0
    while i < len(header):
        if header[i].text == "(" or (header[i].text == "<" and kept and kept[-1].text == "template"):
            kept.append(header[i])
            i = _closing(header, i)
        kept.append(header[i])
        i += 1
    return kept
