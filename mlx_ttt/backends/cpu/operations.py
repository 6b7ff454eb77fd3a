"""Norms, activations, convolutions and rotations in C, for the many tokens of a prompt."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ...network import operations
from .calls import at_once, available, call, have_values, rows, worthwhile


def _now(compute: Callable, in_mlx: Callable, *arrays: Any, backward: Callable | None = None) -> mx.array:
    """One array, made of the values of others. See `at_once`."""
    dtypes = [mx.result_type(*arrays)]
    return at_once(lambda *a: [compute(*a)], lambda *a: [in_mlx(*a)], *arrays, dtypes=dtypes, backward=backward)[0]


@operations.rms_norm.register
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return _norm("mlx_ttt_rms_norm", operations.rms_norm.in_mlx, eps, x, weight)


@operations.layer_norm.register
def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    return _norm("mlx_ttt_layer_norm", operations.layer_norm.in_mlx, eps, x, weight, bias)


def _norm(name: str, in_mlx: Callable, eps: float, x: mx.array, *parameters: mx.array | None) -> mx.array:
    """For x [B, T, C] and parameters [C]."""
    fit = all(p is not None and p.shape == x.shape[2:] for p in parameters)
    if not (fit and worthwhile(x.shape[1])):
        return NotImplemented

    def compute(x: np.ndarray, *parameters: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        call(name, rows(x, y, x.shape[-1]), *parameters, float(eps))
        return y

    def backward(x: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
        weight, dy = others[0], others[-1]
        dx, dparameters = np.empty_like(x), np.empty((len(parameters), x.shape[-1]), np.float32)
        call(f"{name}_backward", rows(x, dx, x.shape[-1]), weight, dy, dparameters, float(eps))
        return [dx, *dparameters]

    return _now(compute, lambda *arrays: in_mlx(*arrays, eps), x, *parameters, backward=backward)


@operations.cross_entropy.register
def cross_entropy(logits: mx.array, ids: mx.array) -> mx.array:
    """In MLX's Linux wheels exp is a scalar function, and of a vocabulary that takes a tenth of a prompt's time."""
    if not available() or logits.ndim != 3 or logits.dtype != mx.float32 or not have_values(ids):
        return NotImplemented
    B, T, V = logits.shape
    chosen = (np.arange(B)[:, None], np.arange(T), np.array(ids))

    def log_sum_exp(logits: np.ndarray) -> np.ndarray:
        y = np.empty((B, T), np.float32)
        call("mlx_ttt_log_sum_exp", logits, y, y.size, V)
        return y

    def compute(logits: np.ndarray) -> list[np.ndarray]:
        return [log_sum_exp(logits) - logits[chosen]]

    def backward(logits: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
        """dy (softmax(logits) - 1 at the token's place)"""
        dx = np.empty_like(logits)
        call("mlx_ttt_softmax", rows(logits, dx, V), log_sum_exp(logits), dy)
        dx[chosen] -= dy
        return [dx]

    def in_mlx(logits: mx.array) -> list[mx.array]:
        return [operations.cross_entropy.in_mlx(logits, ids)]

    return at_once(compute, in_mlx, logits, dtypes=[mx.float32], backward=backward)[0]


@operations.swiglu.register
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return _gated(operations.swiglu.in_mlx, gate, x, is_gelu=0)


@operations.geglu.register
def geglu(gate: mx.array, x: mx.array) -> mx.array:
    return _gated(operations.geglu.in_mlx, gate, x, is_gelu=1)


def _gated(in_mlx: Callable, gate: mx.array, x: mx.array, is_gelu: int) -> mx.array:
    if not (x.ndim == 3 and gate.shape == x.shape and worthwhile(x.shape[1])):
        return NotImplemented

    def compute(gate: np.ndarray, x: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        call("mlx_ttt_activate", gate, x, y, x.size, is_gelu)
        return y

    def backward(gate: np.ndarray, x: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
        dgate, dx = np.empty_like(gate), np.empty_like(x)
        addresses = [None if a is None else a.ctypes.data for a in (gate, x, dy, None, dgate, dx)]
        call("mlx_ttt_activate_backward", ctypes.byref(_Activation(*addresses, x.size, is_gelu)))
        return [dgate, dx]

    return _now(compute, in_mlx, gate, x, backward=backward)


class _Activation(ctypes.Structure):
    """struct activation of c/operations.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "factor", "dy", "y", "dx", "dfactor")),
        ("size", ctypes.c_size_t),
        ("gelu", ctypes.c_int),
    ]


@operations.causal_conv1d.register
def causal_conv1d(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    kernel, C = weight.shape[1], x.shape[2]
    if weight.shape != (C, kernel, 1) or bias.shape != (C,) or not worthwhile(x.shape[1] - kernel + 1):
        return NotImplemented

    def compute(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        B, T = x.shape[0], x.shape[1] - kernel + 1
        y = np.empty((B, T, C), np.float32)
        taps = np.ascontiguousarray(weight[..., 0].T)  # [kernel, C]
        call("mlx_ttt_convolve", rows(x, y, C), taps, bias, T, kernel)
        return y

    def backward(x: np.ndarray, weight: np.ndarray, _: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
        dx, dparameters = np.empty_like(x), np.empty((kernel + 1, C), np.float32)
        taps = np.ascontiguousarray(weight[..., 0].T)
        call("mlx_ttt_convolve_backward", rows(x, dx, C), taps, dy, dparameters, dy.shape[1], kernel)
        return [dx, np.ascontiguousarray(dparameters[:-1].T)[..., None], dparameters[-1]]

    return _now(compute, operations.causal_conv1d.in_mlx, x, weight, bias, backward=backward)


@operations.rotate.register
def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    B, T, _, D = x.shape
    fit = D % 2 == 0 and cos.shape == sin.shape and cos.shape in ((1, T, 1, D), (B, T, 1, D))
    if not (fit and worthwhile(T)):
        return NotImplemented

    def compute(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        H, D = x.shape[2:]
        y = np.empty_like(x)
        call("mlx_ttt_rotate", rows(x, y, H * D), cos, sin, D, cos.size // D)
        return y

    def backward(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
        axes = (2,) if len(cos) == B else (0, 2)  # that a table does not have
        dcos, dsin = ((dy * other).sum(axes, keepdims=True) for other in (x, _swapped(x)))
        return [compute(dy, cos, _swapped(sin)), dcos, dsin]

    return _now(compute, operations.rotate.in_mlx, x, cos, sin, backward=backward).astype(x.dtype)


def _swapped(x: np.ndarray) -> np.ndarray:
    """x [..., D] with the numbers of each adjacent pair in the other order."""
    return np.ascontiguousarray(x.reshape(*x.shape[:-1], -1, 2)[..., ::-1]).reshape(x.shape)


@operations.sigmoid.register
def sigmoid(x: mx.array) -> mx.array:
    """Within 4e-7. In MLX's Linux wheels exp is a scalar function, five times slower than all of this.

    exp(-x) is the eighth power of exp(-x / 8), which is near its Padé approximant [3/3], (even - odd) / (even + odd).
    """
    many = x.size >= 4096
    if not many or x.dtype != mx.float32 or sys.platform != "linux" or mx.default_device() != mx.cpu:
        return NotImplemented
    y = mx.clip(0.125 * x, -4, 4)
    y_sq = y.square()
    even, odd = 0.1 * y_sq + 1, y * (y_sq / 120 + 0.5)
    exp = ((even - odd) / (even + odd)).square().square().square()
    return 1 / (1 + exp)
