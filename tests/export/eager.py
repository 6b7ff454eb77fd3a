"""A third lowering of the exported network: no graph, NumPy computes each operation when it is called."""

from __future__ import annotations

import numpy as np

from mlx_ttt.export.functions import FUNCTIONS, ExportedFunction, Options
from mlx_ttt.export.operations import Operations
from mlx_ttt.export.session import Session
from mlx_ttt.model import Model


class EagerOperations(Operations):
    """Values are NumPy arrays."""

    add, sub, mul, div = (staticmethod(f) for f in (np.add, np.subtract, np.multiply, np.divide))
    maximum, equal, less = (staticmethod(f) for f in (np.maximum, np.equal, np.less))
    abs, square, tanh = (staticmethod(f) for f in (np.abs, np.square, np.tanh))

    def shape(self, x):
        return x.shape

    def number_type(self, x):
        return x.dtype.type

    def constant(self, x, name):
        return x

    def gather(self, table, ids):
        return table[ids]

    def linear(self, x, weight, name=None):
        return x @ weight.T

    def matmul(self, x, y, transpose_x=False, transpose_y=False):
        return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)

    def clip(self, x, low, high):
        return np.clip(x, x.dtype.type(low), x.dtype.type(high))

    def rsqrt(self, x):
        return 1 / np.sqrt(x)

    def sigmoid(self, x):
        return 1 / (1 + np.exp(-x))

    def silu(self, x):
        return x * self.sigmoid(x)

    def gelu(self, x):
        return x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3))) / 2

    def reduce_sum(self, x, axis):
        return x.sum(axis, keepdims=True)

    def reduce_mean(self, x, axis):
        return x.mean(axis, keepdims=True)

    def reduce_max(self, x, axis):
        return x.max(axis, keepdims=True)

    def expand_dims(self, x, axis):
        return np.expand_dims(x, axis)

    def transpose(self, x, order):
        return x.transpose(order)

    def slice(self, x, begin, size):
        return x[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))]

    def pad_last(self, x, width):
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])

    def _cast(self, x, number_type):
        return x.astype(number_type)

    def _reshape(self, x, shape):
        return x.reshape(shape)

    def _split(self, x, sizes, axis):
        return np.split(x, np.cumsum(sizes)[:-1], axis)

    def _concat(self, values, axis):
        return np.concatenate(values, axis)


class EagerFunctions:
    """Both functions of a model, and the state of one text."""

    def __init__(self, model: Model, options: Options, ops: Operations):
        self.ops = ops
        self.functions = {name: ExportedFunction(model, name, options, np.float32) for name in FUNCTIONS}
        self.state = np.zeros(self.functions["decode"].layout.shape, np.float32)

    def predict(self, name, inputs):
        function = self.functions[name]
        assert {key: (x.shape, x.dtype.type) for key, x in inputs.items()} == function.inputs
        ordered = [inputs[key] for key in function.inputs]
        outputs, self.state = function.lower(self.ops, ordered, self.state)
        return outputs


def eager_session(model: Model, ops: Operations | None = None, **options) -> Session:
    """A text before its first token, in float32."""
    K = model.args.mini_batch_size
    chosen = Options(compute="float32", **options)
    functions = EagerFunctions(model, chosen, ops or EagerOperations())
    scale = np.ones(functions.state.shape[:2], np.float32) if chosen.learning else None
    return Session(functions, K, chosen.prefill_tokens or K, scale)
