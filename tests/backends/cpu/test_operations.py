"""Norms, activations, convolutions and rotations in C: values, gradients and dtypes.

Sizes are in tests/network/test_operations.py.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.network.model import LayerNorm, RMSNorm, RoPE
from mlx_ttt.network.operations import cross_entropy, geglu, gelu, rotate, sigmoid, swiglu

from ...network.exact import convolution, exact_conv, exact_gelu, exact_norm, exact_silu, norm, rotated
from .c_code import needs_c, without_c

pytestmark = needs_c

half = pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])


# ---- Cross entropy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 7, 8, 61, 1003])
@pytest.mark.parametrize("T", [1, 33])
def test_cross_entropy(V, T, spy):
    """Values and gradients, beside float64."""
    logits, ids = mx.random.normal((2, T, V), scale=20), mx.random.randint(0, V, (2, T))
    weights = mx.random.normal((2, T))
    found, gradient = mx.value_and_grad(lambda x: (cross_entropy(x, ids) * weights).sum())(logits)
    assert spy.taken() == {"log_sum_exp", "softmax"}
    exact = np.array(logits, np.float64)
    log_sum = np.log(np.exp(exact).sum(-1, keepdims=True))
    chosen = np.arange(V) == np.array(ids)[..., None]
    wanted = ((log_sum - exact) * chosen).sum(-1)
    assert np.abs(np.array(cross_entropy(logits, ids)) - wanted).max() <= 2e-6 * np.abs(exact).max() + 1e-6
    assert found.item() == pytest.approx((wanted * np.array(weights)).sum(), rel=1e-5, abs=1e-4)
    exact_gradient = (np.exp(exact - log_sum) - chosen) * np.array(weights)[..., None]
    assert np.abs(np.array(gradient) - exact_gradient).max() <= 1e-5


@pytest.mark.parametrize("V", [5, 24])
@pytest.mark.parametrize("place", [1, 3, -1])
def test_cross_entropy_of_what_is_no_number(V, place):
    """The token has the logit 0."""
    for value, expected in ((mx.nan, mx.nan), (-mx.inf, np.log(V - 1)), (200.0, 200.0)):
        logits = mx.zeros((1, 1, V))
        logits[..., place] = value
        found, gradient = mx.value_and_grad(lambda x: cross_entropy(x, mx.array([[0]])).sum())(logits)
        assert np.allclose(found.item(), expected, rtol=1e-6, equal_nan=True)
        assert mx.isnan(gradient).all().item() == bool(np.isnan(expected))


# ---- Activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1, 7, 8, 1003])
@pytest.mark.parametrize(("function", "expected"), [(swiglu, exact_silu), (geglu, exact_gelu)])
def test_gated_values(function, expected, C, spy):
    """Sizes that do not divide into vectors; the last one in several threads."""
    gate, x = mx.linspace(-40, 40, 2 * 20 * C).reshape(2, 20, C), mx.random.normal((2, 20, C))
    found = function(gate, x)
    assert spy.taken() == {"activate"}
    error = np.abs(np.array(found) - expected(np.array(gate, np.float64)) * np.array(x))
    assert (error <= 5e-7 * np.abs(np.array(x)) * np.maximum(1, np.abs(np.array(gate)))).all()


@pytest.mark.parametrize("function", [swiglu, geglu])
def test_large_and_infinite_gates(function):
    large = [1e4, float("inf"), 1e30, float("nan"), -1e4, float("-inf"), -1e30, -89.0, -60.0]
    gate = mx.repeat(mx.array(large)[None, :, None], 19, axis=1)
    found = function(gate, mx.ones_like(gate)).reshape(9, 19)
    assert (found == found[:, :1])[mx.array([0, 1, 2, 4, 5, 6, 7, 8])].all()  # whole vectors and the rest
    assert np.allclose(found[:3, 0], large[:3], rtol=1e-6)
    assert mx.isnan(found[3]).all()
    assert mx.abs(found[4:]).max() <= 1e-20


@pytest.mark.parametrize(
    ("function", "operation"), [(swiglu, lambda gate: gate * sigmoid(gate)), (geglu, gelu)], ids=["swiglu", "geglu"]
)
def test_gradients_of_gates(function, operation, spy):
    gate, x = mx.random.normal((2, 20, 7)), mx.random.normal((2, 20, 7))
    found = mx.grad(lambda gate, x: function(gate, x).square().sum(), argnums=(0, 1))(gate, x)
    assert spy.taken() == {"activate", "activate_backward"}
    expected = mx.grad(lambda gate, x: (operation(gate) * x).square().sum(), argnums=(0, 1))(gate, x)
    for g, g_expected in zip(found, expected, strict=True):
        assert np.allclose(g, g_expected, rtol=1e-5, atol=1e-6)


@half
def test_gates_in_half_precision(dtype):
    gate, x = (mx.random.normal((1, 20, 9)).astype(dtype) for _ in range(2))
    found = geglu(gate, x)
    assert found.dtype == dtype
    gate, x = (np.array(a.astype(mx.float32), np.float64) for a in (gate, x))
    assert np.allclose(found.astype(mx.float32), exact_gelu(gate) * x, rtol=1e-2, atol=1e-6)


# ---- Norms -----------------------------------------------------------------------------------------------------------

NAMES = {RMSNorm: "rms_norm", LayerNorm: "layer_norm"}
both = pytest.mark.parametrize("kind", NAMES, ids=NAMES.values())


@both
def test_small_and_large_inputs(kind, spy):
    """Of a mean far from zero, too, and of nothing but zeros."""
    module = norm(kind, 40)
    for x in (1e-4 * mx.random.normal((1, 16, 40)), 1e6 * mx.random.normal((1, 16, 40)), mx.zeros((1, 16, 40))):
        assert np.allclose(module(x), exact_norm(module, x), rtol=1e-5, atol=1e-5)
    x = 1000 + mx.random.normal((1, 16, 40))
    assert np.allclose(module(x), exact_norm(module, x), atol=2e-3)
    assert spy.taken() == {NAMES[kind]}


@both
def test_gradients_of_norms_are_those_of_mlx_operations(kind, spy, monkeypatch):
    module, x = norm(kind, 9), mx.random.normal((2, 20, 9))

    def gradients():
        def function(x, parameters):
            module.update(parameters)
            return module(x).square().sum()

        of_x, of_parameters = mx.grad(function, argnums=(0, 1))(x, dict(module.parameters()))
        return [of_x, *of_parameters.values()]

    found = gradients()
    assert spy.taken() == {NAMES[kind], f"{NAMES[kind]}_backward"}
    for g, expected in zip(found, without_c(monkeypatch, gradients), strict=True):
        assert np.allclose(g, expected, rtol=1e-5, atol=1e-5)


@both
@half
def test_norms_in_half_precision(kind, dtype, spy):
    module, x = norm(kind, 24), mx.random.normal((1, 20, 24)).astype(dtype)
    module.set_dtype(dtype)
    y = module(x)
    assert spy.taken() == {NAMES[kind]} and y.dtype == dtype
    module.set_dtype(mx.float32)
    assert np.allclose(y.astype(mx.float32), exact_norm(module, x), rtol=1e-2, atol=1e-2)


# ---- Convolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", range(1, 6))
def test_gradients_of_convolutions_are_those_of_mlx_operations(kernel, spy, monkeypatch):
    conv, x = convolution(kernel, 9), mx.random.normal((2, kernel - 1 + 20, 9))

    def gradients():
        def function(x, weight, bias):
            conv.weight, conv.bias = weight, bias
            return conv(x).square().sum()

        return mx.grad(function, argnums=(0, 1, 2))(x, conv.weight, conv.bias)

    found = gradients()
    assert spy.taken() == {"convolve", "convolve_backward"}
    for g, expected in zip(found, without_c(monkeypatch, gradients), strict=True):
        assert np.allclose(g, expected, rtol=1e-5, atol=1e-5)


@half
def test_convolutions_in_half_precision(dtype, spy):
    conv = convolution(4, 24)
    conv.set_dtype(dtype)
    x = mx.random.normal((1, 23, 24)).astype(dtype)
    y = conv(x)
    assert spy.taken() == {"convolve"} and y.dtype == dtype
    x, conv.weight, conv.bias = (a.astype(mx.float32) for a in (x, conv.weight, conv.bias))
    assert np.allclose(y.astype(mx.float32), exact_conv(conv, x), rtol=1e-2, atol=1e-2)


# ---- Rotations -------------------------------------------------------------------------------------------------------

THETA, K = 100.0, 5


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rotations_and_their_gradient(dtype, spy):
    rope, phase = RoPE(8, K, THETA), [1, 4]
    q, k, factors = mx.random.normal((3, 2, 20, 3, 8)).astype(dtype)
    bound = {mx.float32: 1e-6}.get(dtype, 3e-2)
    found = rope(q, k, phase)
    assert spy.taken() == {"rotate"}
    for x, y in zip((q, k), found, strict=True):
        assert y.dtype == dtype
        assert np.allclose(y.astype(mx.float32), rotated(x, phase, K, THETA), atol=bound)
    gradient = mx.grad(lambda q: (rope(q, k, phase)[0] * factors).sum())(q)
    assert spy.taken() == {"rotate"} and gradient.dtype == dtype
    assert np.allclose(gradient.astype(mx.float32), rotated(factors, phase, K, THETA, back=True), atol=bound)


@pytest.mark.parametrize("tables", [1, 2])
def test_gradients_of_rotations_are_those_of_mlx_operations(tables):
    """Of the tables, too."""
    x, (cos, sin) = mx.random.normal((2, 20, 3, 8)), mx.random.normal((2, tables, 20, 1, 8))

    def gradients(function):
        return mx.grad(lambda *arrays: function(*arrays).square().sum(), argnums=(0, 1, 2))(x, cos, sin)

    for g, expected in zip(gradients(rotate), gradients(rotate.in_mlx), strict=True):
        assert np.allclose(g, expected, rtol=1e-5, atol=1e-5)


# ---- Gradients of gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [swiglu, geglu])
def test_second_derivatives_are_those_of_mlx_operations(function):
    gate, x = mx.random.normal((2, 20, 8)), mx.random.normal((2, 20, 8))

    def second(function):
        def slope(gate, x):
            return mx.grad(lambda gate: function(gate, x).square().sum())(gate).square().sum()

        return mx.grad(slope, argnums=(0, 1))(gate, x)

    for g, expected in zip(second(function), second(function.in_mlx), strict=True):
        assert np.allclose(g, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_large_gates_are_finite():
    gate = mx.repeat(mx.array([1e30, -1e30, 1e4, -1e4])[None, :, None], 19, axis=1)
    for function in (swiglu, geglu):
        for g in mx.grad(lambda *a: function(*a).sum(), argnums=(0, 1))(gate, mx.ones_like(gate)):  # noqa: B023
            assert mx.isfinite(g).all()
