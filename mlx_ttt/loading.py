"""Loads a model directory: the model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .checkpoint.by_name import model_directory
from .checkpoint.config import read_config
from .checkpoint.directory import CONFIG
from .checkpoint.parameters import Parameters
from .checkpoint.quantization import in_floating_point
from .checkpoint.source import open_source
from .checkpoint.untrusted import quoted
from .errors import CheckpointError
from .model import Model, ModelArgs
from .network.model import prepare
from .text.tokenizer import load_tokenizer

BUNDLED = "shakespeare-ttt-linear"


def bundled_model() -> Path:
    """The directory of the model that ships with the package: 3.8 M parameters, trained on Shakespeare and novels."""
    return Path(__file__).parent / "models" / BUNDLED


def load(
    path: str | Path | None = None,
    revision: str | None = None,
    group: mx.distributed.Group | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[Model, TokenizerWrapper]:
    """Load a model and its tokenizer, as mlx_lm.load does.

    Args:
        path: a model directory, or any TTT checkpoint on the Hugging Face Hub, `org/name`, which is downloaded and
            converted the first time; the bundled model by default.
        revision: branch, tag or commit of a repository on the Hub.
        group: machines over which the model is split; see `Model.shard`.
        tokenizer: for a repository that has none: a tokenizer's file or folder, or a repository that has one.

    Returns:
        The model and an mlx-lm TokenizerWrapper.

    Raises:
        CheckpointError: there is no such directory, or it is not a TTT model, or it is incomplete or damaged.
        HubError: it is not on this machine and cannot be downloaded.
        TokenizerError: it has no tokenizer, or a damaged one.
        DistributedError: it does not divide over so many machines.
    """
    path = _local(path, revision, tokenizer)
    model, config = load_model(path, group=group)
    return model, load_tokenizer(path, config)


def load_model(
    path: str | Path | None = None, revision: str | None = None, group: mx.distributed.Group | None = None
) -> tuple[Model, dict]:
    """Load a model without its tokenizer.

    On a Linux CPU, our C code reads half-precision and quantized matrices as they are, and multiplies in float32. All
    other half-precision arrays become float32; without the C code, matrices and scales, too, because MLX multiplies
    float32 40 times faster there.

    Args:
        path, revision, group: as for `load`.

    Returns:
        The model, and what its config.json says.

    Raises:
        CheckpointError, HubError, DistributedError: as for `load`.
    """
    path = _local(path, revision, needs_tokenizer=False)
    _check(path)
    try:
        loaded, config = mlx_lm_utils.load_model(
            path,
            lazy=True,
            model_config={"model_file": None},  # no code from the directory is run
            get_model_classes=lambda config: (Model, ModelArgs),
        )
        model = cast(Model, loaded)
        if group is not None:
            model.shard(group)
        prepare(model)
        mx.eval(model.parameters())
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {quoted(error)}") from error
    del config["model_file"]
    return model, config


def _local(
    path: str | Path | None,
    revision: str | None,
    tokenizer: str | Path | None = None,
    needs_tokenizer: bool = True,
) -> Path:
    if path is None:
        return bundled_model()
    return model_directory(path, revision, tokenizer=tokenizer, needs_tokenizer=needs_tokenizer)


def _check(path: Path) -> None:
    """Find what is wrong with a model directory without reading its values. mlx-lm's own errors are less clear."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such model directory; one comes from `convert.py mlx`")
    config = read_config(path / CONFIG)
    weights = in_floating_point(open_source(path), config.quantization())
    Parameters(config.args).check(weights.tensors, str(path))
