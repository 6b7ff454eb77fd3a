"""A model's layers as a CPU runs them best: the same names, shapes and values."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys

import mlx.core as mx
import mlx.nn as nn

_FEW = 8  # rows: as many products with a matrix as reading it costs
_FEW_QUANTIZED = 4  # rows: as many products with a quantized matrix as dequantizing it costs
_SMALL = 1 << 19  # multiplications
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def prepare(model: nn.Module) -> None:
    """Make a model's layers the ones below, and its half-precision arrays float32, which MLX multiplies much faster."""
    half = (mx.float16, mx.bfloat16)
    model.apply(lambda x: x.astype(mx.float32) if x.dtype in half else x)
    for module in model.modules():
        module.__class__ = _CLASSES.get(type(module), type(module))
    if sys.platform == "linux":
        _keep_freed_memory()


class Linear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        y = product(x, self.weight)
        return y + self.bias if "bias" in self else y


class Embedding(nn.Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return product(x, self.weight)


class QuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if _rows(x) <= _FEW_QUANTIZED else x @ _dequantized(self).T


class QuantizedEmbedding(nn.QuantizedEmbedding):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return super().as_linear(x) if _rows(x) <= _FEW_QUANTIZED else x @ _dequantized(self).T


_CLASSES = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.QuantizedLinear: QuantizedLinear,
    nn.QuantizedEmbedding: QuantizedEmbedding,
}


def product(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., in] times weight [out, in] transposed, [..., out].

    OpenBLAS copies a matrix before it multiplies by it, even one row, unless the product is small (on processors with
    AVX-512). So few rows are multiplied by one piece of the matrix after the other, which is limited by memory alone.
    """
    out, width = weight.shape
    rows = _rows(x)
    pieces = _pieces(rows, out, width)
    if pieces == 1:
        return x @ weight.T
    y = x.reshape(rows, width) @ weight.reshape(pieces, -1, width).swapaxes(1, 2)  # [pieces, rows, out / pieces]
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], out)


@functools.cache
def _pieces(rows: int, out: int, width: int) -> int:
    """Into how many pieces of the same size to cut a matrix, so that each product is small."""
    if not 0 < rows <= _FEW:
        return 1
    return next((n for n in range(1, out) if out % n == 0 and rows * (out // n) * width <= _SMALL), 1)


def _dequantized(layer: nn.Module) -> mx.array:
    """The matrix of a quantized layer, [out, in], float32, to be forgotten after the product.

    MLX's product of many rows and a quantized matrix takes 20 times as long on a CPU as BLAS's.
    """
    return mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, mode=layer.mode, dtype=mx.float32
    )


def _rows(x: mx.array) -> int:
    return x.size // x.shape[-1]


def _keep_freed_memory() -> None:
    """Have malloc keep what one operation frees for the next: fresh memory costs a page fault for every 4 KB."""
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
