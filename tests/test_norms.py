"""RMSNorm and LayerNorm against NumPy in float64: as MLX operations for few tokens, in C for many."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.norms import LayerNorm, RMSNorm

from .native import needs_native, without_native

EPS = 1e-3  # large enough to be seen
NAMES = {RMSNorm: "rms_norm", LayerNorm: "layer_norm"}
both = pytest.mark.parametrize("kind", NAMES, ids=NAMES.values())


def norm(kind, C: int):
    module = kind(C, eps=EPS)
    module.update({name: mx.random.normal(w.shape) for name, w in module.parameters().items()})
    return module


def exact(module, x: mx.array) -> np.ndarray:
    x = np.array(x.astype(mx.float32), np.float64)
    if isinstance(module, LayerNorm):
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * np.array(module.weight, np.float64)
    return y + np.array(module.bias, np.float64) if isinstance(module, LayerNorm) else y


@both
@pytest.mark.parametrize("T", [1, 15, 16, 700])
def test_any_number_of_tokens_and_channels(kind, T):
    """The largest in several threads."""
    for C in (1, 7, 16, 83):
        module, x = norm(kind, C), 3 + 2 * mx.random.normal((3, T, C))
        y = module(x)
        assert y.shape == x.shape
        assert np.allclose(y, exact(module, x), rtol=1e-5, atol=1e-5)


@needs_native
@both
def test_small_and_large_inputs(kind, spy):
    """Of a mean far from zero, too, and of nothing but zeros."""
    module = norm(kind, 40)
    for x in (1e-4 * mx.random.normal((1, 16, 40)), 1e6 * mx.random.normal((1, 16, 40)), mx.zeros((1, 16, 40))):
        assert np.allclose(module(x), exact(module, x), rtol=1e-5, atol=1e-5)
    x = 1000 + mx.random.normal((1, 16, 40))
    assert np.allclose(module(x), exact(module, x), atol=2e-3)
    assert spy.taken() == {NAMES[kind]}


@needs_native
@both
def test_gradients_in_c_are_those_of_mlx_operations(kind, spy, monkeypatch):
    module, x = norm(kind, 9), mx.random.normal((2, 20, 9))

    def gradients():
        def function(x, parameters):
            module.update(parameters)
            return module(x).square().sum()

        of_x, of_parameters = mx.grad(function, argnums=(0, 1))(x, dict(module.parameters()))
        return [of_x, *of_parameters.values()]

    found = gradients()
    assert spy.taken() == {NAMES[kind]}
    for g, expected in zip(found, without_native(monkeypatch, gradients), strict=True):
        assert np.allclose(g, expected, rtol=1e-5, atol=1e-5)


@needs_native
@both
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_in_and_out(kind, dtype, spy):
    module, x = norm(kind, 24), mx.random.normal((1, 20, 24)).astype(dtype)
    module.set_dtype(dtype)
    y = module(x)
    assert spy.taken() == {NAMES[kind]} and y.dtype == dtype
    module.set_dtype(mx.float32)
    assert np.allclose(y.astype(mx.float32), exact(module, x), rtol=1e-2, atol=1e-2)
