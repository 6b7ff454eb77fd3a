"""The matrices of linear layers and embeddings as C reads them: where they lie, in whatever precision they have.

float32, float16, bfloat16, and MLX's mode "affine" in all its bits and group sizes. Products with them are in float32.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .calls import at_once, available, call, traced

_FEW = 4  # rows: as many products with a quantized matrix as dequantizing it costs MLX
_KINDS = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}  # enum kind of c/weights.h


class Unsupported(Exception):
    """Something is not for C: a layer, size or dtype that it is not made for, or traced arrays."""


class Linear(nn.Linear):
    """Of half-precision weights, which stay as they are."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if self.weight.dtype == mx.float32 else _with_bias(self, _product(self, x))


class Embedding(nn.Embedding):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return super().as_linear(x) if self.weight.dtype == mx.float32 else _product(self, x)


class QuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return _with_bias(self, _product(self, x))


class QuantizedEmbedding(nn.QuantizedEmbedding):
    def __call__(self, x: mx.array) -> mx.array:
        return _matrix(self, x)

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


CLASSES: dict[type, type] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.QuantizedLinear: QuantizedLinear,
    nn.QuantizedEmbedding: QuantizedEmbedding,
}
LAYERS = (*CLASSES, *CLASSES.values())


# ---- Where a matrix is -----------------------------------------------------------------------------------------------


class Weights(ctypes.Structure):
    """struct weights of c/weights.h."""

    _fields_ = [
        ("n", ctypes.c_size_t),
        *((name, ctypes.c_int) for name in ("kind", "bits", "group")),
        *((name, ctypes.c_void_p) for name in ("at", "scales", "biases")),
        ("rank", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        ("scale", ctypes.c_float),
    ]


class Matrix:
    """The matrix of a layer, without its bias, and what LoRA adds to it.

    Attributes:
        shape: (out, in).
        arrays: what it is made of; a matrix whose arrays are replaced or have moved is no longer valid.
        struct: for C; valid while this object lives.

    Raises:
        Unsupported: C is not made for this layer.
    """

    def __init__(self, layer: nn.Module):
        self.arrays: list[mx.array] = []
        self._kept: list[Any] = []
        self.struct = Weights()
        if type(layer) is _lora():
            self._adapt(layer)
            layer = layer["linear"]
        if type(layer) not in LAYERS:
            raise Unsupported
        array = layer["weight"]
        out, columns = array.shape
        if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            if layer.mode != "affine":
                raise Unsupported
            columns = columns * 32 // layer.bits
            scales, biases = layer["scales"], layer["biases"]
            groups = (out, columns // layer.group_size)
            if not (
                array.dtype == mx.uint32 and scales.shape == biases.shape == groups and scales.dtype == biases.dtype
            ):
                raise Unsupported
            self.struct.bits, self.struct.group = layer.bits, layer.group_size
            self.struct.scales, self.struct.biases = map(self._address, (scales, biases))
            kind = scales.dtype
        else:
            kind = array.dtype
        if kind not in _KINDS:
            raise Unsupported
        self.struct.kind = _KINDS[kind]
        self.struct.n, self.struct.at = out, self._address(array)
        self.shape = (out, columns)
        if self.struct.rank and self._adapter_shape != self.shape:
            raise Unsupported

    def _adapt(self, layer: nn.Module) -> None:
        dropout = layer["dropout"]
        a, b = layer["lora_a"], layer["lora_b"]  # [in, rank], [rank, out]
        if type(dropout) is not nn.Dropout or (dropout.training and dropout._p_1 < 1) or a.shape[1] != b.shape[0]:
            raise Unsupported
        for array in (a, b):
            self._address(array)
        rows = [
            np.ascontiguousarray(np.array(array.astype(mx.float32)).T) for array in (a, b)
        ]  # [rank, in], [out, rank]
        self._kept += rows
        self.struct.a, self.struct.b = (array.ctypes.data for array in rows)
        self.struct.rank, self.struct.scale = len(b), float(layer.scale)
        self._adapter_shape = (len(rows[1]), rows[0].shape[1])

    def _address(self, array: mx.array) -> int:
        found = addresses([array])
        if found is None:
            raise Unsupported
        self.arrays.append(array)
        self._kept.append(copy.copy(array))  # it shares the memory, so that no other array gets this address meanwhile
        return found[0]


def _lora() -> type | None:
    """mlx-lm's LoRA layer, if anybody has imported it."""
    return getattr(sys.modules.get("mlx_lm.tuner.lora"), "LoRALinear", None)


def addresses(arrays: Sequence[mx.array]) -> list[int] | None:
    """Where the values of arrays are; None if one is empty, not contiguous, or traced, so that it has none."""
    try:
        return list(map(ctypes.addressof, map(ctypes.c_char.from_buffer, arrays)))  # type: ignore[arg-type]
    except (RuntimeError, TypeError, ValueError):
        return None


# ---- Products --------------------------------------------------------------------------------------------------------


def _with_bias(layer: nn.Module, y: mx.array) -> mx.array:
    return y + layer["bias"] if "bias" in layer else y


def _product(layer: nn.Module, x: mx.array) -> mx.array:
    """x [..., in] W^T, float32 [..., out]."""
    arrays = [layer[name] for name in ("weight", "scales", "biases") if layer.get(name) is not None]
    if x.size and available() and not traced(arrays):
        with contextlib.suppress(Unsupported):
            return _product_in_c(layer, x)
    if "scales" in layer and x.size // x.shape[-1] <= _FEW:
        how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        scales, biases = _groups(layer)
        return mx.quantized_matmul(x, layer.weight, scales, biases, transpose=True, **how)
    return x @ _matrix(layer).T


def _product_in_c(layer: nn.Module, x: mx.array) -> mx.array:
    matrix = Matrix(layer)
    n, k = matrix.shape
    if x.shape[-1] != k:
        raise Unsupported  # MLX says what is wrong

    def multiply(x: np.ndarray, is_back: bool) -> list[np.ndarray]:
        y = np.empty((*x.shape[:-1], k if is_back else n), np.float32)
        call("mlx_ttt_multiply", ctypes.byref(matrix.struct), x, y, x.size // x.shape[-1], k, int(is_back))
        return [y]

    return at_once(
        lambda x: multiply(x, False),
        lambda x: [x @ _matrix(layer).T],
        x,
        dtypes=[mx.float32],
        backward=lambda x, dy: multiply(dy, True),
    )[0]


def _matrix(layer: nn.Module, rows: Any = ...) -> mx.array:
    """The matrix of a layer in MLX operations, float32 [out, in], or some rows of it. To be forgotten after use.

    MLX's product of many rows and a quantized matrix takes 20 times as long on a CPU as BLAS's.
    """
    if "scales" not in layer:
        return layer.weight[rows].astype(mx.float32)
    scales, biases = _groups(layer)
    parts = layer.weight[rows], scales[rows], biases if biases is None else biases[rows]
    return mx.dequantize(*parts, layer.group_size, layer.bits, mode=layer.mode, dtype=mx.float32)


def _groups(layer: nn.Module) -> list[Any]:
    """Scales and biases of a quantized layer, in float32 if they are floating point: of halves MLX makes halves."""
    parts = [layer.scales, layer.get("biases")]
    return [x.astype(mx.float32) if x is not None and mx.issubdtype(x.dtype, mx.floating) else x for x in parts]
