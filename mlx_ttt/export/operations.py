"""The operations that the exported network is described with: what a lowering must provide.

A lowering (`mil/`) subclasses `Operations` and returns values of its own kind. An argument is such a value or a NumPy
array, which is a constant; at least one argument of an operation is a value. Shapes are static and results have the
number type of their arguments, unless said otherwise. Shapes broadcast as in NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias

Value: TypeAlias = Any  # a value of a lowering, or a NumPy array: a constant
NumberType: TypeAlias = type  # np.float16, np.float32, np.int32, np.bool_

OPERATIONS = {
    # About a value
    "shape": "(x) -> tuple of int",
    "number_type": "(x) -> NumberType",
    "constant": "(x, name): a NumPy array that more than one operation uses, stored once",
    # Products
    "gather": "(table [V, C], ids [1, T]) -> [1, T, C]: rows of a table",
    "linear": "(x [1, T, C], weight [N, C], name=...) -> [1, T, N]: x weightᵀ; weight is a constant, name is optional",
    "matmul": "(x [..., M, N], y [..., N, P], transpose_x=False, transpose_y=False) -> [..., M, P]: x y;"
    " the last two axes of a transposed argument swap first",
    # Arithmetic, element by element
    "add": "(x, y): x + y",
    "sub": "(x, y): x - y",
    "mul": "(x, y): x y",
    "div": "(x, y): x / y",
    "maximum": "(x, y): the larger of the two",
    "equal": "(x, y) -> np.bool_: x = y, of integers",
    "less": "(x, y) -> np.bool_: x < y, of integers",
    "clip": "(x, low, high): x, at least low and at most high, which are numbers",
    "abs": "(x): |x|",
    "square": "(x): x²",
    "rsqrt": "(x): 1 / sqrt(x)",
    "tanh": "(x): tanh(x)",
    "sigmoid": "(x): 1 / (1 + exp(-x))",
    "silu": "(x): x sigmoid(x)",
    "gelu": "(x): the tanh GELU, x (1 + tanh(sqrt(2 / π) (x + 0.044715 x³))) / 2",
    # Along an axis, which stays with length 1; it may be negative
    "reduce_sum": "(x, axis)",
    "reduce_mean": "(x, axis)",
    "reduce_max": "(x, axis)",
    # Shapes
    "expand_dims": "(x, axis): a new axis of length 1 that is `axis` of the result",
    "transpose": "(x, order): axis i of the result is axis order[i] of x",
    "slice": "(x, begin=, size=): size[i] elements from begin[i] on, along each axis i",
    "pad_last": "(x, width): zeros behind the last axis, up to this width",
    # What the methods below do, where it changes something
    "_cast": "(x, number_type): to another number type than that of x",
    "_reshape": "(x, shape): to another shape than that of x",
    "_split": "(x, sizes, axis) -> list: two parts or more",
    "_concat": "(values, axis): two values or more",
}


class Operations:
    """A lowering: a subclass has a method for each of OPERATIONS. Those here leave out what would change nothing."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__} has no operation {name}")

    def cast(self, x: Value, number_type: NumberType) -> Value:
        """x in another number type; of truth values: 1 and 0."""
        return x if self.number_type(x) == number_type else self._cast(x, number_type)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """The same numbers in row-major order in another shape."""
        return x if self.shape(x) == tuple(shape) else self._reshape(x, shape)

    def split(self, x: Value, sizes: Sequence[int], axis: int) -> list[Value]:
        """Parts of these sizes along an axis; the sizes add up to its length."""
        return [x] if len(sizes) == 1 else self._split(x, sizes, axis)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """The values one behind the other along an axis."""
        return values[0] if len(values) == 1 else self._concat(values, axis)

    def total(self, values: Sequence[Value]) -> Value:
        """Sum of values of one shape, from the first to the last."""
        return reduce(self.add, values)

    def learn(self, rule: Any, tokens: Any, state: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
        """What a rule.UpdateRule returns of its arguments. A lowering may have a kernel for it."""
        return rule(tokens, state)
