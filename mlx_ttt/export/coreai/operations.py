"""The operations of the exported network in Core AI's graph language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from ..operations import NumberType, Operations, Value
from . import compiler
from .compiler import dialect
from .storage import Storage


def _i32(x: Any) -> compiler.Value:
    return compiler.constant(np.asarray(x, np.int32))


def _u32(x: Any) -> compiler.Value:
    return compiler.constant(np.asarray(x, np.uint32))


def _elementwise(operation: Callable[..., compiler.Value]) -> Any:
    """A method for an operation of values and constants."""
    return lambda self, *values: operation(*map(self.value, values))


def _reduction(operation: Callable[..., compiler.Value]) -> Any:
    """A method for an operation along an axis."""
    return lambda self, x, axis: operation(self.value(x), _i32([axis]))


class CoreAIOperations(Operations):
    """Adds each operation to the Core AI graph that is being built.

    A length of -1 in a shape is one that only the call knows. The operations that work on any shape take it.

    Args:
        storage: how the matrices of `linear` and `gather` are stored.
        network: the number type of what `gather` gives.
    """

    add, sub, mul, div = (
        _elementwise(f)
        for f in (
            dialect.broadcasting_add,
            dialect.broadcasting_sub,
            dialect.broadcasting_mul,
            dialect.broadcasting_divide,
        )
    )
    maximum, equal = _elementwise(dialect.broadcasting_maximum), _elementwise(dialect.broadcasting_equal)
    tanh, sigmoid, silu, abs = (_elementwise(f) for f in (dialect.tanh, dialect.sigmoid, dialect.silu, dialect.abs_))
    rsqrt = _elementwise(dialect.rsqrt)
    reduce_sum, reduce_mean, reduce_max = (
        _reduction(f) for f in (dialect.reduce_sum, dialect.reduce_mean, dialect.reduce_max)
    )

    def __init__(self, storage: Storage | None = None, network: NumberType = np.float32):
        self._storage, self._network = storage or Storage(), network

    def value(self, x: Value) -> compiler.Value:
        """x, as a constant of the graph if it is an array."""
        return compiler.constant(np.asarray(x)) if isinstance(x, np.ndarray | np.generic) else x

    def shape(self, x: Value) -> tuple[int, ...]:
        return x.shape if isinstance(x, np.ndarray) else compiler.shape(x)

    def number_type(self, x: Value) -> NumberType:
        return x.dtype.type if isinstance(x, np.ndarray | np.generic) else compiler.number_type(x)

    def constant(self, x: np.ndarray, name: str) -> compiler.Value:
        return self._storage.table(x)

    def gather(self, table: Value, ids: Value) -> compiler.Value:
        if isinstance(table, np.ndarray):
            table = self._storage.table(table)
        everywhere = self.add(ids, np.zeros((self.shape(table)[0], 1), np.int32))  # [C, T]
        columns = dialect.gather_along_axis(table, everywhere, compiler.constant(np.asarray(1, np.int32)))
        return self.cast(self.expand_dims(self.transpose(columns, [1, 0]), 0), self._network)

    def linear(self, x: Value, weight: Value, name: str | None = None) -> compiler.Value:
        """`weight` may be a stored table, which is transposed."""
        is_matrix = isinstance(weight, np.ndarray)
        stored = self._storage.matrix(weight) if is_matrix else self.cast(weight, self.number_type(x))
        return dialect.broadcasting_batch_matmul(x, stored)

    def matmul(self, x: Value, y: Value, transpose_x: bool = False, transpose_y: bool = False) -> compiler.Value:
        x, y = self._swapped(x, transpose_x), self._swapped(y, transpose_y)
        return dialect.broadcasting_batch_matmul(self.value(x), self.value(y))

    def _swapped(self, x: Value, swap: bool) -> Value:
        """x with its last two axes swapped, if so."""
        if not swap or isinstance(x, np.ndarray):
            return x.swapaxes(-1, -2) if swap else x
        rank = len(self.shape(x))
        return self.transpose(x, [*range(rank - 2), rank - 1, rank - 2])

    def less(self, x: Value, y: Value) -> compiler.Value:
        return dialect.broadcasting_greater(self.value(y), self.value(x))

    def clip(self, x: Value, low: float, high: float) -> compiler.Value:
        number = self.number_type(x)
        return dialect.broadcasting_minimum(self.maximum(x, number(low)), self.value(number(high)))

    def square(self, x: Value) -> compiler.Value:
        return self.mul(x, x)

    def gelu(self, x: Value) -> compiler.Value:
        return dialect.gelu(self.value(x), approximate="tanh")

    def expand_dims(self, x: Value, axis: int) -> compiler.Value:
        return dialect.expand_dims(self.value(x), _i32([axis]))

    def transpose(self, x: Value, order: Sequence[int]) -> compiler.Value:
        return dialect.transpose(self.value(x), _u32(order))

    def slice(self, x: Value, begin: Sequence[int], size: Sequence[int]) -> compiler.Value:
        end = [first + length for first, length in zip(begin, size, strict=True)]
        return dialect.slice_(self.value(x), _i32(begin), _i32(end), _i32([1] * len(end)))

    def pad_last(self, x: Value, width: int) -> compiler.Value:
        *before, last = self.shape(x)
        padding = _u32([0, 0] * len(before) + [0, width - last])
        return dialect.pad(self.value(x), padding, self.value(self.number_type(x)(0)))

    def _cast(self, x: Value, number_type: NumberType) -> compiler.Value:
        return dialect.cast(self.value(x), number_type)

    def _reshape(self, x: Value, shape: Sequence[int]) -> compiler.Value:
        return dialect.reshape(self.value(x), _i32(shape))

    def _split(self, x: Value, sizes: Sequence[int], axis: int) -> list[compiler.Value]:
        axis = axis % len(self.shape(x))
        return list(cast(Any, dialect.split(self.value(x), _u32(sizes), axis)))

    def _concat(self, values: Sequence[Value], axis: int) -> compiler.Value:
        axis = axis % len(self.shape(values[0]))
        return dialect.concat(axis, list(map(self.value, values)))
