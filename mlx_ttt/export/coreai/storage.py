"""Matrices in a graph, in the format that they are stored in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from . import compiler
from .compiler import Value, constant, dialect
from .formats import Palettized, Scaled, palettized, plain, scaled, table_format


class Storage:
    """How the matrices of a graph are stored.

    Args:
        weights: one of formats.WEIGHTS.
    """

    def __init__(self, weights: str = "float32"):
        self.weights = weights
        self._kept: dict[bytes, Scaled | Palettized] = {}  # several functions store the same matrices

    def matrix(self, x: np.ndarray) -> Value:
        """The transpose of a matrix [N, C] in x's number type, made of what is stored: [C, N]."""
        if self.weights == "lut4":
            found = self._once(x, palettized)
            tables = found.tables[None, :, :, None]  # all inputs of a group of outputs share one
            return dialect.lut_to_dense(constant(found.places), constant(tables), constant(np.asarray(0, np.int16)))
        if self.weights in ("int8", "int4"):
            stored = self._once(x, lambda x: scaled(x, int(self.weights[3:])))
            zero = np.zeros(stored.scale.shape)
            offsets = constant(zero.astype(stored.data.dtype)), constant(zero.astype(x.dtype))
            return dialect.blockwise_shift_scale(constant(stored.data), constant(stored.scale), *offsets)
        return _cast(constant(plain(x.T, self.weights)), x.dtype)

    def _once(self, x: np.ndarray, make: Callable[[np.ndarray], Any]) -> Any:
        key = hashlib.blake2b(np.ascontiguousarray(x).data).digest()
        if key not in self._kept:
            self._kept[key] = make(x)
        return self._kept[key]

    def table(self, x: np.ndarray) -> Value:
        """The transpose of a table [V, C] as it is stored, [C, V]: an embedding, and a head that is tied to it."""
        return constant(plain(x.T, table_format(self.weights)))


def _cast(x: Value, number_type: np.dtype) -> Value:
    return x if compiler.number_type(x) == number_type else dialect.cast(x, number_type.type)
