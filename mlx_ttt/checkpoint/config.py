"""config.json: checked when it is someone's, inferred from the tensors where there is none, written for our models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import CheckpointError
from ..network.args import ModelArgs
from .directory import CONFIG, MODEL_FILE
from .inferred import assumed_config, inferred_config
from .quantization import Quantization
from .source import Source
from .untrusted import quoted, read_json

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Far above every existing model. A larger value is a mistake, and must be refused before any memory is allocated.
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
# Fields that do not describe the network but that other tools need.
_CARRIED = ("architectures", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Config:
    """A checkpoint's config: its fields as they are, the model's arguments, and where it comes from."""

    fields: dict
    args: ModelArgs
    path: Path | None  # None when it was inferred
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name if self.path else "the config that its own shapes give"

    def quantization(self) -> Quantization | None:
        """How the checkpoint's weights are quantized; None if they are not.

        Raises:
            CheckpointError: they are quantized in a way that MLX does not know.
        """
        return Quantization.of_config(self.fields, self.path)


def config_of(checkpoint: Source, given: Path | None = None, assumptions: Mapping[str, float] | None = None) -> Config:
    """The config of a checkpoint.

    It is the given file, else config.json beside the weights, else inferred where the format has no config.

    Args:
        given: a config file.
        assumptions: values by name of fields that no tensor tells; allowed only for a config that is inferred.

    Raises:
        CheckpointError: there is no config, or it is not one of a TTT model, or assumptions are given for a file.
    """
    if given or not checkpoint.comes_without_config or os.path.isfile(checkpoint.folder / CONFIG):
        config = read_config(find_config(checkpoint.folder, given))
        if assumptions:
            name = next(iter(assumptions))
            raise CheckpointError(f"{config.path}: set {name} in there; the option is for checkpoints without a config")
        return config

    inferred = inferred_config(checkpoint.tensors, str(checkpoint.path))
    told = dict(assumptions or {})
    assumed = {name: value for name, value in assumed_config(inferred).items() if name not in told}
    inferred |= assumed | told
    args = _arguments(inferred, str(checkpoint.path))
    return Config(inferred, args, None, (_warning(args, assumed),))


def _warning(args: ModelArgs, assumed: Mapping[str, float]) -> str:
    """What was inferred and assumed, to be checked by a person: a stream cut short looks like a smaller model."""
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


def read_config(path: Path) -> Config:
    """Read a config file and check it.

    Raises:
        CheckpointError: it cannot be read, is of another architecture, or has missing, ill-typed or absurd fields.
    """
    config = read_json(path)
    refuse_other_architectures(config, path)
    if missing := [name for name in _SIZES if name not in config]:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}")
    return Config(config, _arguments(config, str(path)), path)


def _arguments(config: dict, where: str) -> ModelArgs:
    """The model's arguments; raises CheckpointError if one is ill-typed or absurd."""
    try:
        args = ModelArgs.from_dict(config)
    except ValueError as error:
        raise CheckpointError(f"{where}: {quoted(error)}") from None
    for name, largest in _LARGEST.items():
        if getattr(args, name) > largest:
            raise CheckpointError(f"{where}: {name} is {quoted(getattr(args, name))}, more than any model has")
    return args


def refuse_other_architectures(config: dict, where: Path | str) -> None:
    """Raise CheckpointError if a config says that its model is of another kind."""
    architectures = config.get("architectures") or ["TTT"]
    kinds = [config.get("model_type", "ttt"), *(architectures if isinstance(architectures, list) else [architectures])]
    if others := [kind for kind in kinds if not (isinstance(kind, str) and kind.lower().startswith("ttt"))]:
        raise CheckpointError(f"{where}: describes a model of type {quoted(others[0])}, not a TTT language model")


def written_config(config: Config, dtype: str) -> dict:
    """The config of a model directory: every field of the network, those of other tools, and the weights' dtype."""
    network = {field.name: getattr(config.args, field.name) for field in fields(config.args)}
    carried = {name: config.fields[name] for name in _CARRIED if name in config.fields}
    return network | carried | {"model_type": "ttt", "model_file": MODEL_FILE, "torch_dtype": dtype}
