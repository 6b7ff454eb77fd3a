"""Many tokens of each sequence through a block, in as many launches whatever their number.

The formulas are those of network/model.py. What lies between products and kernels is fused by MLX into one launch
each. No trace holds more than a few operations, so that another number of tokens costs next to nothing. In training
the network stays as it is: MLX takes its gradients.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ...network.cache import LayerState
from ...network.model import TTT, Block, through_block
from ...network.operations import layer_norm, sigmoid, swiglu
from ...network.rule import Learner, Tokens
from . import rule
from .block import supports
from .layer import Part, add_norm, gated_norm, turned


@through_block.register
def block_of_tokens(block: Block, x: mx.array, state: LayerState, scale: mx.array | None = None) -> mx.array:
    (B, T, C), dtype = x.shape, x.dtype
    if T == 1 or block.training or not rule.available() or not supports(block, dtype):
        return NotImplemented
    if "conv" in block:
        conv = block.conv.conv
        n = conv.weight.shape[1]
        inputs = state.with_history("conv", block.conv.norm(x), n - 1)
        shifted = [inputs[:, i : i + T] for i in range(n)]
        taps = [conv.weight[:, i : i + 1].reshape(C) for i in range(n)]
        x = _plus_convolution(x, shifted, taps, conv.bias)
    y = _through_ttt(block.seq_modeling_block, block.seq_norm(x), state, scale)
    rows, normed = add_norm(_rows(x), _rows(y), block.ffn_norm)
    x, y = (z.reshape(B, T, C) for z in (rows, normed))
    gate, up = (projection(y).astype(dtype) for projection in (block.mlp.gate_proj, block.mlp.up_proj))
    return x + block.mlp.down_proj(_swiglu(gate, up)).astype(dtype)


def _through_ttt(layer: TTT, x: mx.array, state: LayerState, scale: mx.array | None) -> mx.array:
    C, dtype, K, phase = x.shape[2], x.dtype, layer.mini_batch_size, state.phase
    assert not isinstance(phase, mx.array), "only those of decoded tokens are on the device"
    if "k_proj" in layer:
        q, k = turned(layer, layer.q_proj(x).astype(dtype), layer.k_proj(x).astype(dtype), phase)
    else:
        shared = state.with_history("conv_qk", layer.q_proj(x).astype(dtype), layer.kernel_size - 1)
        q, k = turned(layer, shared, None, phase)
    v = layer.v_proj(x).astype(dtype).reshape(q.shape)
    gate = x.astype(mx.float32) @ layer.learnable_ttt_lr_weight[:, 0].T
    scales = [] if scale is None else [scale]
    lr = _rates(gate, layer.learnable_ttt_lr_bias[:, 0], mx.array(layer.base_lr), *scales)
    t = _token_factors(mx.array(1 / np.arange(1, K + 1, dtype=np.float32)), layer.learnable_token_idx)
    gamma, beta = (w.astype(mx.float32) for w in (layer.ttt_norm_weight, layer.ttt_norm_bias))
    y = state.update(Tokens(q, k, v, lr), Learner(layer.inner_model, t, gamma, beta)).reshape(x.shape)
    norm = layer.post_norm
    if "g_proj" in layer:
        y = gated_norm(_rows(y), Part(_rows(layer.g_proj(x).astype(dtype)), 0, C), norm).reshape(x.shape)
    else:
        y = layer_norm(y, norm.weight, norm.bias, norm.eps)
    return layer.o_proj(y).astype(dtype)


def _rows(x: mx.array) -> mx.array:
    """[B, T, C] as B T sequences of one token."""
    return x.reshape(-1, 1, x.shape[-1])


@mx.compile
def _plus_convolution(x: mx.array, shifted: list[mx.array], taps: list[mx.array], bias: mx.array) -> mx.array:
    return x + sum((part * tap for part, tap in zip(shifted, taps, strict=True)), bias)


@mx.compile
def _rates(gate: mx.array, bias: mx.array, base_lr: mx.array, *scale: mx.array) -> mx.array:
    lr = base_lr * sigmoid.in_mlx(gate + bias)
    return scale[0] * lr if scale else lr


@mx.compile
def _token_factors(usual: mx.array, learned: mx.array) -> mx.array:
    return mx.maximum(usual + learned, 0)


_swiglu = mx.compile(swiglu.in_mlx)
