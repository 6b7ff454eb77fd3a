"""The network's operations in NumPy and float64, and modules with random parameters to compare with them."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ttt.network.model import CausalConv1d, LayerNorm

EPS = 1e-3  # large enough to be seen


def exact_sigmoid(x):
    return 1 / (1 + np.exp(-x))


def exact_silu(x):
    return x * exact_sigmoid(x)


def exact_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(kind: type, C: int) -> nn.Module:
    """An RMSNorm or LayerNorm."""
    module = kind(C, eps=EPS)
    module.update({name: mx.random.normal(w.shape) for name, w in module.parameters().items()})
    return module


def exact_norm(module: nn.Module, x: mx.array) -> np.ndarray:
    x = np.array(x.astype(mx.float32), np.float64)
    if isinstance(module, LayerNorm):
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + float(module.eps)) * np.array(module.weight, np.float64)
    return y + np.array(module.bias, np.float64) if isinstance(module, LayerNorm) else y


def convolution(kernel: int, C: int) -> CausalConv1d:
    conv = CausalConv1d(C, kernel)
    conv.bias = mx.random.normal((C,))
    return conv


def exact_conv(conv: CausalConv1d, x: mx.array) -> np.ndarray:
    weight, bias, x = (np.array(a, np.float64) for a in (conv.weight[..., 0].T, conv.bias, x))
    T = x.shape[1] - len(weight) + 1
    return sum((x[:, i : i + T] * weight[i] for i in range(len(weight))), bias)


def rotated(x: mx.array, phase: list[int], K: int, theta: float, back: bool = False) -> np.ndarray:
    """RoPE: pairs as complex numbers, turned by their angle."""
    x = np.array(x.astype(mx.float32), np.float64)
    _, T, _, D = x.shape
    slots = (np.array(phase)[:, None] + np.arange(T)) % K
    turns = np.exp(1j * slots[..., None] * theta ** (-np.arange(0, D, 2) / D))[:, :, None]  # [B, T, 1, D / 2]
    turns = turns.conj() if back else turns
    return np.ascontiguousarray((x[..., ::2] + 1j * x[..., 1::2]) * turns).view(np.float64)
