"""config.json: other people's, checked; ours, written."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

from ..errors import CheckpointError
from ..model import ModelArgs
from .directory import CONFIG
from .untrusted import quoted, read_json

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Far above every model there is: a config that asks for more is a mistake, and must not cost memory to find out.
_LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 14,
    "num_attention_heads": 1 << 12,
    "head_dim": 1 << 10,
    "mini_batch_size": 1 << 10,
    "conv_kernel": 1 << 10,
    "rms_norm_eps": 1.0,
    "rope_theta": 1e12,
    "ttt_base_lr": 1e6,
}
# Fields that say nothing about the network but that other tools read.
_CARRIED = ("architectures", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def find_config(folder: Path, config: Path | None) -> Path:
    """The config file to use: the one given, else config.json beside the weights.

    Raises:
        CheckpointError: there is none.
    """
    path = config or folder / CONFIG
    if not os.path.isfile(path):
        hint = "" if config else "; give one with --config FILE"
        raise CheckpointError(f"{path}: no such file{hint}")
    return path


def read_config(path: Path) -> tuple[dict, ModelArgs]:
    """A config file as it is, and as the model's arguments.

    Raises:
        CheckpointError: it cannot be read, is of another architecture, or has missing, ill-typed or absurd fields.
    """
    config = read_json(path)
    _refuse_other_architectures(config, path)
    missing = [name for name in _SIZES if name not in config]
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}")
    try:
        args = ModelArgs.from_dict(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {quoted(error)}") from None
    for name, largest in _LARGEST.items():
        if getattr(args, name) > largest:
            raise CheckpointError(f"{path}: {name} is {quoted(getattr(args, name))}, more than any model has")
    return config, args


def refuse_quantized(config: dict, path: Path) -> None:
    """Converting needs the original weights.

    Raises:
        CheckpointError: the config says that they are quantized.
    """
    if config.get("quantization") or config.get("quantization_config"):
        raise CheckpointError(f"{path}: the weights are quantized; convert the original checkpoint instead")


def _refuse_other_architectures(config: dict, path: Path) -> None:
    architectures = config.get("architectures") or ["TTT"]
    kinds = [config.get("model_type", "ttt"), *(architectures if isinstance(architectures, list) else [architectures])]
    others = [kind for kind in kinds if not (isinstance(kind, str) and kind.lower().startswith("ttt"))]
    if others:
        raise CheckpointError(f"{path}: describes a model of type {quoted(others[0])}, not a TTT language model")


def written_config(config: dict, args: ModelArgs, dtype: str) -> dict:
    """The config of a model directory: every field of the network, what other tools read, and the weights' dtype."""
    network = {field.name: getattr(args, field.name) for field in fields(args)}
    carried = {name: config[name] for name in _CARRIED if name in config}
    return network | carried | {"model_type": "ttt", "torch_dtype": dtype}
