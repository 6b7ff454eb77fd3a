"""What a person points at, a folder or a file, as named tensors that are still on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .directory import WEIGHTS, WEIGHTS_INDEX
from .names import official_names, state_dict
from .safetensors import read_safetensors
from .tensor import Tensor
from .torch_zip import read_torch_zip
from .untrusted import quoted, read_json

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


def open_source(path: Path) -> Source:
    """Open a checkpoint: a folder with safetensors or .bin weights, sharded or not, or a weights file itself.

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
    kind = "safetensors" if _is_safetensors(files[0]) else "PyTorch"
    sharded = f", {len(files)} shards" if len(files) > 1 else ""
    return Source(path, kind + sharded, files, official_names(tensors, str(path)))


def _weights_file(folder: Path) -> Path:
    """The file to start from in a folder: by the names that the Hub knows, else the only one there is."""
    try:
        files = [folder / name for name in sorted(os.listdir(folder))]
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from None
    for name in (WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"):
        if folder / name in files:
            return folder / name
    found = [
        file
        for file in files
        if file.suffix in _SUFFIXES and os.path.isfile(file) and not file.name.startswith(_NOT_WEIGHTS)
    ]
    if not found:
        raise CheckpointError(f"{folder}: no weights in this folder (looked for {', '.join(_SUFFIXES)} files)")
    if len(found) > 1:
        names = ", ".join(quoted(file.name) for file in found[:4])
        raise CheckpointError(f"{folder}: holds {len(found)} weights files ({names}); name the one to read")
    return found[0]


def _is_safetensors(path: Path) -> bool:
    """By content: a header length, then a JSON object. Neither a zip file nor a pickle starts like that."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by the names in it. The content decides the format, unless the name says safetensors."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: not a file")
    try:
        safetensors = path.suffix == ".safetensors" or _is_safetensors(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    return read_safetensors(path) if safetensors else state_dict(read_torch_zip(path), str(path))


def _read_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """The files that an index names and their tensors, which must be just those that it lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    tensors: dict[str, Tensor] = {}
    files = tuple(index.parent / name for name in sorted({_shard_name(index, name) for name in weight_map.values()}))
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


def _shard_name(index: Path, name: object) -> str:
    """A file in the index's own folder: an index may come from anywhere and may not point elsewhere."""
    is_plain = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) < 256
    if not is_plain or name in (".", "..") or "/" in name or "\\" in name:
        raise CheckpointError(f"{index}: {quoted(name)} is not the name of a file beside it")
    return name
