"""The activations against NumPy in float64, in the sizes and dtypes that take different forms."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.activations import gelu, gelu_and_grad, sigmoid, silu

FEW, MANY = 1001, 100_001
INFINITE = [float("inf"), float("-inf"), 1e30, -1e30]


def inputs(n: int, dtype=mx.float32) -> mx.array:
    return mx.linspace(-40, 40, n).astype(dtype)


def exact(x: mx.array, function) -> np.ndarray:
    return function(np.array(x.astype(mx.float32), dtype=np.float64))


def exact_sigmoid(x):
    return 1 / (1 + np.exp(-x))


def exact_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("n", [FEW, MANY])
@pytest.mark.parametrize(
    ("function", "expected"),
    [(sigmoid, exact_sigmoid), (silu, lambda x: x * exact_sigmoid(x)), (gelu, exact_gelu)],
)
def test_values(function, expected, n):
    x = inputs(n)
    error = np.abs(np.array(function(x)) - exact(x, expected))
    assert (error <= 4e-7 * np.maximum(1, np.abs(np.array(x)))).all()


@pytest.mark.parametrize("n", [FEW, MANY])
def test_gradients(n):
    x = inputs(n)
    y, gradient = gelu_and_grad(x)
    assert np.allclose(y, gelu(x), atol=1e-6)
    h = 1e-6
    expected = exact(x, lambda z: (exact_gelu(z + h) - exact_gelu(z - h)) / (2 * h))
    for found in (gradient, mx.grad(lambda z: gelu(z).sum())(x)):
        assert np.allclose(found, expected, atol=5e-6)


def test_many_large_and_infinite_inputs():
    x = mx.array(INFINITE * 2000)
    assert np.allclose(sigmoid(x).reshape(-1, 4), mx.array([1.0, 0, 1, 0]), atol=1e-12)
    assert mx.isnan(sigmoid(mx.full((MANY,), float("nan")))).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    x = inputs(MANY, dtype)
    y = silu(x)
    assert y.dtype == dtype
    expected = exact(x, lambda z: z * exact_sigmoid(z))
    assert np.allclose(np.array(y.astype(mx.float32)), expected, rtol=2e-2, atol=1e-2)
