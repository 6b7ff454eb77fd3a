"""A tensor that is still in its file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .mapped import MappedFile


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype are known; the values are read on demand, so that a checkpoint is a dict of these.

    `read()` returns a new array of this shape and dtype and keeps nothing; it raises CheckpointError when the file
    turns out to be damaged there.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array] = field(repr=False)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size

    def transposed(self, axes: tuple[int, ...]) -> Tensor:
        """The same values with the axes in another order."""
        return Tensor(tuple(self.shape[axis] for axis in axes), self.dtype, lambda: self.read().transpose(axes))


# NumPy has no bfloat16: its bits travel as uint16.
_NUMPY = {mx.bfloat16: np.dtype("<u2"), mx.bool_: np.dtype("?")} | {
    dtype: np.dtype(f"<{kind}{dtype.size}")
    for kind, dtypes in {
        "f": (mx.float16, mx.float32, mx.float64),
        "i": (mx.int8, mx.int16, mx.int32, mx.int64),
        "u": (mx.uint8, mx.uint16, mx.uint32, mx.uint64),
    }.items()
    for dtype in dtypes
}


def dtype_name(dtype: mx.Dtype) -> str:
    """`float32`, `bool`: as config files call it."""
    return str(dtype).removeprefix("mlx.core.").rstrip("_")


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous array in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements lie between the first and the last one of a strided array, both included."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0


def read_strided(
    file: MappedFile, start: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: mx.Dtype
) -> mx.array:
    """One copy out of the file: the array of `shape` whose first element is at byte `start`; strides in elements."""
    if not math.prod(shape):
        return mx.zeros(shape, dtype)
    length = extent(shape, strides) * dtype.size
    flat = np.frombuffer(file.view(start, length), _NUMPY[dtype])
    strided = np.lib.stride_tricks.as_strided(flat, shape, [stride * dtype.size for stride in strides])
    aligned = np.require(strided, requirements="A")
    array = mx.array(aligned).view(dtype) if dtype == mx.bfloat16 else mx.array(aligned, dtype)
    mx.eval(array)
    file.forget(start, length)
    return array
