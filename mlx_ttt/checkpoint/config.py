"""config.json: other people's, checked; inferred where there is none; ours, written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import CheckpointError
from ..model import ModelArgs
from .directory import CONFIG, MODEL_FILE
from .inferred import assumed_config, inferred_config
from .source import Source
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


@dataclass(frozen=True)
class Config:
    """A checkpoint's config as it is, as the model's arguments, and where it comes from."""

    fields: dict
    args: ModelArgs
    path: Path | None  # None when it was inferred
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name if self.path else "the config that its own shapes give"


def config_of(checkpoint: Source, given: Path | None = None, assumptions: Mapping[str, float] | None = None) -> Config:
    """The config of a checkpoint: the file given, else config.json beside it, else inferred where the format has none.

    Args:
        given: a config file.
        assumptions: values of fields that no tensor tells, by name: only for a config that is inferred.

    Raises:
        CheckpointError: there is no config, or it is not one of a TTT model, or it needs no assumptions.
    """
    if given or not checkpoint.comes_without_config or os.path.isfile(checkpoint.folder / CONFIG):
        path = find_config(checkpoint.folder, given)
        config, args = read_config(path)
        if assumptions:
            name = next(iter(assumptions))
            raise CheckpointError(f"{path}: set {name} in there; the option is for checkpoints without a config")
        return Config(config, args, path)

    config = inferred_config(checkpoint.tensors, str(checkpoint.path))
    told = dict(assumptions or {})
    assumed = {name: value for name, value in assumed_config(config).items() if name not in told}
    config |= assumed | told
    args = _arguments(config, str(checkpoint.path))
    return Config(config, args, None, (_warning(args, assumed),))


def _warning(args: ModelArgs, assumed: Mapping[str, float]) -> str:
    """What a person can check: a stream that was cut between two values, for one, looks like a smaller model."""
    head = "tied to the embedding" if args.tie_word_embeddings else "of its own"
    inferred = f"no config: by its tensors the model has {args.num_hidden_layers} layers and an lm_head {head}"
    if not assumed:
        return inferred
    values = ", ".join(f"{name} {value:g}" for name, value in assumed.items())
    options = ", ".join(f"--{name.replace('_', '-')}" for name in assumed)
    return f"{inferred}; assumed as in the released models: {values} ({options})"


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
    return config, _arguments(config, str(path))


def _arguments(config: dict, where: str) -> ModelArgs:
    """A config as the model's arguments, none of them ill-typed or absurd."""
    try:
        args = ModelArgs.from_dict(config)
    except ValueError as error:
        raise CheckpointError(f"{where}: {quoted(error)}") from None
    for name, largest in _LARGEST.items():
        if getattr(args, name) > largest:
            raise CheckpointError(f"{where}: {name} is {quoted(getattr(args, name))}, more than any model has")
    return args


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
    return network | carried | {"model_type": "ttt", "model_file": MODEL_FILE, "torch_dtype": dtype}
