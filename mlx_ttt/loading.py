"""A model directory on disk -> a model and a tokenizer in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import mlx.core as mx
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper

from .checkpoint.config import read_config
from .checkpoint.directory import CONFIG
from .checkpoint.hub import locate
from .checkpoint.parameters import Parameters
from .checkpoint.quantization import Quantization
from .checkpoint.source import open_source
from .checkpoint.untrusted import quoted
from .cpu import prepare
from .detokenizer import SentencePieceDetokenizer
from .errors import CheckpointError, TokenizerError
from .model import Model, ModelArgs

BUNDLED = "shakespeare-ttt-linear"


def bundled_model() -> Path:
    """The directory of the model that ships with the package: 3.8 M parameters, trained on Shakespeare."""
    return Path(__file__).parent / "models" / BUNDLED


def load(path: str | Path | None = None, revision: str | None = None):
    """Load a model and its tokenizer, as mlx_lm.load does.

    Args:
        path: a model directory, here or on the Hugging Face Hub (`org/name`); the bundled model by default.
        revision: branch, tag or commit of a repository on the Hub.

    Returns:
        The model and an mlx-lm TokenizerWrapper.

    Raises:
        CheckpointError: there is no such directory, or it is not a TTT model, or it is incomplete or damaged.
        HubError: it is not here and cannot be downloaded.
        TokenizerError: it has no tokenizer, or a damaged one.
    """
    path = _local(path, revision)
    model, config = load_model(path)
    return model, load_tokenizer(path, config)


def load_model(path: str | Path | None = None, revision: str | None = None) -> tuple[Model, dict]:
    """Load a model without its tokenizer, and its config.

    On a CPU, half-precision weights are widened to float32: MLX multiplies those 40 times faster there. Quantized ones
    stay quantized, their scales widened, and are multiplied in float32.

    Raises:
        CheckpointError, HubError: as for `load`.
    """
    path = _local(path, revision)
    _check(path)
    try:
        model, config = mlx_lm_utils.load_model(
            path,
            lazy=True,
            model_config={"model_file": None},  # our own code is the architecture; none is run from the directory
            get_model_classes=lambda config: (Model, ModelArgs),
        )
        if mx.default_device() == mx.cpu:
            prepare(model)
        mx.eval(model.parameters())
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {quoted(error)}") from error
    del config["model_file"]
    return model, config


def _local(path: str | Path | None, revision: str | None) -> Path:
    return bundled_model() if path is None else locate(path, revision).path


def _check(path: Path) -> None:
    """Everything that can be said of a model directory without reading its values: mlx-lm would not name it."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such model directory; one comes from `convert.py mlx`")
    config, args = read_config(path / CONFIG)
    tensors = open_source(path).tensors
    if quantization := Quantization.of_config(config, path / CONFIG):
        tensors = quantization.dequantized(tensors, str(path))
    Parameters(args).check(tensors, str(path))


def load_tokenizer(path: Path, config: dict):
    """The tokenizer of a model directory, as mlx-lm's TokenizerWrapper.

    Raises:
        TokenizerError: there is none, or it is damaged.
    """
    if not (path / "tokenizer.json").exists():  # transformers makes something else of a tokenizer.model alone
        raise TokenizerError(
            f"{path}: no tokenizer.json; convert again with --tokenizer FILE (tokenizer.model or .json)"
        )
    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(_no_warning)
    try:
        tokenizer = mlx_lm_utils.load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # whatever transformers and tokenizers make of a damaged file
        raise TokenizerError(f"{path}: the tokenizer cannot be read: {quoted(error)}") from error
    finally:
        log.removeFilter(_no_warning)
    if (path / "tokenizer.model").exists() or isinstance(tokenizer.detokenizer, SPMStreamingDetokenizer):
        # Ours is exact for every sequence of ids: bytes of no character, control ids, leading spaces.
        tokenizer = TokenizerWrapper(
            tokenizer._tokenizer, SentencePieceDetokenizer, eos_token_ids=tokenizer.eos_token_ids
        )
    return tokenizer


def _no_warning(record: logging.LogRecord) -> bool:
    """transformers warns that it has no model "ttt"; it is only asked for the tokenizer."""
    return record.levelno > logging.WARNING
