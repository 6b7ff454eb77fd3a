"""Matrices in a graph, in the format that they are stored in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import compiler
from .compiler import Value, constant, dialect
from .formats import palettized, scaled, table_format


@dataclass(frozen=True)
class Storage:
    """How the matrices of a graph are stored.

    Attributes:
        weights: one of formats.WEIGHTS.
    """

    weights: str = "float32"

    def matrix(self, x: np.ndarray) -> Value:
        """The transpose of a matrix [N, C] in x's number type, made of what is stored: [C, N]."""
        if self.weights in ("int8", "int4"):
            stored = scaled(x, int(self.weights[3:]))
            zero = np.zeros(stored.scale.shape)
            offsets = constant(zero.astype(stored.data.dtype)), constant(zero.astype(x.dtype))
            return dialect.blockwise_shift_scale(constant(stored.data), constant(stored.scale), *offsets)
        if self.weights == "lut4":
            found = palettized(x)
            tables = found.tables[None, :, :, None]  # all inputs of a group of outputs share one
            return dialect.lut_to_dense(constant(found.places), constant(tables), constant(np.asarray(0, np.int16)))
        return _cast(constant(x.T.astype(self.weights)), x.dtype)

    def table(self, x: np.ndarray) -> Value:
        """The transpose of a table [V, C] as it is stored, [C, V]: an embedding, and a head that is tied to it."""
        return constant(x.T.astype(table_format(self.weights)))


def _cast(x: Value, number_type: np.dtype) -> Value:
    return x if compiler.number_type(x) == number_type else dialect.cast(x, number_type.type)
