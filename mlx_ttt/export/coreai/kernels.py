"""The update rule as our Metal kernels, the files in metal/, in a graph for Core AI. They run on a GPU only.

A kernel is part of the program as source text. Core AI writes the signature: every array is a tensor, whose indices run
from the last axis to the first. The kernels take addresses and sizes instead, and neither depends on that order.

Shapes: H heads, T tokens of a call, D head dimension, K mini-batch size, R row width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...backends.metal import rule as metal
from ...errors import TTTError
from ...network.args import ModelArgs
from ..calls import Signals
from ..layout import stored_transposed
from ..operations import NumberType, Value
from ..rule import Tokens, UpdateRule
from .compiler import MetalKernel
from .operations import CoreAIOperations
from .storage import Storage

FORMS = {"step": "step", "decode": "chunk", "prefill": "chunk"}  # of the kernels, by function
METAL_TYPES: dict[NumberType, str] = {np.float32: "float", np.float16: "half", np.int32: "int"}


def check(args: ModelArgs) -> None:
    """Raise a TTTError if there are no kernels for a model of these sizes."""
    D, K = args.head_dim, args.mini_batch_size
    if D not in metal.HEAD_DIMENSIONS:
        known = ", ".join(map(str, metal.HEAD_DIMENSIONS))
        raise TTTError(f"--kernels: there are none for a head dimension of {D}, only for {known}; export without them")
    if K > metal.LARGEST_MINI_BATCH:
        raise TTTError(
            f"--kernels: there are none for mini-batches of {K} tokens, only up to {metal.LARGEST_MINI_BATCH};"
            " export without them"
        )


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, with what its inputs are.

    Attributes:
        kernel: what is launched.
        sizes: of its tokens, [B, T, H, D].
        K: mini-batch size.
        inputs: by name.
        outputs: their shapes and number types by name.
    """

    kernel: metal.Launch
    sizes: tuple[int, int, int, int]
    K: int
    inputs: Mapping[str, Value]
    outputs: Mapping[str, tuple[tuple[int, ...], NumberType]]

    @property
    def grid(self) -> tuple[int, int, int]:
        """The threads."""
        return self.kernel.threads * self.sizes[2], self.sizes[0], 1

    @property
    def threadgroup(self) -> tuple[int, int, int]:
        """The threads of a threadgroup."""
        return self.kernel.threads, 1, 1


class KernelOperations(CoreAIOperations):
    """Adds each operation to the graph that is being built, with a kernel as the update rule.

    Args:
        storage: how the matrices of `linear` and `gather` are stored.
        network: the number type of what `gather` gives.
        form: of the kernels: "chunk", or "step" for tokens that complete no mini-batch.
    """

    def __init__(self, storage: Storage, network: NumberType, form: str):
        super().__init__(storage, network)
        self._form, self._kernels = form, dict[tuple, MetalKernel]()

    def learn(self, rule: UpdateRule, tokens: Tokens, state: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
        return _Update(self, self._form, rule, state)(tokens)

    def launch(self, launch: Launch) -> list[Value]:
        """Launch a kernel; all launches of one kind share its source."""
        inputs = {name: self.value(x) for name, x in launch.inputs.items()}
        types = {name: (len(self.shape(x)), self.number_type(x)) for name, x in inputs.items()}
        types |= {name: (len(shape), number) for name, (shape, number) in launch.outputs.items()}
        key = launch.kernel.text.name, launch.sizes, *types.values()
        if key not in self._kernels:
            self._kernels[key] = _with_tensors(launch, types)
        return self._kernels[key](list(inputs.values()), launch.grid, launch.threadgroup, list(launch.outputs.values()))


def _with_tensors(launch: Launch, types: Mapping[str, tuple[int, NumberType]]) -> MetalKernel:
    """The kernel with tensors as parameters: before its body stand their addresses, and what MLX would give it."""
    text, (_, _, _, D) = launch.kernel.text, launch.sizes
    addresses = []
    for name, (rank, number) in types.items():
        kind = f"{'const ' * (name in text.inputs)}device {METAL_TYPES[number]}*"
        addresses.append(f"{kind} {name} = &{name}_tensor[{', '.join('0' * rank)}];")
    sizes = f"constexpr int D = {D}, K = {launch.K}, TILES = {launch.kernel.tiles};"
    shape = f"const int q_shape[4] = {{{', '.join(map(str, launch.sizes))}}};"
    return MetalKernel(
        name=text.name,
        inputs=[f"{name}_tensor" for name in text.inputs],
        outputs=[f"{name}_tensor" for name in text.outputs],
        positions=metal.POSITIONS,
        header=text.header,
        body="\n    ".join(["", *addresses, sizes, shape]) + text.body,
    )


class _Update:
    """An update rule as one launch.

    Args:
        ops: what launches it.
        form: of the kernel.
        rule: with what learns, and the call.
        state: the layer's parts of the state.
    """

    def __init__(self, ops: KernelOperations, form: str, rule: UpdateRule, state: Mapping[str, Value]):
        self.ops, self.form, self.learner, self.call, self.state = ops, form, rule.learner, rule.call, state
        self.inner, self.K, self.outside = rule.learner.inner, len(rule.learner.t), rule.numbers.outside
        self.start = {name: W.astype(np.float32) for name, W in rule.learner.start.items()}

    def __call__(self, tokens: Tokens) -> tuple[Value, dict[str, Value]]:
        """What the UpdateRule returns."""
        ops, seen = self.ops, self.call.seen
        _, H, T, D = ops.shape(tokens.q)
        kernel = metal.launch(self.inner.name, self.form, D, self.K, seen is not None)
        inputs, outputs = self._inputs(tokens), self._outputs(tokens, kernel.scratch)
        launch = Launch(
            kernel,
            (1, T, H, D),
            self.K,
            {name: inputs[name] for name in kernel.text.inputs},
            {name: outputs[name] for name in kernel.text.outputs},
        )
        found = dict(zip(launch.outputs, ops.launch(launch), strict=True))
        if seen is not None:
            loss, norm = (self._turned(ops.expand_dims(found[name], axis=3)) for name in ("loss", "write_norm"))
            seen.append(Signals(loss, self.call.where_counted(ops.cast(tokens.lr, np.float32)), norm))
        return self._turned(found["y"]), self._after(found)

    def _inputs(self, tokens: Tokens) -> dict[str, Value]:
        """Those of any form, by name."""
        ops, learner, (_, H, T, D) = self.ops, self.learner, self.ops.shape(tokens.q)
        inputs = {name: self._turned(getattr(tokens, name)) for name in "qkv"}
        inputs["lr"] = ops.reshape(self._turned(tokens.lr), [1, T, H])
        constants = {"t": learner.t, "gamma": learner.gamma[0, :, 0], "beta": learner.beta[0, :, 0]}
        inputs |= {name: x.astype(np.float32) for name, x in constants.items()}
        for name, W in self.start.items():
            delta = ops.reshape(ops.cast(self.state[name], np.float32), W.shape)
            inputs[name] = self._swapped(name, ops.add(W, delta))
        widths = self.inner.row_widths(D).items()
        rows = [ops.reshape(ops.cast(self.state[name], np.float32), [1, H, self.K, width]) for name, width in widths]
        return inputs | {"rows": ops.concat(rows, axis=3), "phase": self.call.phase, "length": self.call.length}

    def _outputs(self, tokens: Tokens, scratch: int) -> dict[str, tuple[tuple[int, ...], NumberType]]:
        """The shapes and number types of those of any form, by name."""
        _, H, T, D = self.ops.shape(tokens.q)
        weights = {f"{name}_out": (1, H, *shape) for name, shape in self.inner.weight_shapes(D).items()}
        rows = {"rows_out": (1, H, self.K, self.inner.row_width(D)), "scratch": (1, H, scratch)}
        shapes = weights | rows | dict.fromkeys(("loss", "write_norm"), (1, T, H))
        in_float32 = {name: (shape, np.float32) for name, shape in shapes.items()}
        return {"y": ((1, T, H, D), self.ops.number_type(tokens.q)), **in_float32}

    def _after(self, found: Mapping[str, Value]) -> dict[str, Value]:
        """The inner model's parts of the state. A step leaves the weights as they are."""
        ops, D = self.ops, self.ops.shape(found["y"])[3]
        after = {name: self.state[name] for name in self.start}
        for name, W in self.start.items():
            if f"{name}_out" in found:
                after[name] = self._kept(name, ops.sub(self._swapped(name, found[f"{name}_out"]), W))
        widths = self.inner.row_widths(D)
        rows = ops.split(found["rows_out"], list(widths.values()), axis=3)
        return after | {name: self._kept(name, x) for name, x in zip(widths, rows, strict=True)}

    def _kept(self, name: str, x: Value) -> Value:
        """A part of the state as the state has it."""
        return self.ops.cast(self.ops.reshape(x, self.ops.shape(self.state[name])), self.outside)

    def _swapped(self, name: str, x: Value) -> Value:
        """A weight as the state has it becomes one as the kernels have it, and back."""
        return self.ops.transpose(x, [0, 1, 3, 2]) if stored_transposed(self.inner, name) else x

    def _turned(self, x: Value) -> Value:
        """By head becomes by token, [1, H, T, d] -> [1, T, H, d], and back."""
        _, a, b, d = self.ops.shape(x)
        return self.ops.reshape(x, [1, b, a, d]) if 1 in (a, b) else self.ops.transpose(x, [0, 2, 1, 3])
