"""Whether the C code runs here, which of its functions are called, and how to do without it."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_ttt.backends.cpu import calls, library

needs_c = pytest.mark.skipif(
    not calls.available(),
    reason="the C code takes Linux, a CPU, OpenBLAS and a compiler" + f" ({library.advice()})" * bool(library.advice()),
)


class Spy:
    """The C code, which notes what is called in it. Says which functions ran between two looks."""

    def __init__(self, code):
        self._code = code
        self._names: list[str] = []

    def __getattr__(self, name: str):
        if name != "mlx_ttt_threads":  # every call asks for it
            self._names.append(name.removeprefix("mlx_ttt_"))
        return getattr(self._code, name)

    def taken(self) -> set[str]:
        """The functions called since the last time."""
        names, self._names = set(self._names), []
        return names


def without_c(monkeypatch, function):
    """What the function returns, evaluated, where everything goes through MLX operations."""
    with monkeypatch.context() as patch:
        patch.setattr(library, "c_code", lambda: None)
        result = function()
        mx.eval(result)
    return result
