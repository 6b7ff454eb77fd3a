"""What loading does for a CPU: layers that multiply in another way, the same model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

import mlx_ttt
from mlx_ttt.backends.cpu import calls, library
from mlx_ttt.backends.cpu.prepare import prepare

from ...models import build, largest_error


@pytest.mark.parametrize("flags", ["000", "111"])
def test_the_model_stays_the_same(flags):
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


def test_quantized_matrices_stay_as_they_are():
    model = mlx_ttt.load_model()[0]
    expected = model(mx.array([[1, 2, 3]]))
    nn.quantize(model, group_size=64, bits=8)
    prepare(model)
    assert largest_error(model(mx.array([[1, 2, 3]])), expected) <= 0.1


@pytest.mark.parametrize("has_c", [True, False])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_computed_with_in_float32(dtype, has_c, monkeypatch):
    """Matrices stay as they are where C reads them. Nothing is rounded on the way."""
    if not has_c:
        monkeypatch.setattr(library, "c_code", lambda: None)
    model, wide = build("mlp", "000"), build("mlp", "000")
    model.set_dtype(dtype)
    wide.load_weights(tree_flatten(tree_map(lambda x: x.astype(mx.float32), model.parameters())))
    prepare(model)
    for text in ([[1]], [[1, 2, 3]], [list(range(40))]):
        logits = model(mx.array(text))
        assert logits.dtype == mx.float32
        assert largest_error(logits, wide(mx.array(text))) <= 1e-5
    matrix, norm = model.layers[0].mlp.up_proj.weight, model.model.norm.weight
    assert matrix.dtype == (dtype if calls.available() else mx.float32) and norm.dtype == mx.float32


@pytest.mark.parametrize("rows", [(1,), (4,), (5,), (2, 3), (40,)])
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_products_with_quantized_matrices(rows, mode):
    """The same as with the dequantized matrix, for few rows and many, in float32."""
    model = nn.Sequential(nn.Embedding(7, 64), nn.Linear(64, 13, bias=False))
    nn.quantize(model, mode=mode)
    prepare(model)
    embedding, linear = model.layers
    x = mx.random.normal((*rows, 64))
    for found, layer in ((linear(x), linear), (embedding.as_linear(x), embedding)):
        weight = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), mode=mode, dtype=mx.float32)
        assert found.dtype == mx.float32 and found.shape == (*rows, weight.shape[0])
        assert mx.allclose(found, x @ weight.T, rtol=1e-4, atol=1e-4)
    rows = embedding(mx.array([3, 5]))
    weight = mx.dequantize(embedding.weight, embedding.scales, embedding.get("biases"), mode=mode)
    assert rows.dtype == mx.float32 and mx.allclose(rows, weight[mx.array([3, 5])])
