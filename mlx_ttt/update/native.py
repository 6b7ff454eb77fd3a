"""The update rule in C, on a Linux CPU: see :mod:`mlx_ttt.native`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .. import native
from . import dual


def supports(q: mx.array, K: int) -> bool:
    """Whether tokens like q [B, T, H, D] are read in C, in mini-batches of K."""
    _, T, _, D = q.shape
    return native.worthwhile(T) and D % native.LANES == 0 and K <= native.LARGEST_MINI_BATCH


def ttt_linear(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-Linear, f(x) = x W1 + b1. See :func:`mlx_ttt.update.ttt_linear`."""
    return _read(dual.ttt_linear, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def ttt_mlp(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-MLP, f(x) = gelu(x W1 + b1) W2 + b2. See :func:`mlx_ttt.update.ttt_mlp`."""
    return _read(dual.ttt_mlp, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def _read(rule, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths):
    lengths = [q.shape[1]] * q.shape[0] if lengths is None else lengths

    def function(*arrays):
        return _compute(arrays, phase, lengths)

    def operations(*arrays):
        y, weights, rows = rule(*arrays[:7], arrays[7:-1], arrays[-1], phase, lengths)
        return [y, *weights, rows]

    y, *weights, rows = native.at_once(function, operations, q, k, v, lr, t, gamma, beta, *weights, rows, dtype=q.dtype)
    return y, tuple(weights), rows


class _Call(ctypes.Structure):
    """struct call of update.c."""

    _fields_ = [(name, ctypes.c_int) for name in ("mlp", "T", "H", "D", "K")] + [
        (name, ctypes.c_void_p)
        for name in ("q", "k", "v", "lr", "t", "gamma", "beta", "phase", "length", "y", "W1", "b1", "W2", "b2", "rows")
    ]


def _compute(arrays: Sequence[np.ndarray], phase: Sequence[int], lengths: Sequence[int]) -> list[np.ndarray]:
    """arrays: q, k, v, lr, t, gamma, beta, the weights, rows. Returns y, and the weights and rows after the tokens."""
    *inputs, phases, counts = *arrays[:7], np.array(phase, np.int32), np.array(lengths, np.int32)
    *weights, rows = (x.copy() for x in arrays[7:])
    (B, T, H, D), K = inputs[0].shape, rows.shape[2]
    y = np.zeros((B, T, H, D), np.float32)
    pointers = [*inputs, phases, counts, y, *weights, *[None] * (4 - len(weights)), rows]
    addresses = [None if x is None else x.ctypes.data for x in pointers]
    native.call("mlx_ttt_update", ctypes.byref(_Call(len(weights) == 4, T, H, D, K, *addresses)), B)
    return [y, *weights, rows]
