"""Norms, activations, convolutions and rotations against NumPy in float64, for few tokens and many.

Where a backend has a version for many tokens, that is what is tested here.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ttt.network.model import CausalConv1d, LayerNorm, RMSNorm, RoPE
from mlx_ttt.network.operations import geglu, gelu, gelu_and_grad, rotate, sigmoid, swiglu

from .exact import convolution, exact_conv, exact_gelu, exact_norm, exact_sigmoid, exact_silu, norm, rotated

# ---- Activations -----------------------------------------------------------------------------------------------------

FEW, MANY = 1001, 100_001  # elements
INFINITE = [float("inf"), float("-inf"), 1e30, -1e30]


def inputs(n: int, dtype=mx.float32) -> mx.array:
    return mx.linspace(-40, 40, n).astype(dtype)


def silu(x: mx.array) -> mx.array:
    return swiglu(x, mx.ones_like(x))


def exact(x: mx.array, function) -> np.ndarray:
    return function(np.array(x.astype(mx.float32), dtype=np.float64))


@pytest.mark.parametrize("n", [FEW, MANY])
@pytest.mark.parametrize(("function", "expected"), [(sigmoid, exact_sigmoid), (silu, exact_silu), (gelu, exact_gelu)])
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
def test_activations_in_half_precision_keep_the_dtype(dtype):
    x = inputs(MANY, dtype)
    y = silu(x)
    assert y.dtype == dtype
    assert np.allclose(np.array(y.astype(mx.float32)), exact(x, exact_silu), rtol=2e-2, atol=1e-2)


# ---- Norms -----------------------------------------------------------------------------------------------------------

both = pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])


@both
@pytest.mark.parametrize("T", [1, 15, 16, 700])
def test_any_number_of_tokens_and_channels(kind, T):
    """The largest is shared by several threads in C."""
    for C in (1, 7, 16, 83):
        module, x = norm(kind, C), 3 + 2 * mx.random.normal((3, T, C))
        y = module(x)
        assert y.shape == x.shape
        assert np.allclose(y, exact_norm(module, x), rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("T", [15, 16])
@pytest.mark.parametrize("eps", [0, 1, np.float32(1e-3), np.float64(1e-3)], ids=repr)
def test_any_number_is_an_eps(kind, T, eps):
    module, x = norm(kind, 40), mx.random.normal((1, T, 40))
    module.eps = eps
    assert np.allclose(module(x), exact_norm(module, x), rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("dtypes", [(mx.bfloat16, mx.float32), (mx.float32, mx.bfloat16), (mx.bfloat16, mx.float16)])
def test_the_dtype_does_not_depend_on_the_number_of_tokens(kind, dtypes):
    module, x = norm(kind, 8), mx.random.normal((1, 16, 8)).astype(dtypes[0])
    module.set_dtype(dtypes[1])
    assert module(x).dtype == module(x[:, :15]).dtype == mx.float32


@both
@pytest.mark.parametrize("shape", [(8,), (20, 8), (2, 20, 3, 8)])
def test_any_number_of_axes(kind, shape):
    module, x = norm(kind, 8), mx.random.normal(shape)
    assert np.allclose(module(x), exact_norm(module, x), rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("T", [15, 16])
def test_parameters_of_another_size_are_refused(kind, T):
    with pytest.raises(ValueError):
        mx.eval(norm(kind, 8)(mx.ones((1, T, 40))))


@pytest.mark.parametrize("T", [15, 16])
@pytest.mark.parametrize("options", [{"bias": False}, {"affine": False}], ids=str)
def test_layer_norm_with_fewer_parameters(options, T):
    x = mx.random.normal((1, T, 24))
    assert mx.allclose(LayerNorm(24, **options)(x), nn.LayerNorm(24, **options)(x), atol=1e-6)


# ---- Convolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 15, 16, 40])
@pytest.mark.parametrize("kernel", range(1, 6))
def test_any_convolution_and_number_of_tokens(kernel, T):
    for C in (1, 12, 37):
        conv, x = convolution(kernel, C), mx.random.normal((3, kernel - 1 + T, C))
        y = conv(x)
        assert y.shape == (3, T, C)
        assert np.allclose(y, exact_conv(conv, x), rtol=1e-5, atol=1e-6)


# ---- Rotations -------------------------------------------------------------------------------------------------------

THETA, K = 100.0, 5


@pytest.mark.parametrize("T", [1, 15, 16, 37, 700])
@pytest.mark.parametrize("phase", [[0], [3], [2, 2], [4, 0, 1]], ids=str)
def test_rotation_from_any_phase(phase, T):
    """Given as integers, or as an array, as the compiled decode step does it."""
    for H, D in ((1, 2), (3, 6), (2, 16)):
        rope, q, k = RoPE(D, K, THETA), *mx.random.normal((2, len(phase), T, H, D))
        for given in (phase, mx.array(phase, mx.int32)):
            for x, found in zip((q, k), rope(q, k, given), strict=True):
                assert np.allclose(found, rotated(x, phase, K, THETA), atol=1e-6)


def test_what_does_not_fit_together_is_refused_however_many_tokens():
    """Where MLX would broadcast, it is broadcast."""

    def table(B: int, T: int) -> tuple[mx.array, mx.array]:
        return mx.ones((B, T, 1, 8)), mx.ones((B, T, 1, 8))

    for T in (5, 20):
        assert rotate(mx.ones((1, T, 2, 8)), *table(3, T)).shape == (3, T, 2, 8)
        assert swiglu(mx.ones((3, T, 8)), mx.ones((1, T, 8))).shape == (3, T, 8)
        wide = CausalConv1d(8, 4)
        wide.bias = mx.ones((1,))
        assert wide(mx.ones((1, T + 3, 8))).shape == (1, T, 8)
        for refused in (
            lambda T=T: rotate(mx.ones((1, T, 2, 8)), *table(1, T + 1)),
            lambda T=T: rotate(mx.ones((1, T, 2, 6)), *table(1, T)),
            lambda T=T: geglu(mx.ones((1, T, 8)), mx.ones((1, T + 1, 8))),
            lambda T=T: CausalConv1d(8, 4)(mx.ones((1, T + 3, 16))),
        ):
            with pytest.raises(ValueError):
                mx.eval(refused())
