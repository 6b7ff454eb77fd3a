"""A model's parameters as the exported network wants them.

They are dequantized, joined where one product does the work of several, and in the order of layout.halves_first: NumPy
arrays in float32. Each function gives those of one block, so that a large model is never held twice.
Shapes: C = H·D hidden size, H heads, D head dimension, I intermediate size, K mini-batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..network.args import ModelArgs
from ..network.inner import INNER_MODELS
from ..network.model import TTT, Block, CausalConv1d
from .layout import halves_first, stored


@dataclass(frozen=True)
class Joined:
    """Linear layers whose matrices lie one below the other, [N, C], so that one product does the work of several.

    Attributes:
        layer: what they are layers of.
        names: of each.
        rows: the order of the rows of each; None: as they are.
        columns: the same of the columns.
    """

    layer: Any
    names: Sequence[str]
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    @property
    def matrix(self) -> np.ndarray:
        return np.concatenate([self._turned(matrix(self.layer[name])) for name in self.names])

    def replace(self, x: np.ndarray) -> None:
        """Give the layers the numbers of another such matrix, in float32."""
        for name, part in zip(self.names, np.split(x, len(self.names)), strict=True):
            own = np.empty_like(part)
            self._turned(own, part)
            linear = nn.Linear(own.shape[1], own.shape[0], bias=False)
            linear.weight = mx.array(own)
            self.layer[name] = linear

    def _turned(self, x: np.ndarray, replaced_by: np.ndarray | None = None) -> np.ndarray:
        """x with its rows and columns in order; or x, whose rows and columns in order become this."""
        rows = np.arange(x.shape[0]) if self.rows is None else self.rows
        columns = np.arange(x.shape[1]) if self.columns is None else self.columns
        if replaced_by is not None:
            x[np.ix_(rows, columns)] = replaced_by
            return x
        return x[np.ix_(rows, columns)]


def joined(block: Block, args: ModelArgs) -> dict[str, Joined]:
    """The matrices of a block: gate_up [2I, C]; down [C, I]; projections [2C to 4C, C]; o [C, C].

    The projections are q, k, v and g one below the other, without k with share_qk, g only with use_gate.
    """
    layer = block.seq_modeling_block
    channels = _channels(args)
    names = [name for name in ("q_proj", "k_proj", "v_proj", "g_proj") if name in layer]
    return {
        "gate_up": Joined(block.mlp, ("gate_proj", "up_proj")),
        "down": Joined(block.mlp, ("down_proj",)),
        "projections": Joined(layer, names, rows=channels),
        "o": Joined(layer, ("o_proj",), columns=channels),
    }


def _channels(args: ModelArgs) -> np.ndarray:
    """The order of a layer's channels, in each head that of halves_first."""
    return (np.arange(args.num_attention_heads)[:, None] * args.head_dim + halves_first(args.head_dim)).ravel()


def block_weights(block: Block, args: ModelArgs) -> dict[str, np.ndarray]:
    """The constants of one block.

    Returns:
        The matrices of `joined`; seq_norm, ffn_norm [C]; what `_ttt` returns; and with pre_conv conv_norm [C],
        conv_taps [kernel, 1, H, 1, D] and conv_bias [1, H, 1, D].
    """
    weights = {
        "seq_norm": array(block.seq_norm.weight),
        "ffn_norm": array(block.ffn_norm.weight),
        **{name: part.matrix for name, part in joined(block, args).items()},
    }
    if args.pre_conv:
        weights["conv_norm"] = array(block.conv.norm.weight)
        weights["conv_taps"], weights["conv_bias"] = _taps(block.conv.conv, args, np.arange(args.head_dim))
    return weights | _ttt(block.seq_modeling_block, args)


def array(x: mx.array) -> np.ndarray:
    """x in float32."""
    return np.array(x.astype(mx.float32))


def matrix(module: nn.Module) -> np.ndarray:
    """The weight of a linear layer or embedding, quantized or not, [out, in]."""
    if "scales" not in module:
        return array(module.weight)
    quantized = module.weight, module.scales, module.get("biases")
    return array(mx.dequantize(*quantized, module.group_size, module.bits, mode=module.mode))


def _ttt(layer: TTT, args: ModelArgs) -> dict[str, np.ndarray]:
    """The constants of a TTT layer.

    Returns:
        With share_qk conv_qk_taps [kernel, 1, 2H, 1, D] and conv_qk_bias [1, 2H, 1, D], conv_q's heads before conv_k's;
        lr_weight [1, H, C], lr_bias [1, H, 1]; gamma, beta [1, H, 1, D]; t [K]; post_norm_weight, post_norm_bias [C];
        and the inner model's weights as layout.stored has them, [1, H, d1, d2] each.
    """
    order, channels = halves_first(args.head_dim), _channels(args)
    weights = {
        "lr_weight": array(layer.learnable_ttt_lr_weight)[:, 0][None],
        "lr_bias": array(layer.learnable_ttt_lr_bias)[None],
        "gamma": array(layer.ttt_norm_weight)[None, :, None, order],
        "beta": array(layer.ttt_norm_bias)[None, :, None, order],
        "t": array(layer.token_factors()),
        "post_norm_weight": array(layer.post_norm.weight)[channels],
        "post_norm_bias": array(layer.post_norm.bias)[channels],
    }
    if args.share_qk:
        convolutions = [_taps(layer[name], args, order) for name in ("conv_q", "conv_k")]
        weights["conv_qk_taps"], weights["conv_qk_bias"] = (
            np.concatenate(parts, axis=-3) for parts in zip(*convolutions, strict=True)
        )
    inner = INNER_MODELS[args.ttt_layer_type]
    return weights | {name: stored(inner, name, array(layer[name])[None]) for name in inner.weight_names}


def _taps(conv: CausalConv1d, args: ModelArgs, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A depthwise convolution by head, features in this order: taps [kernel, 1, H, 1, D] and bias [1, H, 1, D]."""
    H, D = args.num_attention_heads, args.head_dim
    taps = array(conv.weight)[..., 0].T.reshape(-1, 1, H, 1, D)
    bias = array(conv.bias).reshape(1, H, 1, D)
    return taps[..., order], bias[..., order]
