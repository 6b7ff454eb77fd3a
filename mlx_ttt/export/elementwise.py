"""Norms and the GELU's derivative, written so that half precision neither overflows nor loses eps.

The norms work along the last axis. All compute in the number type of their argument, which constants must have, too.
"""

from __future__ import annotations

import math

import numpy as np

from .operations import Operations, Value

EPS = 1e-6  # of the inner model's LayerNorm and of post_norm


def normalize(ops: Operations, x: Value, eps: float, centred: bool) -> tuple[Value, Value, Value]:
    """x / s with s = sqrt(mean x² + eps).

    The squares of x may overflow in half precision, and eps may vanish beside them. So x is divided by its largest
    element first.

    Args:
        ops: of a lowering.
        x: [..., N].
        eps: is added to the mean of the squares.
        centred: subtract the mean of x first.

    Returns:
        x / s [..., N]; and `inverse` and `largest` [..., 1] with 1 / s = inverse / largest, of which neither overflows.
    """
    floor = ops.number_type(x)(math.sqrt(eps))
    if centred:
        x = ops.sub(x, ops.reduce_mean(x, axis=-1))
    largest = ops.maximum(ops.reduce_max(ops.abs(x), axis=-1), floor)
    scaled = ops.div(x, largest)  # in [-1, 1]
    mean = ops.reduce_mean(ops.square(scaled), axis=-1)
    scaled_eps = ops.square(ops.div(floor, largest))
    inverse = ops.rsqrt(ops.add(mean, scaled_eps))
    return ops.mul(scaled, inverse), inverse, largest


def rms_norm(ops: Operations, x: Value, weight: np.ndarray, eps: float) -> Value:
    """x / sqrt(mean x² + eps) · weight: x [1, T, C], weight [C]."""
    return ops.mul(normalize(ops, x, eps, centred=False)[0], weight)


def layer_norm(ops: Operations, x: Value, weight: np.ndarray, bias: np.ndarray) -> Value:
    """LN(x) = (x - mean x) / sqrt(var x + EPS) · weight + bias: x [..., N], weight and bias [..., N]."""
    return ops.add(ops.mul(normalize(ops, x, EPS, centred=True)[0], weight), bias)


def miss_and_grad(ops: Operations, z: Value, aim: Value, gamma: np.ndarray, beta: np.ndarray) -> tuple[Value, Value]:
    """LN(z) - aim, and the gradient of ‖LN(z) - aim‖² / 2 with respect to z, each of z's shape.

    With ẑ the normalized z, s its standard deviation and u = (LN(z) - aim) gamma it is (u - mean u - ẑ mean(u ẑ)) / s.

    Args:
        ops: of a lowering.
        z, aim: [1, H, n, D].
        gamma, beta: [1, H, 1, D].
    """
    z_hat, inverse, largest = normalize(ops, z, EPS, centred=True)
    miss = ops.sub(ops.add(ops.mul(z_hat, gamma), beta), aim)
    u = ops.mul(miss, gamma)
    mean = ops.reduce_mean(u, axis=-1)
    along = ops.reduce_mean(ops.mul(u, z_hat), axis=-1)
    g = ops.sub(ops.sub(u, mean), ops.mul(z_hat, along))
    return miss, ops.mul(g, ops.div(inverse, largest))


def sqrt(ops: Operations, x: Value) -> Value:
    """Of numbers that are zero or at least 1e-36, in float32."""
    return ops.mul(x, ops.rsqrt(ops.maximum(x, np.float32(1e-36))))


def gelu_and_grad(ops: Operations, z: Value) -> tuple[Value, Value]:
    """The tanh GELU of z and its derivative, each of z's shape."""
    c, a, number = math.sqrt(2 / math.pi), 0.044715, ops.number_type(z)
    z_sq = ops.square(ops.clip(z, -16, 16))  # beyond, tanh is ±1
    inside = ops.mul(z, ops.add(ops.mul(z_sq, number(c * a)), number(c)))
    tanh = ops.tanh(inside)
    half = ops.add(ops.mul(tanh, number(0.5)), number(0.5))
    slope = ops.add(ops.mul(z_sq, number(3 * a * c / 2)), number(c / 2))
    bend = ops.mul(z, ops.sub(number(1), ops.square(tanh)))
    return ops.mul(z, half), ops.add(half, ops.mul(bend, slope))
