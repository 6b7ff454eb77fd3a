"""What loading does for a CPU: another layout in memory, the same model."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_ttt
from mlx_ttt.cpu import prepare

from .test_model import build, largest_error


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another BLAS")
def test_matrices_are_laid_out_by_input():
    model = build("linear", "111")
    ids = mx.random.randint(0, 61, (1, 20))
    before, weights = model(ids), {name: m.weight + 0 for name, m in matrices(model)}
    prepare(model)
    mx.eval(model.parameters())
    for name, module in matrices(model):
        assert mx.array_equal(module.weight, weights[name])
        strides = memoryview(module.weight).strides
        assert strides == (4, 4 * module.weight.shape[0]), name
    assert largest_error(model(ids), before) <= 1e-6


def matrices(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]


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
