"""The files of a model directory: their names, how the JSON among them is written, and which folders are one."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputError
from .untrusted import LONGEST_JSON, read_bytes, read_json

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
MODEL_FILE = "ttt.py"  # for mlx-lm without this package's registration
CARD = "README.md"
WEIGHTS_PATTERN = "model{suffix}.safetensors"  # the suffix is empty, or like -00001-of-00002
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
# What these files contain when we wrote them, and not a person.
_SIGNS = {CARD: b"library_name: mlx", MODEL_FILE: b"from mlx_ttt.model import Model, ModelArgs"}


def write_config(file: Path, content: dict[str, Any]) -> None:
    """Write a model's config or index as other tools do: two spaces, ASCII."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_json(file: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write other JSON: one space, since a tokenizer's is large, and all characters as they are."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_foreign(folder: Path) -> None:
    """Check that a folder may be replaced: a model directory with no other files in it, or an empty folder.

    Raises:
        OutputError: `folder` is something else; the message says what.
    """
    if why := _foreign(folder):
        raise OutputError(f"{folder}: {why}, so --overwrite leaves it alone; choose another place")


def _foreign(folder: Path) -> str | None:
    """Why a folder may not be replaced; None if it may."""
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
    return f"has no {CONFIG} of a TTT model" if names and not _is_ttt_config(folder / CONFIG) else None


def _is_ttt_config(file: Path) -> bool:
    try:
        return read_json(file).get("model_type") == "ttt"
    except CheckpointError:
        return False
