"""A model's layers as a CPU runs them best: the same names, shapes and values."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

_FEW_QUANTIZED = 4  # rows: as many products with a quantized matrix as dequantizing it costs
_HUGE_PAGE = 2 << 20  # bytes
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of Linux's madvise
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def prepare(model: nn.Module) -> None:
    """Make a model's layers the ones below, and its half-precision arrays float32, which MLX multiplies much faster."""
    half = (mx.float16, mx.bfloat16)
    model.apply(lambda x: x.astype(mx.float32) if x.dtype in half else x)
    for module in model.modules():
        module.__class__ = _CLASSES.get(type(module), type(module))
    if sys.platform == "linux":
        _keep_freed_memory()
        mx.eval(model.parameters())
        for _, array in tree_flatten(model.parameters()):
            _use_huge_pages(array)


class QuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if _rows(x) <= _FEW_QUANTIZED else x @ _dequantized(self).T


class QuantizedEmbedding(nn.QuantizedEmbedding):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return super().as_linear(x) if _rows(x) <= _FEW_QUANTIZED else x @ _dequantized(self).T


_CLASSES = {
    nn.QuantizedLinear: QuantizedLinear,
    nn.QuantizedEmbedding: QuantizedEmbedding,
}


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


def _use_huge_pages(array: mx.array) -> None:
    """Have Linux keep a large array in pages of 2 MB: reading all weights for each token is 10 to 15 % faster."""
    if array.nbytes < _HUGE_PAGE:
        return
    address = np.asarray(memoryview(array)).ctypes.data
    start = address // _HUGE_PAGE * _HUGE_PAGE
    size = ctypes.c_size_t(-(-(address + array.nbytes) // _HUGE_PAGE) * _HUGE_PAGE - start)
    madvise = ctypes.CDLL(None).madvise
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):  # refused by old kernels, without harm
        madvise(ctypes.c_void_p(start), size, advice)
