"""A saved program with Metal kernels, run without a GPU: the kernels on the host harness, all else on Apple's runtime.

The program is read from its file. Each kernel's source is what the file has, in the signature that Core AI wrote. Three
things differ from a device: a parameter that is a tensor becomes a pointer and a tensor around it, since the harness
passes pointers; `x[0, 0]` becomes `x(0, 0)`, since C++20 has no subscripts with several indices; and the random end of
the name is dropped. A tensor's indices run from the last axis of an array to the first, as on a device.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from coreai._compiler import ir
from coreai.authoring import AIModelAsset

from mlx_ttt.export.coreai import kernels
from mlx_ttt.export.coreai.runtime import Runtime

from ...backends.metal.host import HostKernel

_TENSORS = """
namespace mpp { namespace tensor_ops {} }
namespace metal {
struct tensor_handle {};
template <class I, int RANK>
struct dextents {
  I of[RANK];
};
template <class T, class E, class H>
struct tensor;
template <class T, int RANK>
struct tensor<T, dextents<int, RANK>, tensor_handle> {
  T* data;
  dextents<int, RANK> extents;
  template <class... I>
  T& operator()(I... index) const {
    static_assert(sizeof...(I) == RANK, "one index for each axis");
    const int at[] = {index...};
    int place = 0;
    for (int axis = RANK - 1; axis >= 0; --axis) place = place * extents.of[axis] + at[axis];
    return data[place];
  }
};
}  // namespace metal
"""
_PERFORMANCE = "#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>"
_SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\((.*?)\) \{ ")
_TENSOR = re.compile(r"tensor<device (\w+), metal::dextents<int, (\d)>, tensor_handle> (\w+) \[\[buffer\((\d+)\)\]\]")
_TYPES = {"f32": np.float32, "f16": np.float16, "si32": np.int32, "i32": np.int32}


@dataclass(frozen=True)
class Embedded:
    """One launch in a saved program.

    Attributes:
        function: which has it.
        source: of the kernel, as the file has it.
        inputs, outputs: shapes and number types.
        grid, threadgroup: threads.
    """

    function: str
    source: str
    inputs: tuple[tuple[tuple[int, ...], type], ...]
    outputs: tuple[tuple[tuple[int, ...], type], ...]
    grid: tuple[int, ...]
    threadgroup: tuple[int, ...]

    @property
    def parameters(self) -> list[str]:
        """Those of the kernel, as Core AI wrote them."""
        return re.split(r", (?=tensor<|uint)", _SIGNATURE.search(self.source)[2])

    @functools.cached_property
    def host(self) -> HostKernel:
        return _host_kernel(host_source(self))

    def run(self, arrays: list[np.ndarray], seed: int = 0) -> list[np.ndarray]:
        """The outputs."""
        assert [(x.shape, x.dtype.type) for x in arrays] == list(self.inputs)
        found = [np.zeros(shape, number) for shape, number in self.outputs]
        names = [buffer.name for buffer in self.host.buffers]
        buffers = dict(zip(names, [*map(np.ascontiguousarray, arrays), *found], strict=True))
        scratch = "scratch_tensor" in names  # working memory need not be used up
        self.host.run(buffers, self.grid, self.threadgroup, seed=seed, allow_unwritten=scratch)
        return found


@functools.cache
def _host_kernel(source: str) -> HostKernel:
    return HostKernel(source)


def host_source(kernel: Embedded) -> str:
    """What the harness compiles."""
    name, _ = _SIGNATURE.search(kernel.source).groups()
    parameters, tensors = [], []
    for i, parameter in enumerate(kernel.parameters):
        match = _TENSOR.fullmatch(parameter)
        if match is None:
            assert re.fullmatch(r"uint3? (\w+) \[\[\1\]\]", parameter), parameter
            parameters.append(parameter)
            continue
        number, rank, tensor, place = match.groups()
        shape, known = [*kernel.inputs, *kernel.outputs][i]
        assert (int(place), int(rank), kernels.METAL_TYPES[known]) == (i, len(shape), number)
        kind = f"{'const ' * (i < len(kernel.inputs))}device {number}"
        extents = ", ".join(map(str, shape[::-1]))
        parameters.append(f"{kind}* {tensor} [[buffer({i})]]")
        of = f"tensor<{kind}, dextents<int, {rank}>, tensor_handle>"
        tensors.append(f"const {of} at_{tensor}{{{tensor}, {{{{{extents}}}}}}};")
    begin, end = _SIGNATURE.search(kernel.source).span()
    body = re.sub(r"&(\w+_tensor)\[([\d, ]+)\]", r"&at_\1(\2)", kernel.source[end:])
    signature = f"[[kernel]] void {name.rsplit('_', 1)[0]}({', '.join(parameters)}) {{ "
    whole = kernel.source[:begin] + signature + " ".join(tensors) + body
    assert _PERFORMANCE in whole
    return whole.replace(_PERFORMANCE, _TENSORS)


def embedded(asset: Path) -> list[Embedded]:
    """The launches in a saved program, in order."""
    program = AIModelAsset.load(asset).program
    return [_embedded(operation) for operation in _launches(program._module._mlir_module)]


def _launches(module: ir.Module) -> list[ir.Operation]:
    found = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "coreai.metal4_kernel":
            found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def _function(operation: ir.Operation) -> str:
    return ir.StringAttr(operation.parent.attributes["sym_name"]).value


def _embedded(operation: ir.Operation) -> Embedded:
    results, operands = list(operation.results), list(operation.operands)
    inputs, sizes = operands[: -2 - len(results)], operands[-2 - len(results) :]
    grid, threadgroup, *shapes = (_numbers(size) for size in sizes)
    outputs = tuple(_type(x) for x in results)
    assert [shape for shape, _ in outputs] == shapes
    return Embedded(
        _function(operation),
        ir.StringAttr(operation.attributes["kernel_source"]).value,
        tuple(_type(x) for x in inputs),
        outputs,
        grid,
        threadgroup,
    )


def _type(x) -> tuple[tuple[int, ...], type]:
    of = ir.RankedTensorType(x.type)
    return tuple(of.shape), _TYPES[str(of.element_type)]


def _numbers(x) -> tuple[int, ...]:
    """Of a constant; one of equal numbers is stored as a single one."""
    text = re.search(r"dense<(.*?)> : tensor<(\d+)xui32>", str(x.owner))
    numbers = [int(n) for n in re.findall(r"\d+", text[1])]
    return tuple(numbers * int(text[2]) if len(numbers) == 1 else numbers)


def cut(asset: Path, out: Path) -> None:
    """Save the program without its kernels: what they take becomes outputs, what they give becomes inputs.

    These are named KERNEL.in.N and KERNEL.out.N, kernels counted from 0 in each function. All else is as in the file.
    """
    program = AIModelAsset.load(asset).program
    module = program._module._mlir_module
    found: dict[str, list[ir.Operation]] = {}
    for operation in _launches(module):
        found.setdefault(_function(operation), []).append(operation)
    with module.context, ir.Location.unknown():
        for launches in found.values():
            graph = launches[0].parent.opview
            outputs, attributes, types = list(graph.outputs_spec), list(graph.arg_attrs), list(graph.type.inputs)
            for i, launch in enumerate(launches):
                results = list(launch.results)
                for j, x in enumerate(list(launch.operands)[: -2 - len(results)]):
                    outputs.append((f"{i}.in.{j}", x.owner.operands[0]))  # before it is copied to the GPU
                for j, result in enumerate(results):
                    (copied,) = [use.owner for use in result.uses]  # back from the GPU
                    (host,) = copied.results
                    argument = graph.entry_block.add_argument(host.type, ir.Location.unknown())
                    attributes.append(ir.DictAttr.get({"coreai.name": ir.StringAttr.get(f"{i}.out.{j}")}))
                    types.append(host.type)
                    given = dict(outputs)
                    outputs = [(name, argument if x == host else x) for name, x in given.items()]
                    host.replace_all_uses_with(argument)
                    copied.erase()
                launch.erase()
            graph.function_type = ir.TypeAttr.get(ir.FunctionType.get(types, graph.type.results))
            graph.outputs_spec = outputs
            graph.arg_attrs = ir.ArrayAttr.get(attributes)
    program.save_asset(out)


class WithHostKernels:
    """Runs the functions of a saved program with kernels: these on the host, all else on Apple's runtime.

    Each call is made once for each layer and once more. The n-th time, it is known what the first n kernels give.

    Args:
        asset: the program.
        runtime: of what `cut` made of it.
        steps_below: `step` instead of `decode` at positions below this one.
    """

    def __init__(self, asset: Path, runtime: Runtime, steps_below: int = 0):
        self.runtime, self.names, self.steps_below = runtime, runtime.names, steps_below
        self.kernels = {name: [one for one in embedded(asset) if one.function == name] for name in self.names}
        self.start, self.write, self.arrays = runtime.start, runtime.write, runtime.arrays
        self.called = Counter()

    def call(self, name: str, inputs: Mapping[str, np.ndarray], states: Any = None) -> dict[str, np.ndarray]:
        if name == "decode" and inputs["position"][0] < self.steps_below:
            name = "step"
        self.called[name] += 1
        before = {key: np.array(x) for key, x in self.arrays(states).items()}
        given = {
            f"{i}.out.{j}": np.zeros(shape, number)
            for i, kernel in enumerate(self.kernels[name])
            for j, (shape, number) in enumerate(kernel.outputs)
        }
        for i, kernel in enumerate(self.kernels[name]):
            outputs = self.runtime.call(name, {**inputs, **given}, self.start({k: x.copy() for k, x in before.items()}))
            taken = [np.array(outputs[f"{i}.in.{j}"]) for j in range(len(kernel.inputs))]
            given |= {f"{i}.out.{j}": x for j, x in enumerate(kernel.run(taken, seed=i))}
        outputs = self.runtime.call(name, {**inputs, **given}, states)
        return {key: x for key, x in outputs.items() if ".in." not in key}
