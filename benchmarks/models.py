"""What is compared: TTT models, and what mlx-lm offers instead, of the same width and the same number of parameters.

Every model is a configuration in the words of its mlx-lm model file. TTT models are those of the released sizes with
the Mamba backbone; the others keep their hidden size and change what their own literature leaves open, so that the
parameters come out the same: the Transformer and Gated DeltaNet (same depth) the width of the feed-forward network,
Mamba and Mamba2 (no feed-forward network) the number of layers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import mlx_ttt  # noqa: F401  before MLX: OpenBLAS, and the architecture "ttt" for mlx-lm

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

OURS = {"TTT-Linear": "linear", "TTT-MLP": "mlp"}
OTHERS = ("Transformer", "Mamba2", "Gated DeltaNet", "Mamba")
PREFILL_CHUNK = 2048  # tokens that mlx-lm reads in one call


@dataclass(frozen=True)
class Size:
    """The measures of a TTT model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 32000


SIZES = {
    "tiny": Size(64, 160, 2, 4, 512),  # not released: to try the benchmarks themselves
    "125M": Size(768, 2048, 12, 12),
    "350M": Size(1024, 2736, 24, 16),
    "760M": Size(1536, 4096, 24, 16),
    "1.3B": Size(2048, 5504, 24, 32),
}


def configuration(name: str, size: Size) -> dict:
    """The configuration of a model by its name in the tables."""
    if name in OURS:
        return _ttt(OURS[name], size)
    if name == "Transformer":
        return _transformer(size)
    if name == "Gated DeltaNet":
        return _gated_deltanet(size)
    return _with_parameters_of(_ttt("linear", size), {"Mamba2": _mamba2, "Mamba": _mamba}[name](size))


def _common(size: Size) -> dict:
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    }


def _ttt(kind: str, size: Size) -> dict:
    """Mamba backbone, as all released models."""
    return _common(size) | {
        "model_type": "ttt",
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "ttt_layer_type": kind,
        "ttt_base_lr": {"linear": 1.0, "mlp": 0.1}[kind],
        "mini_batch_size": 16,
        "pre_conv": True,
        "share_qk": True,
        "use_gate": True,
        "conv_kernel": 4,
    }


def _transformer(size: Size) -> dict:
    """Llama with four queries to a key, as in Llama 3.2; what the keys save, the feed-forward network gets."""
    return _common(size) | {
        "model_type": "llama",
        "intermediate_size": size.intermediate + size.hidden // 2,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 4,
    }


def _gated_deltanet(size: Size) -> dict:
    """OLMo Hybrid without its attention layers: keys of 3/4, values of 3/2 of the hidden size, heads of 96 and 192."""
    heads = max(1, size.hidden // 128)
    key = 3 * size.hidden // 4 // heads
    return _common(size) | {
        "model_type": "olmo_hybrid",
        "intermediate_size": (size.intermediate - 2 * size.hidden // 3) // 16 * 16,
        "layer_types": ["linear_attention"] * size.layers,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": key,
        "linear_value_head_dim": 2 * key,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 32768,
        "attention_bias": False,
    }


def _mamba2(size: Size) -> dict:
    return _common(size) | {
        "model_type": "mamba2",
        "intermediate_size": 2 * size.hidden,
        "num_heads": 2 * size.hidden // 64,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": [0.001, 100.0],
        "time_step_rank": "auto",
    }


def _mamba(size: Size) -> dict:
    return _common(size) | {
        "model_type": "mamba",
        "intermediate_size": 2 * size.hidden,
        "state_size": 16,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": "auto",
    }


def _with_parameters_of(other: dict, config: dict) -> dict:
    """The configuration with as many layers as bring its parameters nearest to those of another."""
    one, two = (parameters(config | {"num_hidden_layers": n}) for n in (1, 2))
    return config | {"num_hidden_layers": max(1, 1 + round((parameters(other) - one) / (two - one)))}


def build(config: dict, dtype: str = "float32") -> nn.Module:
    """The model with random weights, not evaluated: until it is, it takes no memory."""
    room = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = room.Model(room.ModelArgs.from_dict(config))
    follows = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, w: mx.array) -> mx.array:
        return w.astype(getattr(mx, dtype)) if follows(path) and mx.issubdtype(w.dtype, mx.floating) else w

    model.update(tree_map_with_path(cast, model.parameters()))
    model.eval()
    return model


def parameters(config: dict) -> int:
    return sum(w.size for _, w in tree_flatten(build(config).parameters()))


def weight_bytes(config: dict, dtype: str) -> int:
    return sum(w.nbytes for _, w in tree_flatten(build(config, dtype).parameters()))


def prefill_flops(config: dict, tokens: int) -> int:
    """Floating-point operations that reading a prompt takes at least, with the logits of its last position only."""
    embedding = config["vocab_size"] * config["hidden_size"]
    in_matrices = 2 * (parameters(config) - embedding)
    return tokens * (in_matrices + config["num_hidden_layers"] * _mixer_flops(config, tokens)) + 2 * embedding


def _mixer_flops(config: dict, tokens: int) -> int:
    """Of one layer's mixer of tokens without its projections, per token: on average over a prompt."""
    kind = config["model_type"]
    if kind == "ttt":
        H, K = config["num_attention_heads"], config["mini_batch_size"]
        D = config["hidden_size"] // H
        # Products with inner weights, less one, which their initial values are counted for; and inside a mini-batch.
        return H * (4 * D * D + 4 * K * D if config["ttt_layer_type"] == "linear" else 40 * D * D + 20 * K * D)
    if kind == "llama":
        return 2 * tokens * config["hidden_size"]  # half of the tokens are before one, on average
    if kind == "olmo_hybrid":  # decay, prediction, update and output, of a key x value state
        return 7 * config["linear_num_value_heads"] * config["linear_key_head_dim"] * config["linear_value_head_dim"]
    return 5 * config["intermediate_size"] * config["state_size"]  # decay, update and output


def memory_estimate(config: dict, dtype: str, tokens: int) -> int:
    """Bytes that a process needs, at most, to read `tokens` tokens: the interpreter, weights, state, intermediates."""
    size = getattr(mx, dtype).size
    chunk = min(tokens, PREFILL_CHUNK)
    needed = 500_000_000 + weight_bytes(config, dtype) + 200 * chunk * config["hidden_size"] * size
    if config["model_type"] == "llama":
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        keys = config["num_key_value_heads"] * head_dim * config["num_hidden_layers"]
        needed += 4 * tokens * keys * size  # keys and values, and a copy while they grow
        if mx.default_device() == mx.cpu:  # all scores of a layer at once
            needed += 3 * config["num_attention_heads"] * chunk * tokens * size
    return needed
