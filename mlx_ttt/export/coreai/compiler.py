"""What we use of Apple's compiler for Core AI. No other file imports `coreai._compiler`.

Some things that a lowering needs, such as loops and states, are only there, and it calls itself unversioned: it may
change with any release. So this room wants exactly one version of coreai-core, which `require_coreai` checks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

import coreai.authoring  # before the compiler: imported first, that fails with a circular import
import ml_dtypes
import numpy as np
from coreai._compiler import ir
from coreai._compiler._mlir_libs._coreaiIR._bindings.mlir.dialects.coreai import create_elements_attr
from coreai._compiler.dialects import coreai as dialect
from coreai.authoring import CustomMetalKernel, MetalParameter, TensorType

from ..operations import NumberType

Value: TypeAlias = ir.Value  # of a graph

_NUMBER_TYPES: dict[str, NumberType] = {
    **{"f16": np.float16, "f32": np.float32, "i1": np.bool_},
    **{"i32": np.int32, "si32": np.int32, "ui32": np.uint32},
}
_PACKED = {np.dtype(ml_dtypes.int4): coreai.authoring.int4, np.dtype(ml_dtypes.uint4): coreai.authoring.uint4}


def shape(x: Value) -> tuple[int, ...]:
    """-1 stands for a length that only the call knows."""
    return tuple(n if n >= 0 else -1 for n in ir.RankedTensorType(x.type).shape)


def number_type(x: Value) -> NumberType:
    return _NUMBER_TYPES[str(ir.RankedTensorType(x.type).element_type)]


def constant(x: np.ndarray) -> Value:
    """A constant of the graph that is being built.

    Four-bit integers are packed, the first of two in the low half of a byte: `coreai.constant` stores a byte for each,
    on which the runtime ends the process.
    """
    packed = _PACKED.get(x.dtype)
    if packed is None:
        return dialect.constant(np.asarray(x, order="C"))
    nibbles = x.astype(np.int8).view(np.uint8).ravel() & 15
    nibbles = np.pad(nibbles, (0, nibbles.size % 2))
    data = np.ascontiguousarray(nibbles[0::2] | nibbles[1::2] << 4)
    tensor_type = TensorType(x.shape, packed)._to_mlir()
    return dialect.ConstantOp(value=create_elements_attr(ir.Location.unknown(), tensor_type, data)).result


def add_function(
    name: str,
    inputs: Mapping[str, tuple[Sequence[int], NumberType]],
    states: Mapping[str, tuple[Sequence[int], NumberType]],
    body: Callable[..., tuple[Mapping[str, Value], Mapping[str, Value]]],
) -> None:
    """Add a function to the module that is being built.

    Args:
        name: of the function.
        inputs: their shapes and number types by name; -1 in a shape is a length that only the call knows.
        states: the same of the states, arrays that the caller keeps and each call changes.
        body: takes the inputs, then the states; returns the outputs and the new states by name.
    """
    arguments = {**inputs, **states}
    types = [TensorType(tuple(shape), number)._to_mlir() for shape, number in arguments.values()]
    graph = dialect.GraphOp(name, types, [], input_names=list(arguments))
    with graph.block:
        outputs, after = body(*graph.arguments)
    graph.set_outputs_spec_from_dict(OrderedDict([*outputs.items(), *((name, after[name]) for name in states)]))
    attributes = []
    for argument, given in zip(arguments, graph.arg_attrs, strict=True):
        entries = {entry.name: entry.attr for entry in cast(Any, given)}
        if argument in states:
            entries["MutableBuffers.buffer_mutation"] = ir.StringAttr.get(argument)
        attributes.append(ir.DictAttr.get(entries))
    graph.arg_attrs = ir.ArrayAttr.get(attributes)


def while_(
    start: Sequence[Value],
    goes_on: Callable[..., Value],
    step: Callable[..., Sequence[Value]],
) -> list[Value]:
    """Repeat a step while a condition holds.

    Carry few values: with one for each part of the state, some were wrong from the third round on, and nothing says so
    (Linux, 1.0.0b3). The same is true of what a branch within a loop gives. `verify` would find it.

    Args:
        start: the values before the first round.
        goes_on: of the values, whether there is another round: a truth value.
        step: the values after a round; of the same shapes and number types.

    Returns:
        The values after the last round.
    """
    results, (before, after) = cast(Any, dialect.while_)(results=[x.type for x in start], inits=list(start))
    with before:
        dialect.condition(goes_on(*before.arguments), *before.arguments)
    with after:
        dialect.yield_(settled(step(*after.arguments)))
    return list(results)


@dataclass(frozen=True)
class MetalKernel:
    """A Metal kernel that a graph launches. Core AI writes its signature: parameters are tensors, their names these.

    Attributes:
        name: of the kernel.
        inputs, outputs: the names of its parameters.
        positions: the types of its further parameters, which have the names of the attributes that fill them.
        header: what stands before it.
        body: what stands in it.
    """

    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    positions: Mapping[str, str]
    header: str
    body: str

    @cached_property
    def _kernel(self) -> CustomMetalKernel:
        positions = [MetalParameter(name, kind, name) for name, kind in self.positions.items()]
        names = list(self.inputs), list(self.outputs)
        return CustomMetalKernel(self.name, *names, self.body, metal_params=positions, helper_src=self.header)

    def __call__(
        self,
        inputs: Sequence[Value],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        outputs: Sequence[tuple[Sequence[int], NumberType]],
    ) -> list[Value]:
        """Its outputs, of these shapes and number types, in a grid of so many threads in threadgroups of so many."""

        def numbers(x: Sequence[int]) -> Value:
            return constant(np.asarray(x, np.uint32))

        sizes = [numbers(grid), numbers(threadgroup), *(numbers(shape) for shape, _ in outputs)]
        types = [TensorType(tuple(shape), number)._to_mlir() for shape, number in outputs]
        return self._kernel._construct_kernel_op([*inputs, *sizes], types)


def settled(values: Sequence[Value]) -> list[Value]:
    """The same values, each from an operation that works element by element.

    What a loop carries on straight from a product, a transposition or a reversal is wrong from the second round on, and
    nothing says so (Linux, 1.0.0b3).
    """
    return [dialect.broadcasting_add(x, constant(np.zeros((), number_type(x)))) for x in values]
