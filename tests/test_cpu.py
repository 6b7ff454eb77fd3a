"""What loading does for a CPU: layers that multiply in another way, the same model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_ttt
from mlx_ttt.cpu import prepare

from .test_model import build, largest_error


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


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_widened(dtype):
    model = build("mlp", "000")
    model.set_dtype(dtype)
    prepare(model)
    assert model(mx.array([[1, 2, 3]])).dtype == mx.float32
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()
