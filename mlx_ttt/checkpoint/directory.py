"""The files of a model directory, by which one is told from a folder that holds anything else."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from .._mlx_lm import MODEL_FILE
from ..errors import CheckpointError, OutputError
from .untrusted import LONGEST_JSON, read_bytes, read_json

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
CARD = "README.md"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_COMPANIONS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

MODEL_FILE_TEXT = '''"""For mlx-lm with `--trust-remote-code`; mlx-ttt itself does without this file."""

from mlx_ttt.model import Model, ModelArgs  # pip install mlx-ttt

__all__ = ["Model", "ModelArgs"]
'''

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_NAMES = {
    *(CONFIG, GENERATION_CONFIG, MODEL_FILE, WEIGHTS, WEIGHTS_INDEX, CARD),
    ".DS_Store",  # Finder leaves it wherever it looks
    *(*TOKENIZER_FILES, TOKENIZER_CONFIG, *TOKENIZER_COMPANIONS),
}
# What these say when no person wrote them.
_SIGNS = {CARD: b"library_name: mlx", MODEL_FILE: b"from mlx_ttt.model import Model, ModelArgs"}


def shard_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def refuse_foreign(folder: Path) -> None:
    """Only a model directory of ours may be replaced: its files and nothing else, or an empty folder.

    Raises:
        OutputError: `folder` is something else; it says what.
    """
    if why := _foreign(folder):
        raise OutputError(f"{folder}: {why}, so --overwrite leaves it alone; choose another place")


def _foreign(folder: Path) -> str | None:
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        return "is a link" if folder.is_symlink() else "is not a folder"
    names = sorted(os.listdir(folder))
    for name in names:
        if name not in _NAMES and not _SHARD.fullmatch(name):
            return f"holds {name!r}, which is no part of a model directory"
        if not stat.S_ISREG(os.lstat(folder / name).st_mode):
            return f"holds {name!r}, which is not a plain file"
        if name in _SIGNS and _SIGNS[name] not in read_bytes(folder / name, LONGEST_JSON, OutputError):
            return f"holds a {name} that somebody has written"
    return _not_ours(folder / CONFIG) if names else None


def _not_ours(config: Path) -> str | None:
    try:
        ours = read_json(config).get("model_type") == "ttt"
    except CheckpointError:
        ours = False
    return None if ours else f"has no {CONFIG} of a TTT model"
