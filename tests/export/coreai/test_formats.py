"""The formats that matrices are stored in: what is stored stands for numbers near the matrix."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mlx_ttt.export.coreai.formats import as_stored, scaled

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.int8), (4, ml_dtypes.int4)])
@pytest.mark.parametrize("shape", [(48, 64), (7, 33)])
def test_scaled(bits, dtype, shape):
    """No number is off by more than half a step of its block; 33 inputs are one block."""
    x = RNG.standard_normal(shape).astype(np.float32)
    x[3] = 0
    found = scaled(x, bits)
    assert found.data.dtype == dtype
    blocks = shape[1] // 32 if shape[1] % 32 == 0 else 1
    assert found.scale.shape == (blocks, shape[0])
    largest = np.abs(x.reshape(shape[0], blocks, -1)).max(-1, keepdims=True)
    error = np.abs(found.numbers - x).reshape(shape[0], blocks, -1)
    assert (error <= largest / (2 ** (bits - 1) - 1) * 0.501).all()
    assert not found.numbers[3].any()


@pytest.mark.parametrize("weights", ["float32", "float16", "int8", "int4"])
def test_numbers_of_a_matrix(weights):
    """Coarser formats are farther from the matrix, none is far."""
    x = RNG.standard_normal((32, 64)).astype(np.float32)
    error = np.sqrt(np.square(as_stored(x, weights) - x).mean())
    assert error <= {"float32": 0, "float16": 1e-3, "int8": 0.01, "int4": 0.15}[weights]
