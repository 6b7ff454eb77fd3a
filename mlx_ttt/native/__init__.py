"""Functions in C for a Linux CPU: many tokens at once, in all threads. See `_blas.py` for how they are compiled.

MLX's own CPU operations are one thread each and, in its Linux wheels, hardly vectorized. There is no way into MLX's
graph for a function in C, so these are computed when they are called, and what they read with them. That suits a
prompt; a single token goes through the whole network in one call (see one_token.py), or through MLX operations.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import _blas
from ..differentiable import differentiable

FEWEST = 16  # tokens that are worth a call
LANES = 8  # of native.h
LARGEST_MINI_BATCH = 1 << 14  # tokens, for which a thread's stack has room


def available() -> bool:
    """Whether this is a CPU, and the code is there."""
    return _blas.native() is not None and mx.default_device() == mx.cpu


def worthwhile(tokens: int) -> bool:
    """Whether so many tokens are to be read in C, where what they are made of is in MLX operations."""
    return tokens >= FEWEST and available()


def either(whether: bool, in_c: Callable, operations: Callable, *arrays: mx.array | None) -> mx.array:
    """operations(*arrays), one array; made by the function in C where that is worthwhile and the arrays have the shapes
    that it takes them to have. See `at_once`."""
    if not whether:
        return operations(*arrays)
    dtype = mx.result_type(*arrays)
    return at_once(lambda *a: [in_c(*a)], lambda *a: [operations(*a)], *arrays, dtype=dtype)[0]


def at_once(function: Callable, operations: Callable, *arrays: mx.array, dtype: mx.Dtype) -> Sequence[mx.array]:
    """What `function` makes of the arrays' values, now; by the same in MLX operations inside transformations.

    Args:
        function: NumPy arrays, contiguous float32, -> a list of NumPy arrays.
        operations: the same of MLX arrays; differentiated instead of it.
        dtype: of the first array returned; the others are float32.
    """

    def by_function(*arrays):
        first, *others = map(mx.array, function(*map(values, arrays)))
        return [first.astype(dtype), *others]

    return differentiable(by_function, operations)(*arrays) if have_values(arrays) else operations(*arrays)


def have_values(arrays) -> bool:
    """Whether these arrays have values, which are computed if they do: inside mx.compile or mx.vmap nothing has any."""
    try:
        mx.eval(arrays)
    except ValueError:
        return False
    return True


def traced(arrays) -> bool:
    """Whether one of these arrays is part of a transformation, so that nothing that is made of it may be lost."""
    if not have_values(arrays):
        return True
    graph = io.StringIO()
    mx.export_to_dot(graph, *(array for _, array in tree_flatten(arrays)))
    return "label" in graph.getvalue()  # evaluated arrays forget what made them, unless a gradient is to be taken


def values(x: mx.array) -> np.ndarray:
    """What is in an array, without a copy where it is contiguous float32."""
    x = x if x.dtype == mx.float32 else x.astype(mx.float32)
    return np.ascontiguousarray(memoryview(x))


def call(name: str, *arguments) -> None:
    """Call a function of the library: arrays by address, numbers, and the number of threads as the last argument."""
    library = _blas.native()
    function = getattr(library, name)
    function.restype = None
    function(*map(_argument, arguments), ctypes.c_int(library.mlx_ttt_threads()))


def _argument(x):
    if isinstance(x, np.ndarray):
        return ctypes.c_void_p(x.ctypes.data)
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_size_t(x) if isinstance(x, int) else x
