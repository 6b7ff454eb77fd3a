"""The model's tokenizer, as the Swift package reads it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoint.sentencepiece_model import LARGEST_FILE
from ...checkpoint.untrusted import read_json
from ...errors import TokenizerError

Json = dict[str, Any]

# What the Swift tokenizer knows (swift/Sources/TTTKit/Tokenizer). It refuses anything else, so that is said here.
_MODELS = ("BPE", "Unigram")
_COMPONENTS = {
    "normalizer": "Sequence Prepend Replace NFC NFD NFKC NFKD Strip Precompiled",
    "pre_tokenizer": "Sequence Split Digits ByteLevel Metaspace",
    "post_processor": "Sequence TemplateProcessing ByteLevel",
}
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

_WITHOUT = "; a Core ML package can be exported without a tokenizer, with --no-companions"


def write_tokenizer(out: Path, model: Path) -> None:
    """Copy the tokenizer's files.

    Args:
        out: an existing folder.
        model: the model directory.

    Raises:
        TokenizerError: there is no tokenizer, it is damaged, or one that the Swift package does not know.
    """
    for name in _FILES:
        file = model / name
        if name == "tokenizer.json":
            _refuse_unknown(read_json(file, LARGEST_FILE, TokenizerError), file)
        elif not file.is_file():
            continue
        elif file.suffix == ".json":
            read_json(file, LARGEST_FILE, TokenizerError)
        shutil.copyfile(file, out / name)


def _refuse_unknown(content: Json, file: Path) -> None:
    kind = content["model"].get("type")
    if kind not in _MODELS:
        raise TokenizerError(f"{file}: our Swift package has no {kind} model{_WITHOUT}")
    for part, known in _COMPONENTS.items():
        for component in _components(content.get(part)):
            if (kind := component["type"]) not in known.split():
                raise TokenizerError(f"{file}: our Swift package has no {part} {kind}{_WITHOUT}")


def _components(part: Json | None) -> Iterator[Json]:
    """A part of a tokenizer and, if it is a sequence, its own parts."""
    if part:
        yield part
        for name in ("normalizers", "pretokenizers", "processors"):
            for inner in part.get(name, ()):
                yield from _components(inner)
