"""The activations against NumPy in float64, in the sizes and dtypes that take different forms."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.activations import gelu, gelu_and_grad, gelu_times, sigmoid, silu, silu_times

from .native import needs_native

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


# In C


def exact_silu(x):
    return x * exact_sigmoid(x)


@needs_native
@pytest.mark.parametrize("C", [1, 7, 8, 1003])
@pytest.mark.parametrize(("function", "expected"), [(silu_times, exact_silu), (gelu_times, exact_gelu)])
def test_values_times_another(function, expected, C, spy):
    """Sizes that do not divide into vectors; the last one in several threads."""
    x, y = inputs(2 * 20 * C).reshape(2, 20, C), mx.random.normal((2, 20, C))
    found = function(x, y)
    assert spy.taken() == {"activate"}
    error = np.abs(np.array(found) - exact(x, expected) * np.array(y))
    assert (error <= 5e-7 * np.abs(np.array(y)) * np.maximum(1, np.abs(np.array(x)))).all()


@needs_native
@pytest.mark.parametrize("function", [silu_times, gelu_times])
def test_large_and_infinite_inputs_times_another(function):
    large = [1e4, float("inf"), 1e30, float("nan"), -1e4, float("-inf"), -1e30, -89.0, -60.0]
    x = mx.repeat(mx.array(large)[None, :, None], 19, axis=1)
    found = function(x, mx.ones_like(x)).reshape(9, 19)
    assert (found == found[:, :1])[mx.array([0, 1, 2, 4, 5, 6, 7, 8])].all()  # whole vectors and the rest
    assert np.allclose(found[:3, 0], large[:3], rtol=1e-6)
    assert mx.isnan(found[3]).all()
    assert mx.abs(found[4:]).max() <= 1e-20


@needs_native
@pytest.mark.parametrize(("function", "operation"), [(silu_times, silu), (gelu_times, gelu)])
def test_gradients_of_products(function, operation, spy):
    x, y = mx.random.normal((2, 20, 7)), mx.random.normal((2, 20, 7))
    found = mx.grad(lambda x, y: function(x, y).square().sum(), argnums=(0, 1))(x, y)
    assert spy.taken() == {"activate"}
    expected = mx.grad(lambda x, y: (operation(x) * y).square().sum(), argnums=(0, 1))(x, y)
    for g, g_expected in zip(found, expected, strict=True):
        assert np.allclose(g, g_expected, rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_products_in_half_precision(dtype):
    x, y = (mx.random.normal((1, 20, 9)).astype(dtype) for _ in range(2))
    found = gelu_times(x, y)
    assert found.dtype == dtype
    assert np.allclose(found.astype(mx.float32), exact(x, exact_gelu) * exact(y, lambda z: z), rtol=1e-2, atol=1e-6)
