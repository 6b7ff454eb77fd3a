"""From MLX arrays to the functions in C and back.

MLX's own CPU operations use one thread each and, in its Linux wheels, hardly any vector instructions. A function in C
cannot become a node of MLX's lazy graph. So it is computed when it is called, and its inputs with it. That suits a
prompt. A single token goes through the whole network in one call (decode_step.py), or through MLX operations.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ...network.backend import is_differentiated_once
from ..differentiable import Arrays, differentiable
from . import library

FEWEST = 16  # tokens that are worth a call
LANES = 8  # of c/vectors.h: in C, head_dim and other sizes are multiples of it
LARGEST_MINI_BATCH = 1 << 14  # tokens, for which a thread's stack has room


def available() -> bool:
    """Whether this is a CPU, and the code is there."""
    return library.c_code() is not None and mx.default_device() == mx.cpu


def worthwhile(tokens: int) -> bool:
    """Whether so many tokens are to be read in C, where what they are made of is in MLX operations."""
    return tokens >= FEWEST and available()


def at_once(
    function: Callable,
    operations: Callable,
    *arrays: mx.array,
    dtypes: Sequence[mx.Dtype],
    backward: Callable | None = None,
) -> Sequence[mx.array]:
    """What `function` makes of the arrays' values, now; by the same in MLX operations inside transformations.

    Args:
        function: NumPy arrays, contiguous float32, -> a list of NumPy arrays.
        operations: the same of MLX arrays.
        dtypes: of the arrays returned.
        backward: NumPy arrays and the cotangents of what `function` makes of them -> the cotangents of the arrays.
            Without it, and for second derivatives, MLX differentiates the operations.
    """

    def by_function(*arrays: mx.array) -> list[mx.array]:
        return _arrays(function, arrays, dtypes)

    def gradient(inputs: Arrays, cotangents: Arrays) -> Arrays:
        if backward is None:
            return NotImplemented
        both, own_dtypes = [*inputs, *cotangents], [x.dtype for x in inputs]
        if is_differentiated_once() and have_values(both):
            return _arrays(backward, both, own_dtypes)

        def by_operations(*both: mx.array) -> list[mx.array]:
            return mx.vjp(operations, list(both[: len(inputs)]), list(both[len(inputs) :]))[1]

        return at_once(backward, by_operations, *both, dtypes=own_dtypes)

    return differentiable(by_function, operations, gradient)(*arrays) if have_values(arrays) else operations(*arrays)


def _arrays(function: Callable, arrays: Arrays, dtypes: Sequence[mx.Dtype]) -> list[mx.array]:
    return [mx.array(x).astype(dtype) for x, dtype in zip(function(*map(values, arrays)), dtypes, strict=True)]


def have_values(arrays: Any) -> bool:
    """Whether these arrays have values, which are computed if they do: inside mx.compile or mx.vmap nothing has any."""
    try:
        mx.eval(arrays)
    except ValueError:
        return False
    return True


def traced(arrays: Any) -> bool:
    """Whether one of these arrays is part of a transformation, so that nothing that is made of it may be lost."""
    if not have_values(arrays):
        return True
    graph = io.StringIO()
    mx.export_to_dot(graph, *dict(tree_flatten(arrays)).values())
    return "label" in graph.getvalue()  # evaluated arrays forget what made them, unless a gradient is to be taken


def values(x: mx.array) -> np.ndarray:
    """What is in an array, without a copy where it is contiguous float32."""
    x = x if x.dtype == mx.float32 else x.astype(mx.float32)
    return np.ascontiguousarray(memoryview(x))  # type: ignore[arg-type]


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library: arrays by address, numbers, and the number of threads as the last argument."""
    code = library.c_code()
    assert code is not None, "asked for by `available`"
    function = getattr(code, name)
    function.restype = None
    function(*map(_argument, arguments), ctypes.c_int(code.mlx_ttt_threads()))


class _Rows(ctypes.Structure):
    """struct rows of c/operations.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_size_t) for name in ("count", "width")),
    ]


def rows(x: np.ndarray, y: np.ndarray, width: int) -> Any:
    """x and y as rows of `width` numbers, as many as y has: the first argument of the functions in c/operations.c."""
    return ctypes.byref(_Rows(x.ctypes.data, y.ctypes.data, y.size // width, width))


def _argument(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return ctypes.c_void_p(x.ctypes.data)
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_size_t(x) if isinstance(x, int) else x
