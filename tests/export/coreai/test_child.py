"""Apple's runtime in a child: the same answers, and a child that is ended is one line."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from coreai.authoring import AIProgram, Module

from mlx_ttt.errors import CheckpointError
from mlx_ttt.export.coreai.child import ChildRuntime
from mlx_ttt.export.coreai.compiler import add_function
from mlx_ttt.export.coreai.operations import CoreAIOperations
from mlx_ttt.export.coreai.runtime import Runtime

X, S = np.arange(4, dtype=np.float32), np.ones(4, np.float32)


def save(path: Path, body) -> Path:
    module = Module.create()
    with module:
        add_function("main", {"x": ((4,), np.float32)}, {"s": ((4,), np.float32)}, body)
    AIProgram(module).save_asset(path)
    return path


@pytest.fixture
def adding(tmp_path) -> Path:
    ops = CoreAIOperations()
    return save(tmp_path / "adding.aimodel", lambda x, s: ({"y": ops.mul(x, s)}, {"s": ops.add(x, s)}))


@pytest.mark.slow
def test_the_same_as_in_this_process(adding):
    found = []
    for kind in (Runtime, ChildRuntime):
        with kind(adding) as runtime:
            assert runtime.names == ["main"]
            states, others = runtime.start({"s": S}), runtime.start({"s": 0 * S})
            outputs = [runtime.call("main", {"x": X}, states)["y"].tolist() for _ in range(3)]
            runtime.write(others, {"s": 5 * S})
            outputs += [x["s"].tolist() for x in (runtime.arrays(states), runtime.arrays(others))]
            with pytest.raises(RuntimeError):
                runtime.call("main", {"x": X[:2]}, states)
            outputs.append(runtime.call("main", {"x": X}, others)["y"].tolist())
            found.append(outputs)
    assert found[0] == found[1]
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"none", r" \(SIGABRT\) loading it: .*not an MLIR bytecode file"), (None, r" \(SIGSEGV\)")],
)
def test_a_program_that_ends_the_runtime(tmp_path, capfd, content, message):
    (tmp_path / "ends.aimodel").mkdir()
    if content is not None:
        (tmp_path / "ends.aimodel/main.mlirb").write_bytes(content)
    with (
        pytest.raises(CheckpointError, match=r"ends\.aimodel: Core AI's runtime ended itself" + message) as caught,
        ChildRuntime(tmp_path / "ends.aimodel"),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_child_that_is_killed_between_calls(adding):
    with ChildRuntime(adding) as runtime:
        states = runtime.start({"s": S})
        os.kill(runtime._process.pid, signal.SIGKILL)
        with pytest.raises(CheckpointError, match=re.escape("ended itself (SIGKILL) running 'main'")):
            runtime.call("main", {"x": X}, states)
