"""The config of a checkpoint that has none: inferred from its tensors, or assumed where they do not tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..network.inner import INNER_MODELS
from .parameters import EMBEDDING, HEAD
from .tensor import Tensor

_LAYER = re.compile(r"model\.layers\.([0-9]+)\.")


def inferred_config(tensors: Mapping[str, Tensor], where: str) -> dict:
    """The config fields that follow from tensors in official names.

    Whether all tensors fit that config is not checked here: `Parameters` does it.

    Args:
        where: the checkpoint, for error messages.

    Raises:
        CheckpointError: a tensor that is needed is missing or has the wrong number of axes.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{where}: {name} is missing, which tells the size of the model")
        if len(tensors[name].shape) != axes:
            raise CheckpointError(f"{where}: {name} has shape {tensors[name].shape}, expected {axes} axes")
        return tensors[name].shape

    layer = "model.layers.0."
    block = f"{layer}seq_modeling_block."
    vocab_size, hidden_size = shape(EMBEDDING, 2)
    config = {
        "model_type": "ttt",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shape(f"{layer}mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": 1 + max(int(match[1]) for match in map(_LAYER.match, tensors) if match),
        "num_attention_heads": shape(f"{block}W1", 3)[0],
        "mini_batch_size": shape(f"{block}learnable_token_idx", 1)[0],
        "ttt_layer_type": _inner_model(block, tensors),
        "pre_conv": f"{layer}conv.conv.weight" in tensors,
        "share_qk": f"{block}conv_q.weight" in tensors,
        "use_gate": f"{block}g_proj.weight" in tensors,
        "tie_word_embeddings": HEAD not in tensors,
    }
    for convolution in (f"{layer}conv.conv.weight", f"{block}conv_q.weight"):
        if convolution in tensors:
            config["conv_kernel"] = shape(convolution, 3)[2]
    return config


def assumed_config(config: Mapping[str, Any]) -> dict[str, float]:
    """The fields that no tensor tells, with the values of the released models."""
    return {"ttt_base_lr": INNER_MODELS[config["ttt_layer_type"]].base_lr, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}


def _inner_model(block: str, tensors: Mapping[str, Tensor]) -> str:
    """The name of the largest inner model whose weights are all there."""
    found = [m for m in INNER_MODELS.values() if all(f"{block}{name}" in tensors for name in m.weight_names)]
    return max(found, key=lambda m: m.num_maps, default=INNER_MODELS["linear"]).name
