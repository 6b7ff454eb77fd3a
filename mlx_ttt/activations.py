"""SiLU and the tanh GELU.

mlx.nn has both compiled, which on Linux takes a C++ compiler and a second for each new kind of input.
"""

from __future__ import annotations

import math
import sys

import mlx.core as mx
import numpy as np

from . import native

_SLOPE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # gelu(x) = x sigmoid(SLOPE (x + CUBIC x^3))


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)), within 4e-7."""
    many = x.size >= 4096
    if not many or x.dtype != mx.float32 or sys.platform != "linux" or mx.default_device() != mx.cpu:
        return mx.sigmoid(x)
    # In MLX's Linux wheels exp is a scalar function, five times slower than all of this, which is vectorized:
    # exp(-x) is the eighth power of exp(-x / 8), near its Padé approximant [3/3], (even - odd) / (even + odd).
    y = mx.clip(0.125 * x, -4, 4)
    y_sq = y.square()
    even, odd = 0.1 * y_sq + 1, y * (y_sq / 120 + 0.5)
    exp = ((even - odd) / (even + odd)).square().square().square()
    return 1 / (1 + exp)


def silu(x: mx.array) -> mx.array:
    return x * sigmoid(x)


def silu_times(x: mx.array, y: mx.array) -> mx.array:
    """silu(x) y, [B, T, C]."""
    return native.either(_are_for_c(x, y), lambda x, y: _in_c(x, y, is_gelu=0), lambda x, y: silu(x) * y, x, y)


def gelu_times(x: mx.array, y: mx.array) -> mx.array:
    """gelu(x) y, [B, T, C]."""
    return native.either(_are_for_c(x, y), lambda x, y: _in_c(x, y, is_gelu=1), lambda x, y: gelu(x) * y, x, y)


def _are_for_c(x: mx.array, y: mx.array) -> bool:
    return x.ndim == 3 and x.shape == y.shape and native.worthwhile(x.shape[1])


def _in_c(x: np.ndarray, y: np.ndarray, is_gelu: int) -> np.ndarray:
    z = np.empty_like(x)
    native.call("mlx_ttt_activate", x, y, z, x.size, is_gelu)
    return z


def gelu(x: mx.array) -> mx.array:
    """The tanh GELU, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return x * sigmoid(x * (_SLOPE * _CUBIC * x.square() + _SLOPE))


def gelu_and_grad(x: mx.array) -> tuple[mx.array, mx.array]:
    """The tanh GELU and its derivative."""
    x_sq = x.square()
    s = sigmoid(x * (_SLOPE * _CUBIC * x_sq + _SLOPE))
    y = x * s
    return y, s + (y - y * s) * (3 * _SLOPE * _CUBIC * x_sq + _SLOPE)
