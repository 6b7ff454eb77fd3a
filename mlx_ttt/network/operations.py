"""The operations between the matrix products: norms, activations, convolutions and rotations.

Each is a pure function of arrays that a backend may replace.
"""

from __future__ import annotations

import math

import mlx.core as mx

from .backend import replaceable

_SLOPE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # gelu(x) = x sigmoid(SLOPE (x + CUBIC x^3))


@replaceable
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x [..., C] divided by its root mean square, times weight [C]."""
    return mx.fast.rms_norm(x, weight, eps)


@replaceable
def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """x [..., C] less its mean, divided by its standard deviation, times weight [C], plus bias [C]."""
    return mx.fast.layer_norm(x, weight, bias, eps)


@replaceable
def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x))"""
    return mx.sigmoid(x)


@replaceable
def cross_entropy(logits: mx.array, ids: mx.array) -> mx.array:
    """-log probability of each token given the logits before it, in nats: [B, T, V] and [B, T] -> float32 [B, T]."""
    logits = logits.astype(mx.float32)
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]


@replaceable
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) x, both [B, T, C]. (mlx.nn compiles it, which on Linux takes a C++ compiler and a second.)"""
    return gate * sigmoid(gate) * x


@replaceable
def geglu(gate: mx.array, x: mx.array) -> mx.array:
    """gelu(gate) x, both [B, T, C]."""
    return gelu(gate) * x


def gelu(x: mx.array) -> mx.array:
    """The tanh GELU, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return x * sigmoid(x * (_SLOPE * _CUBIC * x.square() + _SLOPE))


def gelu_and_grad(x: mx.array) -> tuple[mx.array, mx.array]:
    """The tanh GELU and its derivative."""
    x_sq = x.square()
    s = sigmoid(x * (_SLOPE * _CUBIC * x_sq + _SLOPE))
    y = x * s
    return y, s + (y - y * s) * (3 * _SLOPE * _CUBIC * x_sq + _SLOPE)


@replaceable
def causal_conv1d(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Depthwise convolution over time.

    Args:
        x: the inputs with the kernel - 1 before them, [B, kernel - 1 + T, C].
        weight: [C, kernel, 1].
        bias: [C].

    Returns:
        [B, T, C]
    """
    taps = weight[..., 0].T  # [kernel, C]
    kernel = taps.shape[0]
    T = x.shape[1] - kernel + 1
    if T == 1:
        return (x * taps).sum(1, keepdims=True) + bias
    # A sum of shifted products is three times faster on a CPU than MLX's grouped convolution.
    return sum((x[:, i : i + T] * taps[i] for i in range(kernel)), bias)


@replaceable
def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotates adjacent pairs of x [B, T, H, D]; cos and sin [B or 1, T, 1, D]. In float32, returned in x's dtype."""
    swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return (x * cos + swapped * sin).astype(x.dtype)
