"""The causal convolution and RoPE against NumPy in float64: in MLX operations for few tokens, in C for many."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.activations import gelu_times, silu_times
from mlx_ttt.layers import CausalConv1d, RoPE

from .native import needs_native, without_native


def convolution(kernel: int, C: int) -> CausalConv1d:
    conv = CausalConv1d(C, kernel)
    conv.bias = mx.random.normal((C,))
    return conv


def exact(conv, x):
    weight, bias, x = (np.array(a, np.float64) for a in (conv.weight[..., 0].T, conv.bias, x))
    T = x.shape[1] - len(weight) + 1
    return sum((x[:, i : i + T] * weight[i] for i in range(len(weight))), bias)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 40])
@pytest.mark.parametrize("kernel", range(1, 6))
def test_any_kernel_and_number_of_tokens(kernel, T):
    for C in (1, 12, 37):
        conv, x = convolution(kernel, C), mx.random.normal((3, kernel - 1 + T, C))
        y = conv(x)
        assert y.shape == (3, T, C)
        assert np.allclose(y, exact(conv, x), rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("kernel", range(1, 6))
def test_gradients_in_c_are_those_of_mlx_operations(kernel, spy, monkeypatch):
    conv, x = convolution(kernel, 9), mx.random.normal((2, kernel - 1 + 20, 9))

    def gradients():
        def function(x, weight, bias):
            conv.weight, conv.bias = weight, bias
            return conv(x).square().sum()

        return mx.grad(function, argnums=(0, 1, 2))(x, conv.weight, conv.bias)

    found = gradients()
    assert spy.taken() == {"convolve"}
    for g, expected in zip(found, without_native(monkeypatch, gradients), strict=True):
        assert np.allclose(g, expected, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_in_and_out(dtype, spy):
    conv = convolution(4, 24)
    conv.set_dtype(dtype)
    x = mx.random.normal((1, 23, 24)).astype(dtype)
    y = conv(x)
    assert spy.taken() == {"convolve"} and y.dtype == dtype
    x, conv.weight, conv.bias = (a.astype(mx.float32) for a in (x, conv.weight, conv.bias))
    assert np.allclose(y.astype(mx.float32), exact(conv, x), rtol=1e-2, atol=1e-2)


# RoPE

THETA, K = 100.0, 5


def rotated(x: mx.array, phase: list[int], back: bool = False) -> np.ndarray:
    """Pairs as complex numbers, turned by their angle."""
    x = np.array(x.astype(mx.float32), np.float64)
    _, T, _, D = x.shape
    slots = (np.array(phase)[:, None] + np.arange(T)) % K
    turns = np.exp(1j * slots[..., None] * THETA ** (-np.arange(0, D, 2) / D))[:, :, None]  # [B, T, 1, D / 2]
    turns = turns.conj() if back else turns
    return np.ascontiguousarray((x[..., ::2] + 1j * x[..., 1::2]) * turns).view(np.float64)


@pytest.mark.parametrize("T", [1, 15, 16, 37, 700])
@pytest.mark.parametrize("phase", [[0], [3], [2, 2], [4, 0, 1]], ids=str)
def test_rotation_from_any_phase(phase, T):
    for H, D in ((1, 2), (3, 6), (2, 16)):
        rope, x = RoPE(D, K, THETA), mx.random.normal((len(phase), T, H, D))
        assert np.allclose(rope.rotate(x, rope.table(phase, T)), rotated(x, phase), atol=1e-6)


@needs_native
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rotation_in_c_and_its_gradient(dtype, spy):
    rope, phase = RoPE(8, K, THETA), [1, 4]
    x, factors = (mx.random.normal((2, 20, 3, 8)).astype(dtype) for _ in range(2))
    table = rope.table(phase, 20)
    y = rope.rotate(x, table)
    gradient = mx.grad(lambda x: (rope.rotate(x, table) * factors).sum())(x)
    mx.eval(y, gradient)
    assert spy.taken() == {"rotate"} and y.dtype == gradient.dtype == dtype
    bound = {mx.float32: 1e-6}.get(dtype, 3e-2)
    assert np.allclose(y.astype(mx.float32), rotated(x, phase), atol=bound)
    assert np.allclose(gradient.astype(mx.float32), rotated(factors, phase, back=True), atol=bound)


def test_what_does_not_fit_together_is_refused_however_many_tokens():
    """Or broadcast, as MLX does it."""
    rope = RoPE(8, K, THETA)
    for T in (5, 20):
        assert rope.rotate(mx.ones((1, T, 2, 8)), rope.table([0, 1, 2], T)).shape == (3, T, 2, 8)
        assert silu_times(mx.ones((3, T, 8)), mx.ones((1, T, 8))).shape == (3, T, 8)
        wide = CausalConv1d(8, 4)
        wide.bias = mx.ones((1,))
        assert wide(mx.ones((1, T + 3, 8))).shape == (1, T, 8)
        for refused in (
            lambda T=T: rope.rotate(mx.ones((1, T, 2, 8)), rope.table([0], T + 1)),
            lambda T=T: rope.rotate(mx.ones((1, T, 2, 6)), rope.table([0], T)),
            lambda T=T: gelu_times(mx.ones((1, T, 8)), mx.ones((1, T + 1, 8))),
            lambda T=T: CausalConv1d(8, 4)(mx.ones((1, T + 3, 16))),
        ):
            with pytest.raises(ValueError):
                mx.eval(refused())
