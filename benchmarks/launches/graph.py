"""The graph of operations that a function makes, as a GPU would get it, recorded on any machine.

`mx.export_function` calls back with every operation of a function that it traces: its name, inputs, outputs and
arguments. Where MLX decides already while tracing, it would decide as for a CPU: norms, attention and dequantization
become many small operations, and compiled functions are not fused. Kernels that are only recorded stand in for those
here. A compiled function stands between two of them, and is fused afterwards (fusion.py).
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn  # noqa: F401  its compiled activations are found among the loaded modules
from mlx.utils import tree_flatten

BEGIN, END = "Begin", "End"  # of a compiled function


@dataclass(eq=False)
class Value:
    """An array of the graph."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    operation: Operation | None = None  # None: an input or a constant


@dataclass(eq=False)
class Operation:
    """A primitive of MLX with its arguments in the order of its `state()`."""

    name: str
    arguments: list[Any]
    inputs: list[Value]
    outputs: list[Value]


@dataclass
class Graph:
    """Operations in an order in which each comes after those that it reads."""

    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    constants: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


def record(function: Callable[..., Sequence[mx.array]], arrays: Sequence[mx.array]) -> Graph:
    """The graph of `function(*arrays)`, which returns arrays. Nothing is computed.

    Two things are not as MLX has them. Equal operations on the same arrays are one, as in a compiled function, but here
    also outside of one, and where one of them is a result of it. And a function that was compiled before and is held by
    anything but a module of mlx, mlx_lm or mlx_ttt is not fused.
    """
    stand_ins = _StandIns()
    events: list[dict[str, Any]] = []
    with stand_ins.in_place():
        mx.export_function(events.append, lambda *inputs: list(function(*inputs)), *arrays)

    graph, values = Graph(), {}

    def value(entry: tuple) -> Value:
        name, shape, dtype = entry
        return values.setdefault(name, Value(tuple(shape), dtype))

    for event in events:
        if event["type"] == "constants":
            graph.constants = [value((name, x.shape, x.dtype)) for name, x in event["constants"]]
        elif event["type"] == "primitive":
            inputs, outputs = ([value(x) for x in event[key]] for key in ("inputs", "outputs"))
            name, arguments = stand_ins.meaning(event["name"], event["arguments"])
            operation = Operation(name, arguments, inputs, outputs)
            graph.operations.append(operation)
            for x in outputs:
                x.operation = operation
        elif event["type"] in ("inputs", "outputs"):
            setattr(graph, event["type"], [value(x) for x in event[event["type"]]])
    return graph


class _StandIns:
    """Kernels that stand in for what would be traced in another way without a GPU."""

    def __init__(self) -> None:
        self._meanings: list[tuple[str, list[Any]]] = []
        self._inside = False  # a compiled function

    def meaning(self, name: str, arguments: list[Any]) -> tuple[str, list[Any]]:
        """The operation that a recorded one stands for."""
        found = name == "CustomKernel" and re.match(r"custom_kernel_stand_in_(\d+)_", arguments[0])
        return self._meanings[int(found[1])] if found else (name, arguments)

    def put(
        self, name: str, inputs: Sequence[mx.array], outputs: Sequence[mx.array], arguments: Sequence[Any] = ()
    ) -> list[mx.array]:
        """An operation of this name; its outputs have the shapes and dtypes of `outputs`."""
        self._meanings.append((name, list(arguments)))
        kernel = mx.fast.metal_kernel(
            name=f"stand_in_{len(self._meanings) - 1}_",
            input_names=[f"x{i}" for i in range(len(inputs))],
            output_names=[f"y{i}" for i in range(len(outputs))],
            source=" ",
        )
        return kernel(  # type: ignore[operator]
            inputs=list(inputs),
            output_shapes=[x.shape for x in outputs],
            output_dtypes=[x.dtype for x in outputs],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context they are what code calls."""
        compiled = type(mx.compile(lambda: None))
        modules = [m for name, m in list(sys.modules.items()) if name.split(".")[0] in ("mlx", "mlx_lm", "mlx_ttt")]
        with contextlib.ExitStack() as stack:
            for module in modules:
                for name, x in list(vars(module).items()):
                    if isinstance(x, compiled):
                        stack.enter_context(mock.patch.object(module, name, self._between_markers(x)))
            for module, name, function in (
                (mx, "compile", self._compile),
                (mx, "custom_function", self._custom_function),
                (mx, "contiguous", self._contiguous),
                (mx, "dequantize", self._dequantize),
                (mx.fast, "rms_norm", self._rms_norm),
                (mx.fast, "layer_norm", self._layer_norm),
                (mx.fast, "rope", self._rope),
                (mx.fast, "scaled_dot_product_attention", self._attention),
            ):
                stack.enter_context(mock.patch.object(module, name, function))
            yield

    def _compile(self, function: Callable, inputs: Any = None, outputs: Any = None, shapeless: bool = False) -> Any:
        return self._between_markers(function)

    def _between_markers(self, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # MLX traces compiled functions inside one as if they were not
                return function(*args, **kwargs)
            number = len(self._meanings)
            args, kwargs = self._mark(BEGIN, number, (args, kwargs))
            self._inside = True
            try:
                results = function(*args, **kwargs)
            finally:
                self._inside = False
            return self._mark(END, number, results)

        return call

    def _mark(self, name: str, number: int, tree: Any) -> Any:
        leaves = tree_flatten(tree)
        places = [i for i, (_, x) in enumerate(leaves) if isinstance(x, mx.array)]
        if not places:
            return tree
        arrays = [leaves[i][1] for i in places]
        marked = dict(zip(places, self.put(name, arrays, arrays, [number]), strict=True))
        return _like(tree, iter([marked.get(i, x) for i, (_, x) in enumerate(leaves)]))

    def _custom_function(self, function: Callable) -> Callable:
        def call(*args: mx.array) -> Any:
            results = function(*args)
            outputs = list(results) if isinstance(results, list | tuple) else [results]
            outputs = self.put("CustomTransforms", [*args, *outputs], outputs)
            return outputs if isinstance(results, list | tuple) else outputs[0]

        call.vjp = call.jvp = lambda gradient: gradient  # type: ignore[attr-defined]
        return call

    def _contiguous(self, a: mx.array, allow_col_major: bool = False, **_: Any) -> mx.array:
        return self.put("Contiguous", [a], [a], [allow_col_major])[0]

    def _dequantize(self, w: mx.array, scales: mx.array, biases: mx.array | None = None, *args: Any, **kw: Any) -> Any:
        out = _DEQUANTIZE(w, scales, biases, *args, **kw)  # for its shape and dtype
        return self.put("Quantize", [w, scales, *([] if biases is None else [biases])], [out], ["dequantize"])[0]

    def _rms_norm(self, x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        dtype = x.dtype if weight is None else _common(x, weight)
        w = mx.array(1, dtype) if weight is None else weight.astype(dtype)
        x = x.astype(dtype)
        return self.put("RMSNorm", [x, w], [x], [eps])[0]

    def _layer_norm(self, x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, **_: Any) -> Any:
        dtype = _common(x, *(p for p in (weight, bias) if p is not None))
        w = mx.array(1, dtype) if weight is None else weight.astype(dtype)
        b = mx.array(0, dtype) if bias is None else bias.astype(dtype)
        x = x.astype(dtype)
        return self.put("LayerNorm", [x, w, b], [x], [eps])[0]

    def _rope(self, a: mx.array, dims: int, *, offset: int | mx.array, freqs: mx.array | None = None, **_: Any) -> Any:
        offset = offset if isinstance(offset, mx.array) else mx.array(offset, mx.int32)
        return self.put("RoPE", [a, offset, *([] if freqs is None else [freqs])], [a], [dims])[0]

    def _attention(self, q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **_: Any) -> mx.array:
        inputs = [q, k, v, *([mask] if isinstance(mask, mx.array) else [])]
        return self.put("ScaledDotProductAttention", inputs, [q[..., :1] * v[:, :1, :1]])[0]


_DEQUANTIZE = mx.dequantize


def _common(*arrays: mx.array) -> mx.Dtype:
    """The dtype that MLX promotes arrays to."""
    return mx.result_type(*arrays)


def _like(tree: Any, leaves: Iterator[Any]) -> Any:
    """A tree of the same form with other leaves."""
    if isinstance(tree, dict):
        return {key: _like(x, leaves) for key, x in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_like(x, leaves) for x in tree)
    return next(leaves)
