"""The update rule as our Metal kernels, the files in metal/, in a graph for Core AI. They run on a GPU only.

A kernel is part of the program as source text. Core AI writes the signature: every array is a tensor, whose indices run
from the last axis to the first. The kernels take addresses and sizes instead, and neither depends on that order.

Shapes: H heads, T tokens of a call, D head dimension, K mini-batch size, R row width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...backends.metal import rule as metal
from ...errors import TTTError
from ...network.args import ModelArgs
from ..calls import Signals
from ..layout import stored_transposed
from ..operations import NumberType, Operations, Value
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


class Launches(Protocol):
    """Operations that can launch kernels, too."""

    def launch(self, launch: Launch) -> list[Value]:
        """The outputs, in order."""


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
        return learn(self, self._form, rule, tokens, state)

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
    addresses = [
        f"{'const ' * (name in text.inputs)}device {METAL_TYPES[number]}* {name} = &{name}_tensor[{', '.join('0' * rank)}];"
        for name, (rank, number) in types.items()
    ]
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


def learn(
    ops: Operations | Any, form: str, rule: UpdateRule, tokens: Tokens, state: Mapping[str, Value]
) -> tuple[Value, dict[str, Value]]:
    """What an UpdateRule returns of its arguments, by a kernel.

    Args:
        ops: that launch kernels, too.
        form: of the kernel.
        rule: with what learns, and the call.
        tokens, state: its arguments.
    """
    learner, call, inner = rule.learner, rule.call, rule.learner.inner
    _, H, T, D = ops.shape(tokens.q)
    K, shown = len(learner.t), call.seen is not None
    kernel = metal.launch(inner.name, form, D, K, shown)
    start = {name: W.astype(np.float32) for name, W in learner.start.items()}

    def swapped(name: str, x: Value) -> Value:
        return ops.transpose(x, [0, 1, 3, 2]) if stored_transposed(inner, name) else x

    def turned(x: Value) -> Value:
        """By head to by token, [1, H, T, d] -> [1, T, H, d], and back."""
        a, b, c, d = ops.shape(x)
        return ops.reshape(x, [a, c, b, d]) if 1 in (b, c) else ops.transpose(x, [0, 2, 1, 3])

    inputs = {name: turned(getattr(tokens, name)) for name in "qkv"}
    inputs["lr"] = ops.reshape(turned(tokens.lr), [1, T, H])
    inputs |= {name: x.astype(np.float32) for name, x in (("t", learner.t), ("gamma", learner.gamma[0, :, 0]))}
    inputs["beta"] = learner.beta[0, :, 0].astype(np.float32)
    for name, W in start.items():
        inputs[name] = swapped(name, ops.add(W, ops.reshape(ops.cast(state[name], np.float32), W.shape)))
    widths = inner.row_widths(D)
    parts = [ops.reshape(ops.cast(state[name], np.float32), [1, H, K, width]) for name, width in widths.items()]
    inputs["rows"] = ops.concat(parts, axis=3)
    inputs |= {"phase": call.phase, "length": call.length}

    outputs: dict[str, tuple[tuple[int, ...], NumberType]] = {"y": ((1, T, H, D), ops.number_type(tokens.q))}
    outputs |= {f"{name}_out": ((1, H, *inner.weight_shapes(D)[name]), np.float32) for name in start}
    outputs["rows_out"] = (1, H, K, inner.row_width(D)), np.float32
    outputs["scratch"] = (1, H, kernel.scratch), np.float32
    outputs |= dict.fromkeys(("loss", "write_norm"), ((1, T, H), np.float32))
    text = kernel.text
    given = Launch(
        kernel,
        (1, T, H, D),
        K,
        {name: inputs[name] for name in text.inputs},
        {name: outputs[name] for name in text.outputs},
    )
    found = dict(zip(text.outputs, ops.launch(given), strict=True))

    def kept(name: str, x: Value) -> Value:
        return ops.cast(ops.reshape(x, ops.shape(state[name])), rule.numbers.outside)

    after = {name: state[name] for name in start}
    for name, W in start.items():
        if f"{name}_out" in found:  # a step leaves the weights as they are
            after[name] = kept(name, ops.sub(swapped(name, found[f"{name}_out"]), W))
    rows = ops.split(found["rows_out"], list(widths.values()), axis=3)
    after |= {name: kept(name, x) for name, x in zip(widths, rows, strict=True)}
    if call.seen is not None:
        loss, norm = (turned(ops.expand_dims(found[name], axis=3)) for name in ("loss", "write_norm"))
        call.seen.append(Signals(loss, call.where_counted(ops.cast(tokens.lr, np.float32)), norm))
    return turned(found["y"]), after
