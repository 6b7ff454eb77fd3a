"""One token of each sequence through a block, in a dozen launches.

The formulas are those of network/model.py. Here they are cut where a GPU has to launch something: at the products, at
the update rule and at the kernels of layer.py between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...network.cache import LayerState
from ...network.model import (
    TTT,
    Block,
    CausalConv1d,
    Conv,
    LayerNorm,
    RMSNorm,
    RoPE,
    SwiGLU,
    through_block,
)
from ...network.operations import layer_norm, rms_norm, swiglu
from ...network.rule import Learner, Signals, State, Tokens
from . import rule
from .layer import LARGEST_CHANNELS, LARGEST_CONVOLUTION, add_norm, conv_norm, gated_norm, views
from .side_by_side import Arrays, products

_LAYERS = (Block, TTT, SwiGLU, Conv, CausalConv1d, RMSNorm, LayerNorm, RoPE)
_CALLS = [kind.__call__ for kind in _LAYERS]  # somebody may patch them later, to see activations, say


class TokenState(LayerState):
    """A layer's state while one token of each sequence goes through its block, whose phases only the device knows.

    Attributes:
        integers: the phases with zeros behind, as kernels take them.
        completes: whether some sequence may complete its mini-batch. Then new weights are written for all.
        joined: what of the block's projections lies side by side: of the TTT layer, and of SwiGLU.
    """

    def __init__(self, integers: mx.array, B: int, arrays: dict[str, Any], completes: bool, joined: Sequence[Arrays]):
        super().__init__(integers[:B], arrays)
        self.integers, self.completes, self.joined = integers, completes, joined

    def _update(self, tokens: Tokens, learner: Learner) -> tuple[mx.array, Signals | None]:
        before = State(self.arrays["weights"], self.arrays["rows"], self.phase)
        token = rule.Token(self.integers, self.completes, shown=self.seen is not None)
        y, after, signals = rule.read_token(tokens, learner, before, token)
        self.arrays = {**self.arrays, "weights": after.weights, "rows": after.rows}
        return y, signals


@through_block.register
def block_of_one_token(block: Block, x: mx.array, state: LayerState, scale: mx.array | None = None) -> mx.array:
    """Only in a decode step, whose states are of a class of their own."""
    if not isinstance(state, TokenState) or not supports(block, x.dtype):
        return NotImplemented
    if "conv" in block:
        x, y, history = conv_norm(x, state.arrays["history"]["conv"], block.conv, block.seq_norm)
        state.arrays = {**state.arrays, "history": {**state.arrays["history"], "conv": history}}
    else:
        y = rms_norm(x, block.seq_norm.weight, block.seq_norm.eps)
    x, y = add_norm(x, _through_ttt(block, y, state, scale), block.ffn_norm)
    gate, up = (part.alone() for part in products(y, block, 1, state.joined[1]).values())
    return x + block.mlp.down_proj(swiglu(gate, up)).astype(x.dtype)


def _through_ttt(block: Block, x: mx.array, state: TokenState, scale: mx.array | None) -> mx.array:
    layer = block.seq_modeling_block
    parts = products(x, block, 0, state.joined[0])
    q, v, history = parts["q_proj"], parts["v_proj"], state.arrays["history"].get("conv_qk")
    tokens, t, history = views(layer, x, (q, parts.get("k_proj", q), v), history, state.integers)
    if scale is not None:
        tokens = replace(tokens, lr=scale * tokens.lr)
    gamma, beta = (w.astype(mx.float32) for w in (layer.ttt_norm_weight, layer.ttt_norm_bias))
    y = state.update(tokens, Learner(layer.inner_model, t, gamma, beta)).reshape(x.shape)
    if history is not None:
        state.arrays = {**state.arrays, "history": {**state.arrays["history"], "conv_qk": history}}
    if "g_proj" in parts:
        y = gated_norm(y, parts["g_proj"], layer.post_norm)
    else:
        y = layer_norm(y, layer.post_norm.weight, layer.post_norm.bias, layer.post_norm.eps)
    return layer.o_proj(y).astype(x.dtype)


def supports(block: nn.Module, dtype: mx.Dtype) -> bool:
    """Whether a block is as network/model.py has it, with adapters or not, and there are kernels for it."""
    if [kind.__call__ for kind in _LAYERS] != _CALLS or type(block) is not Block:
        return False
    layer, norms, convolutions = block.seq_modeling_block, [block.seq_norm, block.ffn_norm], []
    kinds: list[tuple[nn.Module, type]] = [(layer, TTT), (block.mlp, SwiGLU)]
    if "conv" in block:
        kinds.append((block.conv, Conv))
        norms.append(block.conv.norm)
        convolutions.append(block.conv.conv)
    if "conv_q" in layer:
        convolutions += [layer.conv_q, layer.conv_k]
    kinds += [(norm, RMSNorm) for norm in norms] + [(conv, CausalConv1d) for conv in convolutions]
    kinds += [(layer.post_norm, LayerNorm), (layer.rope, RoPE)]
    if any(type(module) is not kind for module, kind in kinds):
        return False
    C, D = layer.num_heads * layer.head_dim, layer.head_dim
    learned = (layer.learnable_ttt_lr_weight, layer.learnable_ttt_lr_bias, layer.learnable_token_idx)
    others = [p for module in (*norms, *convolutions, layer.post_norm) for p in module.parameters().values()]
    return (
        layer.inner_model in rule.WITH_KERNELS
        and D in rule.HEAD_DIMENSIONS
        and layer.mini_batch_size <= rule.LARGEST_MINI_BATCH
        and dtype in rule.DTYPES
        and C <= LARGEST_CHANNELS
        and all(2 <= conv.weight.shape[1] <= LARGEST_CONVOLUTION for conv in convolutions)
        and "bias" in layer.post_norm
        and all(x.dtype == mx.float32 for x in learned)
        and all(x.dtype == dtype for x in others)
    )
