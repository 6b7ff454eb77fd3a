"""The official JAX implementation's parameter names, and the official PyTorch names that they correspond to."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..network.inner import INNER_MODELS

_LAYER = re.compile(r"model/h/(0|[1-9][0-9]{0,5})/")

# The tables give for each JAX name the PyTorch name and the JAX axes in PyTorch's order; None if the order is the same.
_Parameter = tuple[str, tuple[int, ...] | None]
_TRANSPOSED = (1, 0)  # JAX has a projection's kernel as [in, out]
_CONVOLUTION = (2, 1, 0)  # JAX has a convolution's kernel as [kernel, 1, C]
_WEIGHT = {"W": "dense", "b": "bias"}  # JAX counts an inner model's maps from 0
_INNER_WEIGHTS = max((inner.weight_names for inner in INNER_MODELS.values()), key=len)
_MODEL: Mapping[str, _Parameter] = {
    "model/wte/embedding": ("model.embed_tokens.weight", None),
    "model/ln_f/kernel": ("model.norm.weight", None),
    "lm_head/kernel": ("lm_head.weight", _TRANSPOSED),
}
_IN_LAYER: Mapping[str, _Parameter] = (
    {
        "seq_norm/kernel": ("seq_norm.weight", None),
        "ffn_norm/kernel": ("ffn_norm.weight", None),
        "feed_forward/w1/kernel": ("mlp.gate_proj.weight", _TRANSPOSED),
        "feed_forward/w2/kernel": ("mlp.down_proj.weight", _TRANSPOSED),
        "feed_forward/w3/kernel": ("mlp.up_proj.weight", _TRANSPOSED),
        "conv/conv_norm/kernel": ("conv.norm.weight", None),
        "conv/conv1/kernel": ("conv.conv.weight", _CONVOLUTION),
        "conv/conv1/bias": ("conv.conv.bias", None),
    }
    | {
        f"seq_modeling_block/{name}": (f"seq_modeling_block.{official}", axes)
        for name, official, axes in (
            ("wq/kernel", "q_proj.weight", _TRANSPOSED),
            ("wk/kernel", "k_proj.weight", _TRANSPOSED),
            ("wv/kernel", "v_proj.weight", _TRANSPOSED),
            ("wo/kernel", "o_proj.weight", _TRANSPOSED),
            ("wg/kernel", "g_proj.weight", _TRANSPOSED),
            ("conv_q/kernel", "conv_q.weight", _CONVOLUTION),
            ("conv_q/bias", "conv_q.bias", None),
            ("conv_k/kernel", "conv_k.weight", _CONVOLUTION),
            ("conv_k/bias", "conv_k.bias", None),
            ("learnable_ttt_lr/kernel", "learnable_ttt_lr_weight", (0, 2, 1)),  # JAX: [H, C, 1]
            ("learnable_ttt_lr/bias", "learnable_ttt_lr_bias", None),
            ("learnable_token_idx", "learnable_token_idx", None),
            ("ttt_norm/scale", "ttt_norm_weight", None),
            ("ttt_norm/bias", "ttt_norm_bias", None),
            ("post_norm/scale", "post_norm.weight", None),
            ("post_norm/bias", "post_norm.bias", None),
            *((f"ttt_{_WEIGHT[name[0]]}_{int(name[1:]) - 1}", name, None) for name in _INNER_WEIGHTS),
        )
    }
)


def official_parameter(path: str) -> _Parameter | None:
    """The PyTorch name of the parameter at a JAX path such as `model/h/0/feed_forward/w1/kernel`, and its axes.

    Returns:
        The name, and the JAX axes in PyTorch's order (None if the order is the same). None if a TTT model has no
        parameter at this path.
    """
    layer = _LAYER.match(path)
    if layer is None:
        return _MODEL.get(path)
    if (parameter := _IN_LAYER.get(path[layer.end() :])) is None:
        return None
    name, axes = parameter
    return f"model.layers.{layer[1]}.{name}", axes
