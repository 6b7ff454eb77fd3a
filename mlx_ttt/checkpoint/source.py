"""Opens a checkpoint, a folder or a file in any known format: its tensors by name, their values still on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .directory import WEIGHTS, WEIGHTS_INDEX
from .jax_stream import has_stream_name, read_jax_stream, starts_like_stream
from .names import official_names, state_dict
from .safetensors import read_safetensors
from .tensor import Tensor
from .torch_zip import read_torch_zip
from .untrusted import opened, quoted, read_json

_SAFETENSORS, _PYTORCH, _JAX = "safetensors", "PyTorch", "JAX stream"
_KNOWN = (WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# Files that training tools leave beside the weights.
_NOT_WEIGHTS = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")


@dataclass(frozen=True)
class Source:
    """A checkpoint: its format, its weights files, and its tensors by official name."""

    path: Path
    format: str
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        """Where the files beside the weights are: config, tokenizer."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def comes_without_config(self) -> bool:
        """Whether checkpoints of this format have no config, so that it must be inferred from the tensors."""
        return self.format == _JAX


def open_source(path: Path) -> Source:
    """Open a folder with safetensors or PyTorch weights, sharded or not, or with a JAX stream; or a weights file.

    Raises:
        CheckpointError: nothing is there, it is not a checkpoint, or it is damaged.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or folder")
    weights = _weights_file(path) if path.is_dir() else path
    if weights.name.endswith(".index.json"):
        files, tensors = _read_shards(weights)
    else:
        files, tensors = (weights,), _READERS[_format(weights)](weights)
    sharded = f", {len(files)} shards" if len(files) > 1 else ""
    return Source(path, _format(files[0]) + sharded, files, official_names(tensors, str(path)))


def weights_among(names: Iterable[str]) -> list[str]:
    """Which of a folder's files holds the weights: the one with a standard name, else all with a likely name."""
    names = sorted(names)
    for name in _KNOWN:
        if name in names:
            return [name]
    return [name for name in names if has_stream_name(name)] or [
        name for name in names if name.endswith(_SUFFIXES) and not name.startswith(_NOT_WEIGHTS)
    ]


def _weights_file(folder: Path) -> Path:
    """The one file of `weights_among`; raises CheckpointError if there are none or several."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from None
    found = weights_among(name for name in names if name in _KNOWN or os.path.isfile(folder / name))
    if not found:
        looked_for = f"looked for {', '.join(_SUFFIXES)} files and JAX streams"
        raise CheckpointError(f"{folder}: no weights in this folder ({looked_for})")
    if len(found) > 1:
        shown = ", ".join(quoted(name) for name in found[:4])
        raise CheckpointError(f"{folder}: holds {len(found)} weights files ({shown}); name the one to read")
    return folder / found[0]


def _format(path: Path) -> str:
    """A file's format: safetensors or JAX stream by its name, else by its content."""
    with opened(path) as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":  # a header length, then a JSON object: unlike the others
        return _SAFETENSORS
    return _JAX if has_stream_name(path.name) or starts_like_stream(start) else _PYTORCH


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    return state_dict(read_torch_zip(path), str(path))


# Each gives the tensors of one file by the names in it; those of a JAX stream by their official names.
_READERS = {_SAFETENSORS: read_safetensors, _PYTORCH: _read_pytorch, _JAX: read_jax_stream}


def _read_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """The files that an index names, and their tensors, which must be exactly those that it lists."""
    listing = weight_map(index)
    tensors: dict[str, Tensor] = {}
    files = tuple(index.parent / name for name in sorted(set(listing.values())))
    for file in files:
        if not os.path.isfile(file):
            raise CheckpointError(f"{file}: missing, but {index.name} lists it")
        shard = _READERS[_format(file)](file)
        listed = {name for name, shard_name in listing.items() if shard_name == file.name}
        for names, fact in (
            (listed - shard.keys(), f"is not in it, but {index.name} lists it there"),
            (shard.keys() - listed, f"is in it, but {index.name} does not list it there"),
        ):
            if names:
                more = f" (and {len(names) - 1} more such tensors)" if len(names) > 1 else ""
                raise CheckpointError(f"{file}: {quoted(min(names))} {fact}{more}")
        tensors |= shard
    return files, tensors


def weight_map(index: Path) -> dict[str, str]:
    """For each tensor that an index lists, the name of its file, which is in the index's own folder.

    Raises:
        CheckpointError: the index cannot be read, names no file, or names something else.
    """
    listing = read_json(index).get("weight_map")
    if not isinstance(listing, dict) or not listing:
        raise CheckpointError(f"{index}: has no weight_map")
    return {tensor: _shard_name(index, name) for tensor, name in listing.items()}


def _shard_name(index: Path, name: object) -> str:
    """A file name out of an index. A path is refused: an index from anywhere must not point anywhere."""
    if (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name.encode()) < 256
        and name not in (".", "..")
        and not {"/", "\\"} & {*name}
    ):
        return name
    raise CheckpointError(f"{index}: {quoted(name)} is not the name of a file beside it")
