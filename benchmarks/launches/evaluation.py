"""In what order MLX evaluates a graph, and which arrays something else still holds at that time.

- Order: mlx/transforms.cpp:80, eval_impl: from the outputs backwards in breadth, at most 20 wide
  (MLX_BFS_MAX_WIDTH, mlx/utils.h:177), then from the last found to the first.
- Donation: mlx/array.h:294, common/utils.h:218: an input's buffer is taken over if only this operation holds it.
- Each output of an operation with several holds the inputs once (mlx/array.cpp:42), so those are never donated.
- A command buffer holds what its operations read until the GPU has run it (metal/eval.cpp:29). So an array that was
  read before, in this evaluation or one that is still running, is not donated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx

from .arrays import Array, Buffer
from .gpus import Gpu
from .graph import Graph, Operation, Value
from .rules import encode

MAX_WIDTH = 20


class Call:
    """An operation of a graph that was called and is not computed yet."""

    def __init__(self, operation: Operation, inputs: list[Array], outputs: list[Array]):
        self.operation, self.inputs, self.outputs = operation, inputs, outputs
        for x in inputs:
            x.holds += len(outputs)

    def let_go(self) -> None:
        """Its inputs are no longer needed."""
        inputs, self.inputs = self.inputs, []
        for x in inputs:
            drop(x, len(self.outputs))


def drop(x: Array, times: int = 1) -> None:
    """Hold an array that many times less."""
    x.holds -= times
    if x.holds:
        return
    if x.call is None:
        if x.buffer is not None:
            x.buffer.users -= 1
    elif not any(y.holds for y in x.call.outputs):
        x.call.let_go()


class Device:
    """A GPU, arrays on it, and command buffers that it has not run yet. Nothing is computed.

    Attributes:
        launches: what has been launched.
    """

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self.launches: Counter[str] = Counter()
        self._pending: list[list[Buffer]] = []  # of each evaluation

    def launch(self, what: str) -> None:
        self.launches[what] += 1

    def encoded(self, operation: Operation) -> None:
        """Called after each operation. For those who count something else."""

    def array(self, shape: Sequence[int], dtype: mx.Dtype) -> Array:
        """An array that is there already, held by the caller."""
        x = Array(shape, dtype)
        x.allocate()
        x.holds = 1
        return x

    def call(self, graph: Graph, inputs: Sequence[Array]) -> list[Array]:
        """Call a function. Returns its results, not computed yet, held by the caller."""
        arrays: dict[Value, Array] = dict(zip(graph.inputs, inputs, strict=True))
        arrays |= {x: self.array(x.shape, x.dtype) for x in graph.constants}
        for operation in graph.operations:
            outputs = [Array(x.shape, x.dtype) for x in operation.outputs]
            call = Call(operation, [arrays[x] for x in operation.inputs], outputs)
            for x, y in zip(operation.outputs, outputs, strict=True):
                y.call, arrays[x] = call, y
        results = [arrays[x] for x in graph.outputs]
        for x in results:
            x.holds += 1
        for y in arrays.values():
            if y.call is not None and not any(z.holds for z in y.call.outputs):
                y.call.let_go()
        return results

    def eval(self, arrays: Sequence[Array]) -> None:
        """Evaluate arrays: launch all that they need."""
        held: list[Buffer] = []
        self._pending.append(held)
        for x in arrays:
            x.holds += 1
        for array in order(arrays):
            call = array.call
            assert call is not None
            inputs, outputs = call.inputs, call.outputs
            encode(self, operation := call.operation, inputs, outputs)
            kept = {x.buffer for x in inputs} | {x.buffer for x in outputs if x is not array}
            for buffer in kept - {array.buffer, None}:
                buffer.users += 1
                held.append(buffer)
            for x in outputs:
                x.call = None
            call.let_go()
            for x in outputs:
                if not x.holds and x.buffer is not None:
                    x.buffer.users -= 1
            self.encoded(operation)
        for x in arrays:
            drop(x)

    def wait(self, running: int = 0) -> None:
        """Wait until all evaluations but the last few have run."""
        for held in self._pending[: len(self._pending) - running]:
            for buffer in held:
                buffer.users -= 1
            held.clear()


def order(arrays: Sequence[Array]) -> list[Array]:
    """The arrays to compute, the first first. Of an operation with several outputs, the one that stands for all."""
    waiting: Counter[Call] = Counter()  # how many inputs of calls each still is
    seen: set[Call] = set()
    stack = [x.call for x in arrays if x.call is not None]
    waiting.update(stack)
    while stack:
        call = stack.pop()
        if call in seen:
            continue
        seen.add(call)
        read = [x.call for x in call.inputs if x.call is not None]
        waiting.update(read)
        stack += read

    tape: list[Array | None] = [None]  # None: the evaluation itself
    deferred: list[tuple[Array | None, int]] = []
    i = 0
    while i < len(tape) or deferred:
        if i < len(tape):
            current, start = tape[i], 0
            i += 1
        else:
            current, start = deferred.pop()
        inputs = arrays if current is None else current.call.inputs
        for j in range(start, len(inputs)):
            x = inputs[j]
            if x.call is None:
                continue
            if len(tape) - i >= MAX_WIDTH:
                deferred.append((current, j))
                break
            waiting[x.call] -= 1
            if not waiting[x.call]:
                tape.append(x)
    return [x for x in reversed(tape[1:]) if x is not None]
