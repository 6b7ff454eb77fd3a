"""What loading does for a CPU: layers that multiply in another way, the same model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

import mlx_ttt
from mlx_ttt import cpu
from mlx_ttt.cpu import prepare, product

from .test_model import build, largest_error


@pytest.fixture
def small_matrices(monkeypatch):
    """A limit so low that the matrices of small models are cut."""
    cpu._pieces.cache_clear()
    monkeypatch.setattr(cpu, "_SMALL", 100)
    yield
    cpu._pieces.cache_clear()


@pytest.mark.parametrize("flags", ["000", "111"])
def test_the_model_stays_the_same(flags, small_matrices):
    """Names, shapes, values and logits, for one token and many."""
    model = build("linear", flags)
    before = dict(tree_flatten(model.parameters()))
    texts = [mx.random.randint(0, 61, (2, n)) for n in (1, 3, 40)]
    expected = [model(text) for text in texts]
    prepare(model)
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[name], before[name]) for name in before)
    for text, logits in zip(texts, expected, strict=True):
        assert largest_error(model(text), logits) <= 1e-6


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (2, 1, 5), (2, 4, 5), (3, 3, 5), (0, 5)])
@pytest.mark.parametrize("out", [1, 7, 60])
def test_product(shape, out, small_matrices):
    x, weight = mx.random.normal(shape), mx.random.normal((out, 5))
    expected = np.array(x) @ np.array(weight).T
    assert product(x, weight).shape == expected.shape
    assert np.allclose(product(x, weight), expected, atol=1e-6)


def test_a_bias_is_added():
    layer = nn.Linear(4, 3)
    layer.bias = mx.array([1.0, 2.0, 3.0])
    prepare(layer)
    assert mx.allclose(layer(mx.zeros((1, 4))), layer.bias)


@given(st.integers(1, 12), st.integers(1, 40000), st.integers(1, 6000))
def test_pieces_are_as_large_as_they_may_be(rows, out, width):
    n = cpu._pieces(rows, out, width)
    assert out % n == 0
    if rows > cpu._FEW or n == 1:
        return
    assert rows * (out // n) * width <= cpu._SMALL
    assert all(out % m or rows * (out // m) * width > cpu._SMALL for m in range(1, n))


def test_quantized_matrices_stay_as_they_are():
    model = mlx_ttt.load_model()[0]
    expected = model(mx.array([[1, 2, 3]]))
    nn.quantize(model, group_size=64, bits=8)
    prepare(model)
    assert largest_error(model(mx.array([[1, 2, 3]])), expected) <= 0.1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_widened(dtype):
    model = build("mlp", "000")
    model.set_dtype(dtype)
    prepare(model)
    assert model(mx.array([[1, 2, 3]])).dtype == mx.float32
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()
