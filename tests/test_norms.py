"""RMSNorm and LayerNorm against NumPy in float64: as MLX operations for few tokens, in C for many."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
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
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + float(module.eps)) * np.array(module.weight, np.float64)
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


@both
@pytest.mark.parametrize("T", [15, 16])
@pytest.mark.parametrize("eps", [0, 1, np.float32(1e-3), np.float64(1e-3)], ids=repr)
def test_any_number_is_an_eps(kind, T, eps):
    module, x = norm(kind, 40), mx.random.normal((1, T, 40))
    module.eps = eps
    assert np.allclose(module(x), exact(module, x), rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("dtypes", [(mx.bfloat16, mx.float32), (mx.float32, mx.bfloat16), (mx.bfloat16, mx.float16)])
def test_the_dtype_does_not_depend_on_the_number_of_tokens(kind, dtypes):
    module, x = norm(kind, 8), mx.random.normal((1, 16, 8)).astype(dtypes[0])
    module.set_dtype(dtypes[1])
    assert module(x).dtype == module(x[:, :15]).dtype == mx.float32


@pytest.mark.parametrize("shape", [(8,), (20, 8), (2, 20, 3, 8)])
@both
def test_any_number_of_axes(kind, shape):
    module, x = norm(kind, 8), mx.random.normal(shape)
    assert np.allclose(module(x), exact(module, x), rtol=1e-5, atol=1e-5)


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
