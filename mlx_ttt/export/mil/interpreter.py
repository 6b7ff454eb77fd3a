"""Run a Core ML program in NumPy. It checks packages where there is no Core ML.

Each operation computes in float32 and rounds its result to the type that it declares. That proves the graph and its
weights. It proves neither how a Neural Engine rounds inside an operation nor which device runs what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from coremltools import proto
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.converters.mil.mil import Function, Operation, Var, types
from coremltools.models.utils import load_spec

from ...errors import CheckpointError
from ..errors import first_line


class State(dict[str, np.ndarray]):
    """The states by name, between calls. It has the methods of coremltools' MLState."""

    def read_state(self, name: str) -> np.ndarray:
        return self[name]

    def write_state(self, name: str, value: np.ndarray) -> None:
        self[name] = value.astype(np.float32)


def empty_state(function: Function) -> State:
    """The state before the first call: zeros."""
    inputs = function.inputs.items()
    return State({name: np.zeros(shape_of(var), np.float32) for name, var in inputs if types.is_state(var.sym_type)})


class Interpreter:
    """Runs one function.

    Args:
        function: of a saved package, from `load`, or of a program that was never saved.
        rounding: whether results that are declared as float16 are rounded to it. If not, all arithmetic is float32.

    Attributes:
        inputs: their shapes by name. A state is one of them.
        operations: the function's operations in order, without its constants.

    Raises:
        CheckpointError: the function has an operation that is not known here.
    """

    def __init__(self, function: Function, rounding: bool = True):
        self._function, self._rounding = function, rounding
        self._constants: dict[Var, Any] = {}
        self.operations = []
        for op in function.operations:
            known, constant = constant_of(op)
            if known:
                self._constants[op.outputs[0]] = constant
            elif op.op_type in _OPERATIONS:
                self.operations.append(op)
            else:
                raise CheckpointError(f"the interpreter does not know the operation {op.op_type!r}")
        self.inputs = {name: shape_of(var) for name, var in function.inputs.items()}

    def make_state(self) -> State:
        """The state before the first call: zeros."""
        return empty_state(self._function)

    def predict(self, inputs: Mapping[str, np.ndarray], state: State | None = None) -> dict[str, np.ndarray]:
        """The outputs of one call by name; `state` is updated in place."""
        values = dict(self._constants)
        for name, var in self._function.inputs.items():
            # A state is read by an operation of its own: until then its value is where to find it.
            values[var] = (state, name) if types.is_state(var.sym_type) else _widened(np.asarray(inputs[name]))
        with np.errstate(over="ignore"):
            for op in self.operations:
                results = _OPERATIONS[op.op_type](**arguments(op, values))
                rounds = self._rounding and op.op_type not in _EXACT and op.outputs[0].dtype == types.fp16
                for var, result in zip(op.outputs, results if isinstance(results, list) else [results], strict=True):
                    values[var] = result.astype(np.float16).astype(np.float32) if rounds else result
        return {var.name: values[var] for var in self._function.outputs}


def constant_of(op: Operation) -> tuple[bool, Any]:
    """Whether an operation gives a constant, and that constant, float16 as float32."""
    if op.op_type == "const":
        return True, _widened(op.outputs[0].val)
    if op.op_type.startswith("constexpr_"):
        return True, _widened(op.materialized_val_inference())
    return False, None


def arguments(op: Operation, values: Mapping[Var, Any]) -> dict[str, Any]:
    """The values of an operation's arguments by name; of those that are lists of variables, lists."""
    given = ((name, var) for name, var in op.inputs.items() if var is not None)
    return {name: [values[x] for x in var] if isinstance(var, (list, tuple)) else values[var] for name, var in given}


def load(package: Path, function: str | None = None) -> Function:
    """A function of a saved package. None stands for the default one, or the only one.

    Raises:
        CheckpointError: the package cannot be read, or has no such function.
    """
    try:
        spec: proto.Model_pb2.Model = load_spec(str(package))
        program = load_program(spec, spec.specificationVersion, str(package / "Data/com.apple.CoreML/weights"))
    except Exception as error:  # whatever coremltools and protobuf make of a damaged file
        raise CheckpointError(f"{package}: cannot be read as a Core ML package: {first_line(error)}") from error
    function = function or spec.description.defaultFunctionName or "main"
    if function not in program.functions:
        raise CheckpointError(f"{package}: has no function {function!r}, only {', '.join(sorted(program.functions))}")
    return program.functions[function]


def _widened(value: Any) -> Any:
    """Float16 as float32, in which all arithmetic is done."""
    return value.astype(np.float32) if getattr(value, "dtype", None) == np.float16 else value


def shape_of(var: Var) -> tuple[int, ...]:
    """Of an input or a state."""
    return tuple(var.sym_type.wrapped_type().get_shape() if types.is_state(var.sym_type) else var.shape)


# One function for each operation. Its arguments have MIL's names; those that do not matter here go to `_`.


def _matmul(x: np.ndarray, y: np.ndarray, transpose_x: bool = False, transpose_y: bool = False) -> np.ndarray:
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)


def _gelu(x: np.ndarray, mode: str = "EXACT") -> np.ndarray:
    if mode != "TANH_APPROXIMATION":
        raise CheckpointError("the interpreter knows only the tanh GELU")
    return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _split(x: np.ndarray, axis: int, split_sizes: np.ndarray | None = None, num_splits: int = 1) -> list[np.ndarray]:
    return np.split(x, int(num_splits) if split_sizes is None else np.cumsum(split_sizes)[:-1], axis=int(axis))


def _slice_by_size(x: np.ndarray, begin: np.ndarray, size: np.ndarray) -> np.ndarray:
    return x[tuple(slice(b, None if n == -1 else b + n) for b, n in zip(begin, size, strict=True))]


def _pad(x: np.ndarray, pad: np.ndarray, constant_val: float, **_: Any) -> np.ndarray:
    last = np.reshape(pad, (-1, 2))
    return np.pad(x, [(0, 0)] * (x.ndim - len(last)) + last.tolist(), constant_values=constant_val)


def _cast(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype({"fp16": np.float32, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}[str(dtype)])


def _update_state(state: tuple[State, str], value: np.ndarray) -> np.ndarray:
    state[0][state[1]] = value
    return value


def _along(reduce: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, axes, keep_dims: reduce(x, axis=tuple(axes), keepdims=bool(keep_dims))


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: x + y,
    "cast": _cast,
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "concat": lambda values, axis, **_: np.concatenate(values, axis=int(axis)),
    "coreml_update_state": _update_state,
    "equal": lambda x, y: x == y,
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(axes)),
    "gather": lambda x, indices, axis, **_: np.take(x, indices, axis=int(axis)),
    "gelu": _gelu,
    "identity": lambda x: x,
    "less": lambda x, y: x < y,
    "linear": lambda x, weight, bias: x @ weight.T + bias,
    "matmul": _matmul,
    "maximum": lambda x, y: np.maximum(x, y),
    "mul": lambda x, y: x * y,
    "pad": _pad,
    "read_state": lambda input: input[0][input[1]],
    "real_div": lambda x, y: x / y,
    "reduce_max": _along(np.max),
    "reduce_mean": _along(np.mean),
    "reduce_sum": _along(np.sum),
    "reshape": lambda x, shape: x.reshape(shape),
    "rsqrt": lambda x, epsilon: 1 / np.sqrt(x + epsilon),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "slice_by_size": _slice_by_size,
    "split": _split,
    "square": lambda x: np.square(x),
    "sub": lambda x, y: x - y,
    "tanh": lambda x: np.tanh(x),
    "transpose": lambda x, perm: x.transpose(perm),
}

# These move numbers or choose among them, so there is nothing to round.
_EXACT = {
    *("abs", "clip", "concat", "coreml_update_state", "expand_dims", "gather", "identity", "maximum", "pad"),
    *("read_state", "reduce_max", "reshape", "slice_by_size", "split", "transpose"),
}
