"""A model's layers and memory as a CPU runs them best: the same names, shapes and values."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...network import model as network
from .calls import available
from .weights import CLASSES, addresses

_HUGE_PAGE = 2 << 20  # bytes
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of Linux's madvise
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@network.prepare.register
def prepare(model: nn.Module) -> None:
    """Make a model's linear layers and embeddings those of weights.py, and its other half-precision arrays float32.

    Without the C code, which reads half precision, all arrays: MLX multiplies float32 much faster.
    """
    if mx.default_device() != mx.cpu:
        return NotImplemented
    for module in model.modules():
        module.__class__ = CLASSES.get(type(module), type(module))
        if not (available() and type(module) in CLASSES.values()):
            widen(module)
    if sys.platform == "linux":
        _keep_freed_memory()
        mx.eval(model.parameters())
        for array in dict(tree_flatten(model.parameters())).values():
            _use_huge_pages(array)
    return None


def widen(module: nn.Module) -> None:
    """Make the half-precision arrays of a module, less those of modules in it, float32."""
    own = {name: x for name, x in module.items() if isinstance(x, mx.array) and x.dtype in (mx.float16, mx.bfloat16)}
    module.update({name: x.astype(mx.float32) for name, x in own.items()})


def _keep_freed_memory() -> None:
    """Have malloc keep what one operation frees for the next: fresh memory costs a page fault for every 4 KB."""
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def _use_huge_pages(array: mx.array) -> None:
    """Have Linux keep a large array in pages of 2 MB: reading all weights for each token is 10 to 15 % faster."""
    if array.nbytes < _HUGE_PAGE or (found := addresses([array])) is None:
        return
    (address,) = found
    start = address // _HUGE_PAGE * _HUGE_PAGE
    size = ctypes.c_size_t(-(-(address + array.nbytes) // _HUGE_PAGE) * _HUGE_PAGE - start)
    madvise = ctypes.CDLL(None).madvise
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):  # refused by old kernels, without harm
        madvise(ctypes.c_void_p(start), size, advice)
