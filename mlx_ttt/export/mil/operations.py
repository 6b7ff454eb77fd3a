"""The operations of the exported network as calls of coremltools' MIL builder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

from ..operations import NumberType, Operations, Value

TYPE_NAMES: dict[NumberType, str] = {np.float16: "fp16", np.float32: "fp32", np.int32: "int32", np.bool_: "bool"}


def _operation(operation: Callable[..., Var], *names: str, **fixed: Any) -> Any:
    """A method that hands its arguments to an operation of the builder, under these names, which are all it takes."""
    return lambda self, *values, **named: operation(**dict(zip(names, values, strict=False)), **named, **fixed)


def _reduction(operation: Callable[..., Var]) -> Any:
    """A method for an operation of the builder along an axis."""
    return lambda self, x, axis: operation(x=x, axes=[axis], keep_dims=True)


class MILOperations(Operations):
    """Adds each operation to the MIL function that is being built; values are its variables.

    The builder takes NumPy arrays as constants, so they need no treatment.
    """

    add, sub, mul, div = (_operation(f, "x", "y") for f in (mb.add, mb.sub, mb.mul, mb.real_div))
    maximum, equal, less = (_operation(f, "x", "y") for f in (mb.maximum, mb.equal, mb.less))
    abs, square, tanh, sigmoid, silu = (_operation(f, "x") for f in (mb.abs, mb.square, mb.tanh, mb.sigmoid, mb.silu))
    gelu = _operation(mb.gelu, "x", mode="TANH_APPROXIMATION")
    reduce_sum, reduce_mean, reduce_max = (_reduction(f) for f in (mb.reduce_sum, mb.reduce_mean, mb.reduce_max))
    constant = _operation(mb.const, "val", "name")
    gather = _operation(mb.gather, "x", "indices", axis=0)
    linear = _operation(mb.linear, "x", "weight", "name")
    transpose = _operation(mb.transpose, "x", "perm")
    slice = _operation(mb.slice_by_size, "x")
    _reshape = _operation(mb.reshape, "x", "shape")
    _split = _operation(mb.split, "x", "split_sizes", "axis")
    _concat = _operation(mb.concat, "values", "axis")

    def shape(self, x: Var) -> tuple[int, ...]:
        return tuple(x.shape)

    def number_type(self, x: Var) -> NumberType:
        return types.nptype_from_builtin(x.dtype)

    def matmul(self, x: Value, y: Value, transpose_x: bool = False, transpose_y: bool = False) -> Var:
        return mb.matmul(x=x, y=y, transpose_x=transpose_x, transpose_y=transpose_y)

    def clip(self, x: Var, low: float, high: float) -> Var:
        number = self.number_type(x)
        return mb.clip(x=x, alpha=number(low), beta=number(high))

    def rsqrt(self, x: Var) -> Var:
        return mb.rsqrt(x=x, epsilon=self.number_type(x)(0))

    def expand_dims(self, x: Value, axis: int) -> Var:
        return mb.expand_dims(x=x, axes=[axis])

    def pad_last(self, x: Var, width: int) -> Var:
        pad = [0, 0] * (len(x.shape) - 1) + [0, width - x.shape[-1]]
        return mb.pad(x=x, pad=pad, mode="constant", constant_val=self.number_type(x)(0))

    def _cast(self, x: Value, number_type: NumberType) -> Var:
        return mb.cast(x=x, dtype=TYPE_NAMES[number_type])
