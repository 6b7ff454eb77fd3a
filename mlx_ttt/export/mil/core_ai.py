"""A Core ML package on Core AI's runtime: its MIL, operation by operation, in the operations of the Core AI lowering.

A second opinion beside the interpreter, and Apple's own, on the graph, its weights and its state. Not on Core ML: who
parses the package on a device, places its operations and rounds there is another program. All arithmetic is float32;
weights of few bits are widened first, as coremltools does it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Function, Operation, Var, types

from ...errors import CheckpointError, TTTError
from ..coreai import require_coreai
from ..functions import FUNCTIONS
from ..operations import Operations, Value
from ..session import Session
from .interpreter import State, arguments, constant_of, empty_state, load, shape_of
from .session import packages_of, read_metadata, start_session

NAME = "Core AI's runtime, float32"


@contextmanager
def on_core_ai(path: Path) -> Iterator[Callable[[], Session]]:
    """Starts sessions on Core AI's runtime; the package is lowered and compiled once, for the first.

    Args:
        path: a package; of a pair the name without -decode.
    """
    with ExitStack() as stack:
        predictors: dict[str, _Predictor] = {}

        def open_session() -> Session:
            packages = packages_of(path)
            if not predictors:
                shared = packages["decode"] == packages["prefill"]
                functions = {name: load(packages[name], name if shared else None) for name in FUNCTIONS}
                predictors.update(_loaded(functions, stack))
            return start_session(predictors, read_metadata(packages["decode"]))

        yield open_session


def _loaded(functions: Mapping[str, Function], stack: ExitStack) -> dict[str, _Predictor]:
    """The functions, run by a child until the stack is unwound.

    Raises:
        RuntimeError: Core AI is not here, or its runtime refuses the program or ends itself.
        CheckpointError: a function has an operation that is not known here.
    """
    try:
        require_coreai()
    except TTTError as error:
        raise RuntimeError(str(error)) from None
    from coreai.authoring import AIProgram, Module

    from ..coreai.child import ChildRuntime
    from ..coreai.compiler import add_function
    from ..coreai.operations import CoreAIOperations

    module, ops = Module.create(), CoreAIOperations()
    with module:
        for name, function in functions.items():
            lowering = _Lowering(function, ops)
            add_function(name, lowering.inputs, lowering.states, lowering.body)
    module.verify()
    asset = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "package.aimodel"
    AIProgram(module).save_asset(asset)
    try:
        runtime = stack.enter_context(ChildRuntime(asset))
    except CheckpointError as error:
        raise RuntimeError(str(error).partition(": ")[2]) from None
    return {name: _Predictor(runtime, name, function) for name, function in functions.items()}


class _Predictor:
    """A function as the interpreter has it: session.Predictor."""

    def __init__(self, runtime: Any, name: str, function: Function):
        self._runtime, self._name, self._function = runtime, name, function
        self._states = runtime.start(self.make_state())

    def make_state(self) -> State:
        return empty_state(self._function)

    def predict(self, inputs: Mapping[str, np.ndarray], state: State | None = None) -> dict[str, np.ndarray]:
        given = {name: x.astype(np.float32) if x.dtype.kind == "f" else x for name, x in inputs.items()}
        try:
            self._runtime.write(self._states, state or {})
            outputs = self._runtime.call(self._name, given, self._states)
            if state is not None:
                state.update(self._runtime.arrays(self._states))
            return outputs
        except CheckpointError as error:  # the runtime has ended itself, on a file that is nobody's
            raise RuntimeError(str(error).partition(": ")[2]) from None


class _Lowering:
    """A function of a package as one of Core AI.

    Args:
        function: from interpreter.load.
        ops: what to compute with.

    Attributes:
        inputs, states: their shapes and number types by name, as compiler.add_function takes them.
    """

    def __init__(self, function: Function, ops: Operations):
        self._function, self._ops = function, ops
        kinds: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for name, var in function.inputs.items():
            is_state = types.is_state(var.sym_type)
            is_integer = not is_state and var.dtype == types.int32
            kinds[is_state][name] = (shape_of(var), np.int32 if is_integer else np.float32)
        self.inputs, self.states = kinds

    def body(self, *given: Value) -> tuple[dict[str, Value], dict[str, Value]]:
        """The outputs and the new states by name."""
        named = dict(zip((*self.inputs, *self.states), given, strict=True))
        after = {name: named[name] for name in self.states}
        values: dict[Var, Any] = {var: named[name] for name, var in self._function.inputs.items()}
        names = {var: name for name, var in self._function.inputs.items()}
        for op in self._function.operations:
            known, constant = constant_of(op)
            if known:
                values[op.outputs[0]] = constant
            elif op.op_type == "coreml_update_state":
                after[names[op.state]] = values[op.outputs[0]] = values[op.value]
            else:
                results = self._results(op, values)
                values.update(zip(op.outputs, results, strict=True))
        return {var.name: values[var] for var in self._function.outputs}, after

    def _results(self, op: Operation, values: Mapping[Var, Any]) -> Sequence[Value]:
        if op.op_type not in _LOWERED:
            raise CheckpointError(f"the Core AI lowering does not know the operation {op.op_type!r}")
        result = _LOWERED[op.op_type](self._ops, **arguments(op, values))
        return result if isinstance(result, list) else [result]


# One function for each operation. Its arguments have MIL's names; those that do not matter here go to `_`.


def _linear(ops: Operations, x: Value, weight: np.ndarray, bias: np.ndarray) -> Value:
    y = ops.linear(x, weight)
    return ops.add(y, bias) if np.any(bias) else y


def _split(
    ops: Operations, x: Value, axis: int, split_sizes: np.ndarray | None = None, num_splits: int = 1
) -> list[Value]:
    equal = [ops.shape(x)[axis] // int(num_splits)] * int(num_splits)
    return ops.split(x, equal if split_sizes is None else [int(n) for n in split_sizes], axis=int(axis))


def _slice_by_size(ops: Operations, x: Value, begin: np.ndarray, size: np.ndarray) -> Value:
    shape = ops.shape(x)
    sizes = [shape[i] - first if n == -1 else n for i, (first, n) in enumerate(zip(begin, size, strict=True))]
    return ops.slice(x, begin=[int(n) for n in begin], size=[int(n) for n in sizes])


def _pad(ops: Operations, x: Value, pad: np.ndarray, constant_val: float, **_: Any) -> Value:
    *before, behind = np.ravel(pad)
    if np.any(before) or constant_val:
        raise CheckpointError("the Core AI lowering knows only zeros behind the last axis")
    return ops.pad_last(x, ops.shape(x)[-1] + int(behind))


def _cast(ops: Operations, x: Value, dtype: str) -> Value:
    return ops.cast(x, {"int32": np.int32, "bool": np.bool_}.get(str(dtype), np.float32))


def _rsqrt(ops: Operations, x: Value, epsilon: float) -> Value:
    return ops.rsqrt(ops.add(x, np.float32(epsilon)) if epsilon else x)


def _gelu(ops: Operations, x: Value, mode: str = "EXACT") -> Value:
    if mode != "TANH_APPROXIMATION":
        raise CheckpointError("the Core AI lowering knows only the tanh GELU")
    return ops.gelu(x)


def _along(name: str) -> Callable[..., Value]:
    return lambda ops, x, axes, keep_dims: getattr(ops, name)(x, axis=int(axes[0]))


def _same(name: str, *arguments: str) -> Callable[..., Value]:
    """An operation that both have: its arguments by MIL's names, in the order of ours."""
    return lambda ops, **given: getattr(ops, name)(*(given[argument] for argument in arguments))


_LOWERED: dict[str, Callable[..., Value | list[Value]]] = {
    **{name: _same(name, "x", "y") for name in ("add", "sub", "mul", "maximum", "equal", "less")},
    **{name: _same(name, "x") for name in ("abs", "square", "tanh", "sigmoid", "silu")},
    **{name: _along(name) for name in ("reduce_max", "reduce_mean", "reduce_sum")},
    "cast": _cast,
    "clip": _same("clip", "x", "alpha", "beta"),
    "concat": lambda ops, values, axis, **_: ops.concat(values, axis=int(axis)),
    "expand_dims": lambda ops, x, axes: ops.expand_dims(x, int(axes[0])),
    "gather": lambda ops, x, indices, axis, **_: ops.gather(x, indices),
    "gelu": _gelu,
    "identity": lambda ops, x: x,
    "linear": _linear,
    "matmul": lambda ops, x, y, transpose_x=False, transpose_y=False: ops.matmul(
        x, y, bool(transpose_x), bool(transpose_y)
    ),
    "pad": _pad,
    "read_state": lambda ops, input: input,
    "real_div": _same("div", "x", "y"),
    "reshape": lambda ops, x, shape: ops.reshape(x, [int(n) for n in shape]),
    "rsqrt": _rsqrt,
    "slice_by_size": _slice_by_size,
    "split": _split,
    "transpose": lambda ops, x, perm: ops.transpose(x, [int(n) for n in perm]),
}
