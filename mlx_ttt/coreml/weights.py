"""A model's parameters as the graph wants them: dequantized, fused where one product does, in `halves_first` order.

All float32 numpy arrays of one block at a time, so that a large model is never held twice.
Shapes: C = H·D hidden size, H heads, D head dimension, I intermediate size, K mini-batch size.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..layers import TTT, CausalConv1d
from ..model import Block, Model, ModelArgs
from .state import halves_first


def block_weights(block: Block, args: ModelArgs) -> dict[str, np.ndarray]:
    """What one block of the graph multiplies with.

    Returns:
        seq_norm, ffn_norm [C]; gate_up [2I, C]; down [C, I]; what `_ttt` returns; and with pre_conv conv_norm [C],
        conv_taps [kernel, 1, H, 1, D] and conv_bias [1, H, 1, D].
    """
    weights = {
        "seq_norm": array(block.seq_norm.weight),
        "ffn_norm": array(block.ffn_norm.weight),
        "gate_up": np.concatenate([matrix(block.mlp.gate_proj), matrix(block.mlp.up_proj)]),
        "down": matrix(block.mlp.down_proj),
    }
    if args.pre_conv:
        weights["conv_norm"] = array(block.conv.norm.weight)
        weights["conv_taps"], weights["conv_bias"] = _taps(block.conv.conv, args, np.arange(args.head_dim))
    return weights | _ttt(block.seq_modeling_block, args)


def embedding(model: Model) -> np.ndarray:
    """[V, C]"""
    return matrix(model.model.embed_tokens)


def head(model: Model) -> np.ndarray:
    """An untied lm_head, [V, C]."""
    return matrix(model.lm_head)


def array(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def matrix(module: nn.Module) -> np.ndarray:
    """The weight of a linear layer or embedding, quantized or not, [out, in]."""
    weight = module.weight
    if "scales" in module:
        weight = mx.dequantize(
            weight, module.scales, module.get("biases"), module.group_size, module.bits, mode=module.mode
        )
    return array(weight)


def _ttt(layer: TTT, args: ModelArgs) -> dict[str, np.ndarray]:
    """Of the TTT layer.

    Returns:
        projections [3C or 4C, C]: q, k, v and with use_gate g, one below the other (with share_qk without k);
        with share_qk qk_taps [kernel, 1, 2H, 1, D] and qk_bias [1, 2H, 1, D], conv_q's heads before conv_k's;
        lr_weight [1, H, C], lr_bias [1, H, 1]; gamma, beta [1, H, 1, D]; t [K]; post_norm_weight, post_norm_bias [C];
        o [C, C]; the inner model's W1 [1, H, D, D], b1 [1, H, 1, D], or for TTT-MLP W1 transposed [1, H, 4D, D],
        b1 [1, H, 1, 4D], W2 [1, H, 4D, D] and b2 [1, H, 1, D].
    """
    H, D = args.num_attention_heads, args.head_dim
    order = halves_first(D)
    channels = (np.arange(H)[:, None] * D + order).ravel()
    names = [name for name in ("q_proj", "k_proj", "v_proj", "g_proj") if name in layer]
    weights = {
        "projections": np.concatenate([matrix(layer[name])[channels] for name in names]),
        "lr_weight": array(layer.learnable_ttt_lr_weight)[:, 0][None],
        "lr_bias": array(layer.learnable_ttt_lr_bias)[None],
        "gamma": array(layer.ttt_norm_weight)[None, :, None, order],
        "beta": array(layer.ttt_norm_bias)[None, :, None, order],
        "t": array(layer.token_factors()),
        "post_norm_weight": array(layer.post_norm.weight)[channels],
        "post_norm_bias": array(layer.post_norm.bias)[channels],
        "o": matrix(layer.o_proj)[:, channels],
    }
    if args.share_qk:
        convolutions = [_taps(layer[name], args, order) for name in ("conv_q", "conv_k")]
        weights["qk_taps"], weights["qk_bias"] = (
            np.concatenate(parts, axis=-3) for parts in zip(*convolutions, strict=True)
        )
    W1, b1 = array(layer.W1)[None, :, order], array(layer.b1)[None]
    if args.ttt_layer_type == "linear":
        return weights | {"W1": W1[..., order], "b1": b1[..., order]}
    return weights | {
        "W1": W1.swapaxes(2, 3),
        "b1": b1,
        "W2": array(layer.W2)[None, ..., order],
        "b2": array(layer.b2)[None, ..., order],
    }


def _taps(conv: CausalConv1d, args: ModelArgs, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A depthwise convolution by head: its taps [kernel, 1, H, 1, D] and its bias [1, H, 1, D]."""
    H, D = args.num_attention_heads, args.head_dim
    taps = array(conv.weight)[..., 0].T.reshape(-1, 1, H, 1, D)
    bias = array(conv.bias).reshape(1, H, 1, D)
    return taps[..., order], bias[..., order]
