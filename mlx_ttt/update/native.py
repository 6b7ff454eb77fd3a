"""The update rule in C, for long inputs on a Linux CPU: see :mod:`mlx_ttt.native`."""

from __future__ import annotations

import ctypes

import mlx.core as mx
import numpy as np

from .. import native
from . import dual


def supports(q: mx.array) -> bool:
    """Whether tokens like q [B, T, H, D] are read in C."""
    _, T, _, D = q.shape
    return native.available(T) and D % 8 == 0


def ttt_linear(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-Linear, f(x) = x W1 + b1. See :func:`mlx_ttt.update.ttt_linear`."""
    return _read(dual.ttt_linear, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def ttt_mlp(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-MLP, f(x) = gelu(x W1 + b1) W2 + b2. See :func:`mlx_ttt.update.ttt_mlp`."""
    return _read(dual.ttt_mlp, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


class _Call(ctypes.Structure):
    """struct call of update.c."""

    _fields_ = [(name, ctypes.c_int) for name in ("mlp", "T", "H", "D", "K")] + [
        (name, ctypes.c_void_p)
        for name in ("q", "k", "v", "lr", "t", "gamma", "beta", "phase", "length", "y", "W1", "b1", "W2", "b2", "rows")
    ]


def _read(rule, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths):
    B, T, H, D = q.shape
    lengths = [T] * B if lengths is None else lengths

    def function(*arrays: np.ndarray) -> list[np.ndarray]:
        *inputs, phases, counts = *arrays[:7], np.array(phase, np.int32), np.array(lengths, np.int32)
        y = np.zeros((B, T, H, D), np.float32)
        *new_weights, new_rows = (x.copy() for x in arrays[7:])
        pointers = [*inputs, phases, counts, y, *new_weights, *[None] * (4 - len(new_weights)), new_rows]
        addresses = [None if x is None else x.ctypes.data for x in pointers]
        call = _Call(len(new_weights) == 4, T, H, D, new_rows.shape[2], *addresses)
        native.call("mlx_ttt_update", ctypes.byref(call), B)
        return [y, *new_weights, new_rows]

    def operations(*arrays):
        y, weights, rows = rule(*arrays[:7], arrays[7:-1], arrays[-1], phase, lengths)
        return [y, *weights, rows]

    y, *weights, rows = native.at_once(function, operations, q, k, v, lr, t, gamma, beta, *weights, rows)
    return y, tuple(weights), rows
