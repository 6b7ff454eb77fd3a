"""The exported network's block: convolution, TTT layer and SwiGLU, the same for `decode` and `prefill`.

Where those two differ, the block asks a `Call`. Shapes: T tokens of a call, H heads, D head dimension, C = H·D. An
array [1, T, C] is flat, an array [1, H, T, D] by head; a head's features stand in the order of layout.halves_first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..network.args import ModelArgs
from ..network.inner import INNER_MODELS
from .calls import Call
from .elementwise import layer_norm, rms_norm
from .numbers import Numbers
from .operations import Value
from .rule import Learner, Tokens, UpdateRule


class Block:
    """One block of the network as one call runs it.

    Args:
        numbers: operations and number types.
        args: the model's configuration.
        weights: of this block, from weights.block_weights.
        call: which tokens count, and where they stand.
        layer: the index of the block.
    """

    def __init__(self, numbers: Numbers, args: ModelArgs, weights: Mapping[str, np.ndarray], call: Call, layer: int):
        self.numbers, self.ops, self.args = numbers, numbers.ops, args
        self.weights, self.call, self.layer = weights, call, layer

    def __call__(self, x: Value, state: dict[str, Value]) -> tuple[Value, dict[str, Value]]:
        """x [1, T, C] and the layer's parts of the state, both after this block."""
        ops = self.ops
        if self.args.pre_conv:
            y = self.call.by_head(self._rms_norm(x, "conv_norm"), self.args.head_dim)
            y, state = self._convolution(y, "conv", state)
            x = ops.add(x, self.call.flat(y))
        y, state = self._ttt(self._rms_norm(x, "seq_norm"), state)
        x = ops.add(x, y)
        return ops.add(x, self._swiglu(self._rms_norm(x, "ffn_norm"))), state

    def _linear(self, x: Value, name: str) -> Value:
        return self.ops.linear(x, self.numbers.const(self.weights[name]))

    def _rms_norm(self, x: Value, name: str) -> Value:
        return rms_norm(self.ops, x, self.numbers.const(self.weights[name]), self.args.rms_norm_eps)

    def _swiglu(self, x: Value) -> Value:
        gate, up = self.ops.split(self._linear(x, "gate_up"), [self.args.intermediate_size] * 2, axis=-1)
        return self._linear(self.ops.mul(self.ops.silu(gate), up), "down")

    def _convolution(self, x: Value, name: str, state: dict[str, Value]) -> tuple[Value, dict[str, Value]]:
        """Causal and depthwise, [1, H, T, D] -> [1, h, T, D]; and the state, in which this part remembers its inputs.

        Several convolutions of the same input are one with h a multiple of H: their heads stand one behind the other.
        """
        ops, taps, T = self.ops, self.weights[f"{name}_taps"], self.call.tokens
        if name in state:  # not if the kernel is one token wide
            x = ops.concat([ops.cast(state[name], self.numbers.network), x], axis=2)  # [1, H, kernel - 1 + T, D]
            state = state | {name: self.call.history(x)}
        kernel, _, heads, _, D = taps.shape
        x = ops.concat([x] * (heads // ops.shape(x)[1]), axis=1)
        shifted = [ops.slice(x, begin=[0, 0, i, 0], size=[1, heads, T, D]) for i in range(kernel)]
        products = [ops.mul(y, self.numbers.const(tap)) for y, tap in zip(shifted, taps, strict=True)]
        return ops.add(ops.total(products), self.numbers.const(self.weights[f"{name}_bias"])), state

    def _ttt(self, x: Value, state: dict[str, Value]) -> tuple[Value, dict[str, Value]]:
        """The TTT layer: x [1, T, C] and the layer's parts of the state, both after it."""
        ops, numbers, args = self.ops, self.numbers, self.args
        C, H, views = args.hidden_size, args.num_attention_heads, 2 if args.share_qk else 3
        projected = ops.split(self._linear(x, "projections"), [views * C] + [C] * args.use_gate, axis=-1)
        by_head = self.call.by_head(projected[0], args.head_dim)  # [1, 2H or 3H, T, D]
        qk, v = ops.split(by_head, [(views - 1) * H, H], axis=1)
        if args.share_qk:
            qk, state = self._convolution(qk, "conv_qk", state)
        q, k = ops.split(self._rotate(ops.cast(qk, numbers.inner)), [H, H], axis=1)
        tokens = Tokens(q, k, ops.cast(v, numbers.inner), self._learning_rates(x))
        y, learned = ops.learn(UpdateRule(numbers, self._learner(), self.call, self.layer), tokens, state)

        y = self.call.flat(ops.cast(y, numbers.network))
        y = layer_norm(
            ops, y, numbers.const(self.weights["post_norm_weight"]), numbers.const(self.weights["post_norm_bias"])
        )
        if args.use_gate:
            y = ops.mul(ops.gelu(projected[1]), y)
        return self._linear(y, "o"), state | learned

    def _learner(self) -> Learner:
        const, weights, inner = self.numbers.inner_const, self.weights, INNER_MODELS[self.args.ttt_layer_type]
        start = {name: const(weights[name]) for name in inner.weight_names}
        return Learner(inner, start, const(weights["gamma"]), const(weights["beta"]), const(weights["t"]))

    def _rotate(self, x: Value) -> Value:
        """RoPE, [1, H, T, D]; see calls.rope."""
        ops = self.ops
        first, second = ops.split(x, [self.args.head_dim // 2] * 2, axis=-1)
        swapped = ops.concat([second, first], axis=-1)
        return ops.add(ops.mul(x, self.call.cos), ops.mul(swapped, self.call.sin))

    def _learning_rates(self, x: Value) -> Value:
        """ttt_base_lr / D · sigmoid(x · w + b), times the learning scale: x [1, T, C] -> [1, H, T, 1]."""
        ops, numbers = self.ops, self.numbers
        weight, bias = (numbers.inner_const(self.weights[name]) for name in ("lr_weight", "lr_bias"))
        gate = ops.matmul(weight, ops.cast(x, numbers.inner), transpose_y=True)  # [1, H, T]
        rate = numbers.inner_const(self.args.ttt_base_lr / self.args.head_dim)
        lr = ops.mul(ops.expand_dims(ops.sigmoid(ops.add(gate, bias)), axis=3), rate)
        return lr if self.call.scales is None else ops.mul(lr, self.call.scales[self.layer])
