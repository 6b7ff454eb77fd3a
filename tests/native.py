"""Whether the C code of mlx_ttt/native runs here: where it does not, its tests have nothing to say."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_ttt import _blas, native

needs_native = pytest.mark.skipif(
    not native.available(),
    reason="the code in C takes Linux, a CPU, OpenBLAS and a compiler" + f" ({_blas.advice()})" * bool(_blas.advice()),
)


class Spy:
    """Counts the calls of the functions in C by name; says which ran between two looks."""

    def __init__(self, monkeypatch):
        self._names: list[str] = []
        call = native.call

        def spy(name, *arguments):
            self._names.append(name.removeprefix("mlx_ttt_"))
            call(name, *arguments)

        monkeypatch.setattr(native, "call", spy)

    def taken(self) -> set[str]:
        """The functions called since the last time."""
        names, self._names = set(self._names), []
        return names


def without_native(monkeypatch, function):
    """What the function returns, evaluated, where all goes through MLX operations."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        result = function()
        mx.eval(result)
    return result
