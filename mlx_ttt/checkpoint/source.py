"""What a person points at, a folder or a file, as named tensors that are still on disk."""

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
from .untrusted import quoted, read_json

_SAFETENSORS, _PYTORCH, _JAX = "safetensors", "PyTorch", "JAX stream"
_KNOWN = (WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# What training tools leave beside the weights.
_NOT_WEIGHTS = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")


@dataclass(frozen=True)
class Source:
    """A checkpoint: its tensors in official names, and where the files beside the weights are."""

    path: Path
    format: str
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def comes_without_config(self) -> bool:
        """Whether no checkpoint of this format has a config, so that it is inferred from the tensors."""
        return self.format == _JAX


def open_source(path: Path) -> Source:
    """Open a checkpoint: a folder with safetensors or .bin weights, sharded or not, or a JAX stream; or a weights file.

    Raises:
        CheckpointError: nothing is there, it is not a checkpoint, or it is damaged.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or folder")
    weights = _weights_file(path) if path.is_dir() else path
    if weights.name.endswith(".index.json"):
        files, tensors = _read_shards(weights)
    else:
        files, tensors = (weights,), _read_weights(weights)
    sharded = f", {len(files)} shards" if len(files) > 1 else ""
    return Source(path, _format(files[0]) + sharded, files, official_names(tensors, str(path)))


def weights_among(names: Iterable[str]) -> list[str]:
    """The files to start from among a folder's, by their names: the one that the Hub knows, else all that may be it."""
    names = sorted(names)
    for name in _KNOWN:
        if name in names:
            return [name]
    return [name for name in names if has_stream_name(name)] or [
        name for name in names if name.endswith(_SUFFIXES) and not name.startswith(_NOT_WEIGHTS)
    ]


def _weights_file(folder: Path) -> Path:
    """The only file in a folder to start from."""
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
    """A file's format by its content, unless the name says safetensors or JAX stream."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: not a file")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if path.suffix == ".safetensors" or start[8:] == b"{":  # a header length, then a JSON object: unlike the others
        return _SAFETENSORS
    return _JAX if has_stream_name(path.name) or starts_like_stream(start) else _PYTORCH


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; from a JAX stream by their official names, else by the names in it."""
    kind = _format(path)
    if kind == _SAFETENSORS:
        return read_safetensors(path)
    if kind == _JAX:
        return read_jax_stream(path)
    return state_dict(read_torch_zip(path), str(path))


def _read_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """The files that an index names and their tensors, which must be just those that it lists."""
    weight_map = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    files = tuple(index.parent / name for name in shard_names(index))
    for file in files:
        if not os.path.isfile(file):
            raise CheckpointError(f"{file}: missing, but {index.name} lists it")
        shard = _read_weights(file)
        listed = {name for name, shard_name in weight_map.items() if shard_name == file.name}
        for names, fact in (
            (listed - shard.keys(), f"is not in it, but {index.name} lists it there"),
            (shard.keys() - listed, f"is in it, but {index.name} does not list it there"),
        ):
            if names:
                more = f" (and {len(names) - 1} more such tensors)" if len(names) > 1 else ""
                raise CheckpointError(f"{file}: {quoted(min(names))} {fact}{more}")
        tensors |= shard
    return files, tensors


def shard_names(index: Path) -> list[str]:
    """The files that an index names, each beside it.

    Raises:
        CheckpointError: it cannot be read, names none, or names something else.
    """
    return sorted({_shard_name(index, name) for name in _weight_map(index).values()})


def _weight_map(index: Path) -> dict[str, object]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    return weight_map


def _shard_name(index: Path, name: object) -> str:
    """A file in the index's own folder: an index may come from anywhere and may not point elsewhere."""
    is_plain = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) < 256
    if not is_plain or name in (".", "..") or "/" in name or "\\" in name:
        raise CheckpointError(f"{index}: {quoted(name)} is not the name of a file beside it")
    return name
