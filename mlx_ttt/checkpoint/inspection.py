"""Describes a checkpoint or model directory without reading its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..network.args import ModelArgs
from .config import Config, config_of
from .directory import TOKENIZER_FILES
from .parameters import HEAD, Parameters
from .quantization import Quantization, in_floating_point
from .source import open_source
from .tensor import bytes_by_dtype


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds. The lm_head of a tied model is not counted: it is the embedding."""

    format: str
    tensors: int
    parameters: int
    bytes_by_dtype: dict[str, int]
    args: ModelArgs | None  # None when there is no usable config
    quantization: Quantization | None
    tokenizer_files: tuple[str, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]  # what keeps it from being converted, as far as names, shapes and dtypes tell


def inspect(source: Path | str, config: Path | str | None = None) -> Inspection:
    """Describe a checkpoint, and say what keeps it from being converted.

    Args:
        source: a folder or a weights file.
        config: the config file, if it is not config.json beside the weights.

    Raises:
        CheckpointError: there is no checkpoint at `source`, or its weights files are damaged.
    """
    checkpoint = weights = open_source(Path(source))
    found: Config | None = None
    quantization: Quantization | None = None
    try:
        found = config_of(checkpoint, Path(config) if config else None)
        quantization = found.quantization()
        weights = in_floating_point(checkpoint, quantization)
        problems = Parameters(found.args).problems(weights.tensors)
    except CheckpointError as error:
        problems = [str(error)]
    args = found.args if found else None
    tied = HEAD if args and args.tie_word_embeddings else None
    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if name != tied}
    return Inspection(
        format=checkpoint.format,
        tensors=len(stored),
        parameters=sum(tensor.size for name, tensor in weights.tensors.items() if name != tied),
        bytes_by_dtype=bytes_by_dtype(stored),
        args=args,
        quantization=quantization,
        tokenizer_files=tuple(name for name in TOKENIZER_FILES if os.path.isfile(checkpoint.folder / name)),
        warnings=found.warnings if found else (),
        problems=tuple(problems),
    )
