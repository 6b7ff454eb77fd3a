"""Arrays as MLX lays them out: strides, contiguity, and who shares a buffer. No values.

What MLX launches depends on these alone. Places in its sources are named in rules.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

PAGE = 16384  # bytes, of Apple silicon; the allocator rounds larger buffers up to pages
DONATION_EXTRA = 16384  # bytes that a donated buffer may be larger than what it becomes

Shape = tuple[int, ...]


class Buffer:
    """Memory of the device. `users` counts the arrays in it and the pending command buffers that hold it."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes if nbytes <= PAGE else -(-nbytes // PAGE) * PAGE
        self.users = 0


class Array:
    """An array, computed or not yet.

    Attributes:
        holds: how many places hold it: the caller, and inputs of what is not computed yet. It is gone with the last.
        call: what will compute it; None if it has been computed, or never was.
        size: its elements.
        data_size: elements of the buffer that it spans.
    """

    def __init__(self, shape: Sequence[int], dtype: mx.Dtype):
        self.shape: Shape = tuple(shape)
        self.size = math.prod(self.shape)
        self.dtype = dtype
        self.strides = row_strides(self.shape)
        self.contiguous = self.row_contiguous = self.col_contiguous = True
        self.data_size = 0
        self.buffer: Buffer | None = None
        self.holds = 0
        self.call: Any = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size

    @property
    def donatable(self) -> bool:
        """Whether nobody else would see it overwritten."""
        return self.holds == 1 and self.buffer is not None and self.buffer.users == 1

    def donatable_to(self, out: Array) -> bool:
        """Whether `out` may take over its buffer."""
        fits = self.buffer is not None and self.buffer.nbytes <= out.nbytes + DONATION_EXTRA
        return self.donatable and self.dtype.size == out.dtype.size and fits

    def allocate(self, like: Array | None = None) -> None:
        """Give it a buffer of its own: row-contiguous, or laid out as another array."""
        if like is None:
            self._place(Buffer(self.nbytes), row_strides(self.shape), self.size)
            self.contiguous = self.row_contiguous = True
            self.col_contiguous = self.size <= max(self.shape, default=1)
        else:
            self._place(Buffer(like.data_size * self.dtype.size), like.strides, like.data_size)
            self._flags_of(like)

    def share(self, other: Array, strides: Shape | None = None, data_size: int | None = None) -> None:
        """Put it into the buffer of another array, with the flags of that."""
        assert other.buffer is not None
        self._place(
            other.buffer,
            other.strides if strides is None else strides,
            other.data_size if data_size is None else data_size,
        )
        self._flags_of(other)

    def _place(self, buffer: Buffer, strides: Shape, data_size: int) -> None:
        self.buffer, self.strides, self.data_size = buffer, strides, data_size
        buffer.users += 1

    def _flags_of(self, other: Array) -> None:
        self.contiguous = other.contiguous
        self.row_contiguous, self.col_contiguous = other.row_contiguous, other.col_contiguous


@functools.cache
def row_strides(shape: Shape) -> Shape:
    """Strides of a row-contiguous array, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def contiguity(shape: Shape, strides: Shape) -> tuple[int, bool, bool]:
    """Elements without those of broadcast axes; whether the strides are those of rows, of columns."""
    elements = math.prod(n for n, stride in zip(shape, strides, strict=True) if stride > 0)
    columns = tuple(math.prod(shape[:i]) for i in range(len(shape)))

    def as_in(expected: Shape) -> bool:
        return all(s == e or n == 1 for n, s, e in zip(shape, strides, expected, strict=True))

    return elements, as_in(row_strides(shape)), as_in(columns)


def collapsed(shape: Shape, strides: Sequence[Shape]) -> tuple[list[int], list[list[int]]]:
    """The same elements with as few axes as possible, for several arrays of one shape. [] where all axes are 1."""
    axes = [i for i, n in enumerate(shape) if n != 1]
    groups: list[list[int]] = []
    for i in axes:
        last = groups[-1][-1] if groups else None
        if last is not None and all(s[last] == s[i] * shape[i] for s in strides):
            groups[-1].append(i)
        else:
            groups.append([i])
    sizes = [math.prod(shape[i] for i in group) for group in groups]
    return sizes, [[s[group[-1]] for group in groups] for s in strides]
