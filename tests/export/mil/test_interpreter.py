"""The interpreter against formulas in float64, operation by operation, and its rounding."""

from __future__ import annotations

import pytest

pytest.importorskip("coremltools", reason='needs coremltools: pip install "mlx-ttt[coreml]"')

import math

import numpy as np
from coremltools import target
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types

from mlx_ttt.errors import CheckpointError
from mlx_ttt.export.mil.interpreter import Interpreter, load

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
Y = RNG.standard_normal((2, 4, 3)).astype(np.float32)
W = RNG.standard_normal((5, 4)).astype(np.float32)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


OPERATIONS = {
    "abs": (lambda x: mb.abs(x=x), np.abs),
    "add": (lambda x: mb.add(x=x, y=X[0]), lambda x: x + X[0]),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.25), lambda x: np.minimum(np.maximum(x, -0.5), 0.25)),
    "concat": (lambda x: mb.concat(values=[x, X], axis=1), lambda x: np.concatenate([x, X], 1)),
    "expand_dims": (lambda x: mb.expand_dims(x=x, axes=[1]), lambda x: x[:, None]),
    "gelu": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), gelu),
    "linear": (lambda x: mb.linear(x=x, weight=W), lambda x: x @ W.T),
    "linear with bias": (
        lambda x: mb.linear(x=x, weight=W, bias=W[:, 0].copy()),
        lambda x: x @ W.T + W[:, 0],
    ),
    "matmul": (lambda x: mb.matmul(x=x, y=Y), lambda x: np.einsum("bij,bjk->bik", x, Y)),
    "matmul, y transposed": (
        lambda x: mb.matmul(x=x, y=X, transpose_y=True),
        lambda x: np.einsum("bij,bkj->bik", x, X),
    ),
    "matmul, x transposed": (
        lambda x: mb.matmul(x=x, y=X, transpose_x=True),
        lambda x: np.einsum("bji,bjk->bik", x, X),
    ),
    "maximum": (lambda x: mb.maximum(x=x, y=np.float32(0.1)), lambda x: np.where(x > 0.1, x, 0.1)),
    "mul": (lambda x: mb.mul(x=x, y=X[:1]), lambda x: x * X[:1]),
    "pad": (
        lambda x: mb.pad(x=x, pad=[0, 0, 1, 2], mode="constant", constant_val=np.float32(7)),
        lambda x: np.concatenate([np.full((2, 3, 1), 7), x, np.full((2, 3, 2), 7)], -1),
    ),
    "real_div": (lambda x: mb.real_div(x=x, y=X + 9), lambda x: x / (X + 9)),
    "reduce_max": (lambda x: mb.reduce_max(x=x, axes=[-1], keep_dims=True), lambda x: np.sort(x)[..., -1:]),
    "reduce_mean": (lambda x: mb.reduce_mean(x=x, axes=[-1], keep_dims=True), lambda x: x.sum(-1, keepdims=True) / 4),
    "reduce_sum": (lambda x: mb.reduce_sum(x=x, axes=[1], keep_dims=False), lambda x: np.einsum("bij->bj", x)),
    "reshape": (lambda x: mb.reshape(x=x, shape=[3, 8]), lambda x: x.reshape(3, 8)),
    "rsqrt": (lambda x: mb.rsqrt(x=mb.square(x=x), epsilon=np.float32(0.5)), lambda x: (x**2 + 0.5) ** -0.5),
    "sigmoid": (lambda x: mb.sigmoid(x=x), lambda x: 1 / (1 + np.exp(-x))),
    "silu": (lambda x: mb.silu(x=x), lambda x: x / (1 + np.exp(-x))),
    "slice_by_size": (
        lambda x: mb.slice_by_size(x=x, begin=[0, 1, 1], size=[2, 2, -1]),
        lambda x: x[:, 1:3, 1:],
    ),
    "split": (lambda x: mb.split(x=x, split_sizes=[1, 3], axis=2)[1], lambda x: x[..., 1:]),
    "split evenly": (lambda x: mb.split(x=x, num_splits=2, axis=2)[1], lambda x: x[..., 2:]),
    "sub": (lambda x: mb.sub(x=X, y=x), lambda x: X - x),
    "tanh": (lambda x: mb.tanh(x=x), lambda x: 1 - 2 / (np.exp(2 * x) + 1)),
    "transpose": (lambda x: mb.transpose(x=x, perm=[0, 2, 1]), lambda x: np.einsum("bij->bji", x)),
    "less": (lambda x: mb.cast(x=mb.less(x=x, y=X), dtype="fp32"), lambda x: 1.0 * (x < X)),
    "equal": (lambda x: mb.cast(x=mb.equal(x=x, y=X), dtype="fp32"), lambda x: 1.0 * (x == X)),
    "cast": (lambda x: mb.cast(x=mb.cast(x=x, dtype="int32"), dtype="fp32"), np.trunc),
}


def function(make, dtype=types.fp32, shape=(2, 3, 4)) -> Function:
    with Function({"x": mb.placeholder(shape, dtype=dtype)}, opset_version=target.iOS18) as made:
        result = make(made.inputs["x"])
        result.name = "y"
        made.set_outputs([result])
    return made


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    make, formula = OPERATIONS[name]
    x = RNG.standard_normal((2, 3, 4)).astype(np.float32)
    x[0, 0] = X[0, 0]  # so that some are equal
    found = Interpreter(function(make)).predict({"x": x})["y"]
    np.testing.assert_allclose(found, formula(x.astype(np.float64)), rtol=2e-6, atol=2e-6)


def test_gather():
    table = RNG.standard_normal((7, 4)).astype(np.float32)
    ids = np.array([[6, 0, 6]], np.int32)
    made = function(lambda x: mb.gather(x=table, indices=x, axis=0), types.int32, (1, 3))
    assert np.array_equal(Interpreter(made).predict({"x": ids})["y"], table[None, [6, 0, 6]])


def test_every_result_is_rounded_to_its_type():
    """1 + 2^-11 is no float16, and 300² is beyond its range."""
    add = function(lambda x: mb.add(x=mb.add(x=x, y=np.float16(2**-11)), y=np.float16(-1)), types.fp16, (1,))
    square = function(lambda x: mb.mul(x=mb.square(x=x), y=np.float16(2**-10)), types.fp16, (1,))
    for rounding, small, large in ((True, 0, np.inf), (False, 2**-11, 300**2 / 2**10)):
        assert Interpreter(add, rounding).predict({"x": np.array([1.0])})["y"] == small
        assert Interpreter(square, rounding).predict({"x": np.array([300.0])})["y"] == large


def test_the_state_is_kept_between_calls():
    inputs = {"x": mb.placeholder((2,), dtype=types.fp16), "s": mb.state_tensor_placeholder((2,), dtype=types.fp16)}
    with Function(inputs, opset_version=target.iOS18) as made:
        x, s = made.inputs.values()
        total = mb.add(x=mb.read_state(input=s), y=x)
        mb.coreml_update_state(state=s, value=total)
        made.set_outputs([total])
    interpreter = Interpreter(made)
    assert interpreter.inputs == {"x": (2,), "s": (2,)}
    one, other = interpreter.make_state(), interpreter.make_state()
    for state, n in ((one, 3), (other, 1)):
        for _ in range(n):
            interpreter.predict({"x": np.array([1.0, 2.0])}, state)
    assert one.read_state("s").tolist() == [3, 6]
    assert other.read_state("s").tolist() == [1, 2]
    other.write_state("s", np.array([5.0, 5.0]))
    (total,) = interpreter.predict({"x": np.array([1.0, 2.0])}, other).values()
    assert total.tolist() == [6, 7]


def test_an_unknown_operation_is_named():
    with pytest.raises(CheckpointError, match="'erf'"):
        Interpreter(function(lambda x: mb.erf(x=x)))


def test_what_is_no_package(tmp_path, packages):
    with pytest.raises(CheckpointError, match="cannot be read as a Core ML package"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read as a Core ML package"):
        load(tmp_path / "missing.mlpackage")
