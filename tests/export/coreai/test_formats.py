"""The formats that matrices are stored in: what is stored stands for numbers near the matrix."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mlx_ttt.export.coreai.formats import as_stored, palettized, scaled
from mlx_ttt.export.coreai.verify import store
from mlx_ttt.export.weights import joined, matrix

from ...models import FLAGS, build

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


@pytest.mark.parametrize(("shape", "groups"), [((48, 64), 3), ((24, 33), 3), ((7, 5), 7)])
def test_palettized(shape, groups):
    """Each number is the nearest of its group's table, whose numbers are the means of what is nearest to them."""
    x = RNG.standard_normal(shape).astype(np.float32)
    found = palettized(x)
    assert found.places.dtype == ml_dtypes.uint4
    assert found.tables.shape == (groups, 16)
    for group, numbers, table in zip(
        x.reshape(groups, -1), found.numbers.reshape(groups, -1), found.tables, strict=True
    ):
        distances = np.abs(group[:, None] - table)
        np.testing.assert_allclose(np.abs(group - numbers), distances.min(1), atol=1e-6)
        for centre in np.unique(numbers):
            np.testing.assert_allclose(group[numbers == centre].mean(), centre, atol=0.02)


def test_few_numbers_are_kept_as_they_are():
    x = RNG.choice(np.linspace(-1, 2, 12, dtype=np.float32), (16, 40))
    np.testing.assert_array_equal(as_stored(x, "lut4"), x)


@pytest.mark.parametrize("weights", ["float32", "float16", "int8", "int4", "lut4"])
def test_numbers_of_a_matrix(weights):
    """Coarser formats are farther from the matrix, none is far."""
    x = RNG.standard_normal((32, 64)).astype(np.float32)
    error = np.sqrt(np.square(as_stored(x, weights) - x).mean())
    assert error <= {"float32": 0, "float16": 1e-3, "int8": 0.01, "int4": 0.15, "lut4": 0.12}[weights]


def test_no_number_that_the_runtime_misreads():
    x = np.float32([1e-5, -4e-5, 6e-5, 6.2e-5, 0, -1e-9, 2])
    assert as_stored(x, "float16").tolist() == [0, -(2**-14), 2**-14, np.float16(6.2e-5), 0, 0, 2]


@pytest.mark.parametrize("flags", FLAGS)
def test_a_model_with_the_stored_numbers(flags):
    """In float32 every layer keeps its own; in four bits q, k and v have those of one matrix, as in the bundle."""
    model, same = build("linear", flags), build("linear", flags)
    store(same, "float32", "float32")
    for name, module in model.named_modules():
        if "weight" in module and name.endswith(("_proj", "embed_tokens", "lm_head")):
            other = dict(same.named_modules())[name]
            np.testing.assert_array_equal(matrix(module), matrix(other), err_msg=name)
    store(same, "lut4", "float32")
    for block, stored in zip(model.layers, same.layers, strict=True):
        for name, part in joined(block, model.args).items():
            np.testing.assert_array_equal(joined(stored, model.args)[name].matrix, as_stored(part.matrix, "lut4"))
