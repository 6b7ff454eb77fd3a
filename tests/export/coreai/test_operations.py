"""Each operation alone, on Apple's runtime, against NumPy."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
from coreai.authoring import AIProgram, Module

from mlx_ttt.export.coreai.child import ChildRuntime
from mlx_ttt.export.coreai.compiler import add_function, while_
from mlx_ttt.export.coreai.operations import CoreAIOperations
from mlx_ttt.export.coreai.runner_main import _number
from mlx_ttt.export.coreai.runtime import Runtime
from mlx_ttt.export.operations import OPERATIONS

from ..eager import EagerOperations

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


X, Y, W, TABLE = normal(1, 3, 5, 8), normal(1, 3, 5, 8), normal(11, 8), normal(13, 8)
FLAT, IDS = normal(1, 5, 8), np.array([[0, 12, 7, 7, 3]], np.int32)
COUNTS, PLACE = np.arange(6, dtype=np.int32).reshape(1, 1, 6, 1), np.array([4], np.int32)
LARGE = X * np.float32(10)

# For each case the operation, its inputs, and what else it is called with.
CASES = {
    **{name: (name, [X, Y], {}) for name in ("add", "sub", "mul", "div", "maximum")},
    "add a constant": ("add", [X], {"y": normal(1, 3, 1, 8)}),
    "sub from a constant": ("sub", [X], {"x": np.float32(1)}),
    "mul by a column": ("mul", [X, normal(1, 1, 5, 1)], {}),
    **{name: (name, [LARGE], {}) for name in ("abs", "square", "tanh", "sigmoid", "silu", "gelu")},
    "rsqrt": ("rsqrt", [np.abs(X) + np.float32(1e-3)], {}),
    "clip": ("clip", [LARGE], {"low": -4, "high": 5.5}),
    "equal": ("equal", [PLACE], {"x": COUNTS}),
    "less": ("less", [PLACE], {"x": COUNTS}),
    **{
        f"{name} {axis}": (name, [X], {"axis": axis})
        for name in ("reduce_sum", "reduce_mean", "reduce_max")
        for axis in (1, 2, -1)
    },
    "expand_dims": ("expand_dims", [FLAT], {"axis": 3}),
    "transpose": ("transpose", [X], {"order": [0, 2, 1, 3]}),
    "slice": ("slice", [X], {"begin": [0, 1, 0, 3], "size": [1, 2, 5, 4]}),
    "pad_last": ("pad_last", [X], {"width": 32}),
    "cast of truth values": ("_cast", [PLACE], {"number_type": np.float32}),
    "cast": ("_cast", [X], {"number_type": np.float16}),
    "reshape": ("_reshape", [X], {"shape": [1, 3, 40, 1]}),
    "split": ("_split", [X], {"sizes": [1, 4], "axis": 2}),
    "split the last": ("_split", [X], {"sizes": [3, 3, 2], "axis": -1}),
    "concat": ("_concat", [X, Y], {"axis": 1}),
    "concat the last": ("_concat", [X, normal(1, 3, 5, 2)], {"axis": -1}),
    "matmul": ("matmul", [X, normal(1, 3, 8, 4)], {}),
    "matmul, transposed x": ("matmul", [X, normal(1, 3, 5, 4)], {"transpose_x": True}),
    "matmul, transposed y": ("matmul", [X, normal(1, 3, 4, 8)], {"transpose_y": True}),
    "matmul of a constant": ("matmul", [FLAT], {"x": normal(1, 3, 8), "transpose_y": True}),
    "matmul of one by many": ("matmul", [normal(1, 1, 1, 6)], {"y": normal(1, 4, 6, 6)}),
    "linear": ("linear", [FLAT], {"weight": W}),
    "gather": ("gather", [IDS], {"table": TABLE}),
    "gather from a stored table": ("stored gather", [IDS], {}),
    "linear of a stored table": ("stored linear", [FLAT], {}),
    "any length": ("any length", [FLAT], {}),
}


def compute(ops, name: str, inputs, keywords):
    if name == "stored gather":
        return ops.gather(ops.constant(TABLE, "t"), *inputs)
    if name == "stored linear":
        return ops.linear(*inputs, ops.constant(TABLE, "t"))
    if name == "any length":
        return ops.linear(ops.mul(*inputs, ops.reduce_max(ops.abs(*inputs), axis=-1)), W)
    keywords, inputs = dict(keywords), list(inputs)
    for first in ("x", "table"):
        if first in keywords:
            inputs.insert(0, keywords.pop(first))
    if "y" in keywords:
        inputs.append(keywords.pop("y"))
    if name == "_concat":
        return ops._concat(inputs, **keywords)
    return getattr(ops, name)(*inputs, **keywords)


def stable(case: str) -> str:
    return f"f{list(CASES).index(case)}"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """One program with a function for each case."""
    module, ops = Module.create(), CoreAIOperations()
    with module:
        for case, (name, inputs, keywords) in CASES.items():

            def body(*values, name=name, keywords=keywords):
                found = compute(ops, name, values, keywords)
                found = found if isinstance(found, list) else [found]
                # No array of truth values leaves a function: one of numbers does.
                found = [ops.cast(x, np.float32) if ops.number_type(x) == np.bool_ else x for x in found]
                return {f"y{i}": x for i, x in enumerate(found)}, {}

            shapes = {f"x{i}": (x.shape, x.dtype.type) for i, x in enumerate(inputs)}
            if name == "any length":
                shapes = {"x0": ((1, -1, 8), np.float32)}
            add_function(stable(case), shapes, {}, body)
    path: Path = tmp_path_factory.mktemp("operations") / "all.aimodel"
    AIProgram(module).save_asset(path)
    with Runtime(path) as runtime:
        yield runtime


@pytest.mark.parametrize("case", CASES)
def test_operation(runtime, case):
    name, inputs, keywords = CASES[case]
    wanted = compute(EagerOperations(), name, inputs, keywords)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    found = runtime.call(stable(case), {f"x{i}": x for i, x in enumerate(inputs)}, {})
    assert len(found) == len(wanted)
    for i, want in enumerate(wanted):
        assert found[f"y{i}"].shape == want.shape
        np.testing.assert_allclose(found[f"y{i}"], want.astype(np.float32), rtol=1e-5, atol=2e-6)


def test_no_operation_is_left_out():
    tried = {name for name, _, _ in CASES.values()} | {"constant", "shape", "number_type"}
    assert tried >= set(OPERATIONS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_the_runtime_keeps(tmp_path):
    """As much as the outputs of all calls; nothing of inputs and states. If this fails, mend docs/core-ai.md."""
    large = np.zeros(1 << 16, np.float32)  # 262 kB
    module, ops = Module.create(), CoreAIOperations()
    with module:
        states = {"s": (large.shape, np.float32)}
        inputs = {"x": (large.shape, np.float32)}
        add_function("small", inputs, states, lambda x, s: ({"y": ops.reduce_sum(x, 0)}, {"s": ops.add(x, s)}))
        add_function("large", inputs, states, lambda x, s: ({"y": ops.add(x, s)}, {"s": ops.add(x, s)}))
    AIProgram(module).save_asset(tmp_path / "keeps.aimodel")
    grown = {}
    with ChildRuntime(tmp_path / "keeps.aimodel") as runtime:  # a new process, which has no memory free to use again
        given = runtime.start({"s": large})
        for name in ("small", "large"):
            for calls in (100, 400):  # first what it needs anyway, and finds free
                before = resident(runtime._process.pid)
                for _ in range(calls):
                    runtime.call(name, {"x": large}, given)
                grown[name] = resident(runtime._process.pid) - before
    assert grown["small"] < 100 * large.nbytes
    assert grown["large"] > 300 * large.nbytes


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()


def test_small_halves_in_constants_are_misread(tmp_path):
    """Why formats.plain stores none. If this fails, the runtime has been mended, and `plain` may go."""
    x = np.float16([2**-14, 2.0**-15, 3 * 2.0**-16])
    module, ops = Module.create(), CoreAIOperations()
    with module:

        def body(given):
            return {"given": ops.cast(given, np.float32), "constant": ops.abs(ops.cast(ops.value(x), np.float32))}, {}

        add_function("main", {"x": (x.shape, np.float16)}, {}, body)
    AIProgram(module).save_asset(tmp_path / "halves.aimodel")
    with Runtime(tmp_path / "halves.aimodel") as runtime:
        found = runtime.call("main", {"x": x}, {})
    np.testing.assert_array_equal(found["given"], x.astype(np.float32))
    assert found["constant"][0] == x[0]
    assert (found["constant"][1:] < x[1:] / 2).all()


def test_a_loop_goes_on_from_a_product(tmp_path):
    """Without an operation element by element behind it, the second round's product is wrong."""
    W = np.array([[1, 1], [0, 1]], np.float32)
    module, ops = Module.create(), CoreAIOperations()
    with module:

        def body(n, x):
            carried = while_(
                [_number(0), x],
                lambda i, x: ops.less(i, n),
                lambda i, x: [ops.add(i, np.int32(1)), ops.matmul(x, W)],
            )
            return {"y": carried[1]}, {}

        add_function("main", {"n": ((), np.int32), "x": ((2, 2), np.float32)}, {}, body)
    AIProgram(module).save_asset(tmp_path / "loop.aimodel")
    x = np.array([[1, 2], [3, 4]], np.float32)
    with Runtime(tmp_path / "loop.aimodel") as runtime:
        for n in range(5):
            found = runtime.call("main", {"n": np.array(n, np.int32), "x": x}, {})["y"]
            np.testing.assert_array_equal(found, x @ np.linalg.matrix_power(W, n))
