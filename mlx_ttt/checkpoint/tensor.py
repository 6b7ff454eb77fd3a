"""A tensor whose values are still in a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import mlx.core as mx
import numpy as np

from .mapped import MappedFile


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype are known, the values are loaded on demand. A checkpoint is a dict of these by name.

    `load()` returns a new array of this shape and dtype and keeps nothing. It raises CheckpointError when the file
    turns out to be damaged there.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    load: Callable[[], mx.array] = field(repr=False)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size

    def transposed(self, axes: tuple[int, ...]) -> Tensor:
        """The same values with the axes in another order."""
        return Tensor(tuple(self.shape[axis] for axis in axes), self.dtype, lambda: self.load().transpose(axes))


MOST_AXES = 8  # of a tensor in a checkpoint


# NumPy has no bfloat16: bfloat16 arrays are read as uint16 and viewed as bfloat16 in MLX.
_NUMPY = {mx.bfloat16: np.dtype("<u2"), mx.bool_: np.dtype("?")} | {
    dtype: np.dtype(f"<{kind}{dtype.size}")
    for kind, dtypes in {
        "f": (mx.float16, mx.float32, mx.float64),
        "i": (mx.int8, mx.int16, mx.int32, mx.int64),
        "u": (mx.uint8, mx.uint16, mx.uint32, mx.uint64),
    }.items()
    for dtype in dtypes
}


def is_length(value: object) -> TypeGuard[int]:
    """Whether a value out of a file can be a size or a position: an integer that is not negative, in 64 bits."""
    return type(value) is int and 0 <= value < 2**63


def is_possible_shape(shape: Sequence[int]) -> bool:
    """Whether MLX can have an array with these lengths of its axes, and a checkpoint would."""
    return len(shape) <= MOST_AXES and max(shape, default=0) < 2**31


def dtype_name(dtype: mx.Dtype) -> str:
    """The name that config files use: `float32`, `bool`."""
    return str(dtype).removeprefix("mlx.core.").rstrip("_")


def bytes_by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many bytes the tensors of each dtype have, by the dtype's name."""
    nbytes: Counter[str] = Counter()
    for tensor in tensors.values():
        nbytes[dtype_name(tensor.dtype)] += tensor.nbytes
    return dict(nbytes)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous array in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements a strided array spans, from its first to its last one; 0 if it has none."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0


def read_strided(
    file: MappedFile, start: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: mx.Dtype
) -> mx.array:
    """Copy an array out of a file.

    Args:
        start: the byte position of the first element.
        strides: in elements, one for each axis.
    """
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


def contiguous(file: MappedFile, name: str, span: tuple[int, int], shape: tuple[int, ...], dtype: mx.Dtype) -> Tensor:
    """A tensor whose values lie in C order in a file.

    Args:
        name: the tensor's, for the error message.
        span: the position of its first byte, and of the byte after its last one.

    Raises:
        CheckpointError: a tensor of this shape and dtype does not fill the span.
    """
    start, end = span
    fills = end - start == math.prod(shape) * dtype.size and is_possible_shape(shape)
    file.require(fills, f"{name} does not fill its place in the file")
    return Tensor(shape, dtype, lambda: read_strided(file, start, shape, row_major(shape), dtype))
