"""Small things that the graph is built with: types, and operations that are left out where they change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

TYPES = {np.float16: types.fp16, np.float32: types.fp32}
TYPE_NAMES = {np.float16: "fp16", np.float32: "fp32"}


def split(x: Var, sizes: Sequence[int], axis: int) -> list[Var]:
    return [x] if len(sizes) == 1 else list(mb.split(x=x, split_sizes=list(sizes), axis=axis))


def concat(values: Sequence[Var], axis: int) -> Var:
    return values[0] if len(values) == 1 else mb.concat(values=list(values), axis=axis)


def cast(x: Var, dtype: type) -> Var:
    return x if x.dtype == TYPES[dtype] else mb.cast(x=x, dtype=TYPE_NAMES[dtype])


def total(values: Sequence[Var]) -> Var:
    values = list(values)
    while len(values) > 1:
        values[:2] = [mb.add(x=values[0], y=values[1])]
    return values[0]
