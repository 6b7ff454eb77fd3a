"""What a CPU needs to run a model fast."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import mlx.core as mx
import mlx.nn as nn

from .quantized import for_cpu

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def prepare(model: nn.Module) -> None:
    """Hold the weights of a model as a CPU multiplies them best; their values, shapes and names stay as they are."""
    _widen(model)
    for_cpu(model)
    if sys.platform == "linux":
        _lay_out_by_input(model)
        _keep_freed_memory()


def _widen(model: nn.Module) -> None:
    """Half precision becomes float32: MLX multiplies that 40 times faster."""
    half = (mx.float16, mx.bfloat16)
    model.apply(lambda x: x.astype(mx.float32) if x.dtype in half else x)


def _lay_out_by_input(model: nn.Module) -> None:
    """Matrices [out, in] as the transpose of one in memory, of which OpenBLAS copies less before it multiplies."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = mx.contiguous(module.weight.T).T


def _keep_freed_memory() -> None:
    """Have malloc keep what one operation frees for the next: fresh memory costs a page fault for every 4 KB."""
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
