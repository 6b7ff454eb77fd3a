"""Run a saved Core ML package in numpy: what checks a package where Core ML itself is not.

Each operation computes in float32 and rounds its result to the type it declares. That proves the graph and its
weights, not how a Neural Engine rounds inside an operation, nor where Core ML runs what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from coremltools import proto
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.converters.mil.mil import Function, Operation, Var, types
from coremltools.models.utils import load_spec

from ..errors import CheckpointError


class State(dict[str, np.ndarray]):
    """Between calls, the states by name; read and written as coremltools' MLState is."""

    def read_state(self, name: str) -> np.ndarray:
        return self[name]

    def write_state(self, name: str, value: np.ndarray) -> None:
        self[name] = value.astype(np.float32)


class _Step(NamedTuple):
    """An operation ready to run: what it computes, of which constants and values, for which variables."""

    compute: Callable[[dict], Any]
    constants: dict[str, Any]
    arguments: dict[str, Var | list]
    outputs: Sequence[Var]
    rounds: bool


class Interpreter:
    """Runs one function.

    Args:
        function: of a package, from `load`, or of a program that was never saved.
        rounding: whether results are rounded to float16 where declared so; if not, all arithmetic is float32.

    Attributes:
        inputs, outputs: their shapes by name, the state among the inputs.
        operations: the function's operations in order, constants apart.

    Raises:
        CheckpointError: it has an operation that is not known here.
    """

    def __init__(self, function: Function, rounding: bool = True):
        self._function = function
        constants, self.operations, self._steps = {}, [], []
        for op in self._function.operations:
            if op.op_type == "const":
                constants[op.outputs[0]] = _widened(op.outputs[0].val)
            elif op.op_type.startswith("constexpr_"):
                constants[op.outputs[0]] = _widened(op.materialized_val_inference())
            elif op.op_type in _OPERATIONS:
                self.operations.append(op)
                self._steps.append(_step(op, constants, rounding))
            else:
                raise CheckpointError(f"the interpreter does not know the operation {op.op_type!r}")
        self.inputs = {name: _shape(var) for name, var in self._function.inputs.items()}
        self.outputs = {var.name: tuple(var.shape) for var in self._function.outputs}

    def make_state(self) -> State:
        """The state before the first call: zeros."""
        states = {name: var for name, var in self._function.inputs.items() if types.is_state(var.sym_type)}
        return State({name: np.zeros(_shape(var), np.float32) for name, var in states.items()})

    def predict(self, inputs: Mapping[str, np.ndarray], state: State | None = None) -> dict[str, np.ndarray]:
        """Outputs by name; `state` is updated in place."""
        values: dict[Var, Any] = {}
        for name, var in self._function.inputs.items():
            # A state stands for itself, by name, until it is read.
            values[var] = (state, name) if types.is_state(var.sym_type) else _widened(np.asarray(inputs[name]))
        with np.errstate(over="ignore"):
            for step in self._steps:
                arguments = {name: _value(values, var) for name, var in step.arguments.items()}
                results = step.compute(step.constants | arguments)
                results = results if isinstance(results, list) else [results]
                for var, result in zip(step.outputs, results, strict=True):
                    values[var] = result.astype(np.float16).astype(np.float32) if step.rounds else result
        return {var.name: values[var] for var in self._function.outputs}


def _step(op: Operation, constants: Mapping[Var, Any], rounding: bool) -> _Step:
    given = {name: var for name, var in op.inputs.items() if var is not None}
    known = {name: constants[var] for name, var in given.items() if isinstance(var, Var) and var in constants}
    arguments = {
        name: [constants.get(v, v) for v in var] if isinstance(var, (list, tuple)) else var
        for name, var in given.items()
        if name not in known
    }
    half = op.outputs[0].dtype == types.fp16
    return _Step(_OPERATIONS[op.op_type], known, arguments, op.outputs, half and rounding and op.op_type not in _EXACT)


def _value(values: Mapping[Var, Any], argument: Var | list):
    """Of a variable, or of a list of variables and constants."""
    if isinstance(argument, list):
        return [values[x] if isinstance(x, Var) else x for x in argument]
    return values[argument]


def load(package: Path, function: str | None = None) -> Function:
    """A function of a saved package; None for the default, or the only one.

    Raises:
        CheckpointError: not a package that can be read, or no such function.
    """
    try:
        spec: proto.Model_pb2.Model = load_spec(str(package))
        weights = package / "Data/com.apple.CoreML/weights"
        program = load_program(spec, spec.specificationVersion, str(weights))
    except Exception as error:  # whatever coremltools and protobuf make of a damaged file
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{package}: cannot be read as a Core ML package: {first_line}") from error
    if function is None:
        function = spec.description.defaultFunctionName or "main"
    if function not in program.functions:
        raise CheckpointError(f"{package}: has no function {function!r}, only {', '.join(sorted(program.functions))}")
    return program.functions[function]


def _widened(value):
    """Half precision is computed with in float32."""
    return value.astype(np.float32) if getattr(value, "dtype", None) == np.float16 else value


def _shape(var: Var) -> tuple[int, ...]:
    return tuple(var.sym_type.wrapped_type().get_shape() if types.is_state(var.sym_type) else var.shape)


# One function per operation, of its arguments by name.


def _gather(a):
    return np.take(a["x"], a["indices"], axis=int(a["axis"]))


def _linear(a):
    return a["x"] @ a["weight"].T + a["bias"]


def _matmul(a):
    x = a["x"].swapaxes(-1, -2) if a.get("transpose_x", False) else a["x"]
    y = a["y"].swapaxes(-1, -2) if a.get("transpose_y", False) else a["y"]
    return x @ y


def _gelu(a):
    if a.get("mode", "EXACT") != "TANH_APPROXIMATION":
        raise CheckpointError("the interpreter knows only the tanh GELU")
    x = a["x"]
    return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def _split(a):
    ends = np.cumsum(a["split_sizes"])[:-1] if a.get("split_sizes") is not None else int(a["num_splits"])
    return np.split(a["x"], ends, axis=int(a["axis"]))


def _slice_by_size(a):
    begin, size = a["begin"], a["size"]
    return a["x"][tuple(slice(b, None if n == -1 else b + n) for b, n in zip(begin, size, strict=True))]


def _pad(a):
    last = np.reshape(a["pad"], (-1, 2))
    return np.pad(a["x"], [(0, 0)] * (a["x"].ndim - len(last)) + last.tolist(), constant_values=a["constant_val"])


def _cast(a):
    kinds = {"fp16": np.float32, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}
    return a["x"].astype(kinds[str(a["dtype"])])


def _read_state(a):
    state, name = a["input"]
    return state[name]


def _update_state(a):
    state, name = a["state"]
    state[name] = a["value"]
    return a["value"]


def _along(reduce):
    return lambda a: reduce(a["x"], axis=tuple(a["axes"]), keepdims=bool(a["keep_dims"]))


def _unary(function):
    return lambda a: function(a["x"])


def _binary(function):
    return lambda a: function(a["x"], a["y"])


_OPERATIONS: dict[str, Callable[[dict], Any]] = {
    "abs": _unary(np.abs),
    "add": _binary(np.add),
    "cast": _cast,
    "clip": lambda a: np.clip(a["x"], a["alpha"], a["beta"]),
    "concat": lambda a: np.concatenate(a["values"], axis=int(a["axis"])),
    "coreml_update_state": _update_state,
    "equal": _binary(np.equal),
    "expand_dims": lambda a: np.expand_dims(a["x"], tuple(a["axes"])),
    "gather": _gather,
    "gelu": _gelu,
    "identity": _unary(np.asarray),
    "less": _binary(np.less),
    "linear": _linear,
    "matmul": _matmul,
    "maximum": _binary(np.maximum),
    "mul": _binary(np.multiply),
    "pad": _pad,
    "read_state": _read_state,
    "real_div": _binary(np.divide),
    "reduce_max": _along(np.max),
    "reduce_mean": _along(np.mean),
    "reduce_sum": _along(np.sum),
    "reshape": lambda a: a["x"].reshape(a["shape"]),
    "rsqrt": lambda a: 1 / np.sqrt(a["x"] + a["epsilon"]),
    "sigmoid": _unary(_sigmoid),
    "silu": lambda a: a["x"] * _sigmoid(a["x"]),
    "slice_by_size": _slice_by_size,
    "split": _split,
    "square": _unary(np.square),
    "sub": _binary(np.subtract),
    "tanh": _unary(np.tanh),
    "transpose": lambda a: a["x"].transpose(a["perm"]),
}

# They move numbers or choose among them: nothing to round.
_EXACT = {
    *("abs", "clip", "concat", "coreml_update_state", "expand_dims", "gather", "identity", "maximum", "pad"),
    *("read_state", "reduce_max", "reshape", "slice_by_size", "split", "transpose"),
}
