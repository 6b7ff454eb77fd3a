"""A model directory on disk -> a model and a tokenizer in memory."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper

from .detokenizer import SentencePieceDetokenizer
from .errors import CheckpointError, TokenizerError
from .model import Model, ModelArgs

BUNDLED = "shakespeare-ttt-linear"


def bundled_model() -> Path:
    """The directory of the model that ships with the package: 3.8 M parameters, trained on Shakespeare."""
    return Path(__file__).parent / "models" / BUNDLED


def load(path: str | Path | None = None):
    """Load a model and its tokenizer, as mlx_lm.load does.

    Args:
        path: a model directory; the bundled model by default.

    Returns:
        The model and an mlx-lm TokenizerWrapper.

    Raises:
        CheckpointError: there is no such directory, or it is not a TTT model, or it is incomplete or damaged.
        TokenizerError: it has no tokenizer, or a damaged one.
    """
    path = Path(path or bundled_model())
    model, config = load_model(path)
    return model, load_tokenizer(path, config)


def load_model(path: str | Path | None = None) -> tuple[Model, dict]:
    """Load a model without its tokenizer, and its config.

    On a CPU, half-precision weights are widened to float32: MLX multiplies those 40 times faster there.

    Raises:
        CheckpointError: as for `load`.
    """
    path = Path(path or bundled_model())
    config = _read_config(path)
    try:
        ModelArgs.from_dict(config)
        model, config = mlx_lm_utils.load_model(
            path,
            lazy=True,
            model_config={"model_file": None},  # our own code is the architecture; none is run from the directory
            get_model_classes=lambda config: (Model, ModelArgs),
        )
        if mx.default_device() == mx.cpu:
            _widen(model)
        mx.eval(model.parameters())
    except (ValueError, RuntimeError, KeyError, TypeError, FileNotFoundError) as error:
        raise CheckpointError(f"{path}: {_first_line(error)}") from error
    return model, config


def load_tokenizer(path: Path, config: dict):
    """The tokenizer of a model directory, as mlx-lm's TokenizerWrapper.

    Raises:
        TokenizerError: there is none, or it is damaged.
    """
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise TokenizerError(f"{path}: no tokenizer; convert again with --tokenizer FILE (tokenizer.model or .json)")
    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(_no_warning)
    try:
        tokenizer = mlx_lm_utils.load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # whatever transformers and tokenizers make of a damaged file
        raise TokenizerError(f"{path}: the tokenizer cannot be read: {_first_line(error)}") from error
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


def _read_config(path: Path) -> dict:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such model directory")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no config.json; a model directory comes from `convert.py mlx`") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'}: cannot be read: {_first_line(error)}") from error
    if not isinstance(config, dict) or config.get("model_type") != "ttt":
        found = config.get("model_type") if isinstance(config, dict) else None
        raise CheckpointError(f'{path / "config.json"}: model_type is {found!r}, expected "ttt"')
    return config


def _widen(model: nn.Module) -> None:
    half = (mx.float16, mx.bfloat16)
    model.apply(lambda x: x.astype(mx.float32) if x.dtype in half else x)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
