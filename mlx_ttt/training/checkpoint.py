"""Checkpoints of a training: written whole or not at all, and enough to go on exactly.

A checkpoint is a folder `step-00000040`. It is written beside its place, flushed to the disk and then renamed, which
happens at once or not at all. The one before is deleted only after that. So whenever the process is killed, the newest
folder of that name is complete.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint.directory import write_config
from ..checkpoint.safetensors import read_safetensors, write_safetensors
from ..checkpoint.tensor import Tensor
from ..checkpoint.untrusted import read_json
from ..errors import CheckpointError, OutputError
from ..files import check_format
from ..network.cache import TTTCache

FORMAT = 1
Arrays = dict[str, mx.array]
Caches = list[TTTCache]

_WEIGHTS, _OPTIMIZER, _CARRIED, _STATE = (
    "weights.safetensors",
    "optimizer.safetensors",
    "carried.safetensors",
    "state.json",
)
_SMALL_FILES = 1 << 20  # bytes: an upper bound for the headers and the JSON


@dataclass(frozen=True)
class State:
    """All that the next step of a training depends on, besides its recipe and its data."""

    step: int  # how many are done; also the position in the data
    weights: Arrays  # by name, float32
    optimizer: Arrays
    carried: dict[int, Caches]  # the states of the texts that go on, by row of the batch
    random: int  # the seed that brings MLX's random numbers where they are


def random_seed() -> int:
    """The seed from which MLX draws the same random numbers as from now on."""
    high, low = mx.random.state[0].tolist()  # type: ignore[index]  # it is a list of one array
    return high << 32 | low


def save(folder: Path, state: State, about: Mapping[str, Any]) -> None:
    """Write a checkpoint into `folder`, then delete those before it.

    Args:
        about: JSON that `load` returns with the state.

    Raises:
        OutputError: it cannot be written. The checkpoint before is still there.
    """
    place = folder / f"step-{state.step:08}"
    if not place.exists():
        carried = {
            f"{row}/{layer}/{name}": x
            for row, caches in state.carried.items()
            for layer, cache in enumerate(caches)
            for name, x in dict(tree_flatten(cache.arrays)).items()
        }
        files: dict[str, Arrays] = {_WEIGHTS: state.weights, _OPTIMIZER: state.optimizer, _CARRIED: carried}
        content = {
            "format": FORMAT,
            "step": state.step,
            "random": state.random,
            "offsets": {row: [c.offset[0] for c in caches] for row, caches in state.carried.items()},
            "about": dict(about),
        }
        nbytes = sum(x.nbytes for arrays in files.values() for x in arrays.values())
        with written_whole(place, nbytes) as new:
            new.mkdir()
            for name, arrays in files.items():
                write_arrays(new / name, arrays)
            write_config(new / _STATE, content)
    for other in _checkpoints(folder):
        if other != place:
            shutil.rmtree(other, ignore_errors=True)


def load(folder: Path) -> tuple[State, dict[str, Any]]:
    """The newest checkpoint in `folder`, and what `save` was told about it. Deletes what a killed process left behind.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    newest = _newest(folder)
    for left_behind in folder.glob(".*.partial"):
        _remove(left_behind)
    content = _read_state(newest)
    weights, optimizer, carried = (_read_arrays(newest / name) for name in (_WEIGHTS, _OPTIMIZER, _CARRIED))
    try:
        offsets = {int(row): offsets for row, offsets in content["offsets"].items()}
        caches = {row: _caches(carried, row, layers) for row, layers in offsets.items()}
        return State(content["step"], weights, optimizer, caches, content["random"]), content["about"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{newest / _STATE}: damaged") from None


def read_about(folder: Path) -> dict[str, Any]:
    """What `save` was told about the newest checkpoint in `folder`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        return _read_state(newest := _newest(folder))["about"]
    except KeyError:
        raise CheckpointError(f"{newest / _STATE}: damaged") from None


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """What is not an array. The first checkpoints, of the time before 0.2.0, say no format."""
    content = read_json(checkpoint / _STATE)
    check_format(checkpoint / _STATE, content.get("format", 1), FORMAT, CheckpointError)
    return content


def _newest(folder: Path) -> Path:
    if not (found := sorted(_checkpoints(folder))):
        raise CheckpointError(f"{folder}: holds no checkpoint of a training")
    return found[-1]


def _checkpoints(folder: Path) -> Iterator[Path]:
    return folder.glob("step-" + "[0-9]" * 8)


def _caches(arrays: Arrays, row: int, offsets: list[int]) -> Caches:
    """The state of one row of the batch."""
    caches = []
    for layer, offset in enumerate(offsets):
        prefix = f"{row}/{layer}/"
        mine = [(name.removeprefix(prefix), x) for name, x in arrays.items() if name.startswith(prefix)]
        caches.append(TTTCache.from_state({**tree_unflatten(mine), "offset": [offset]}))
    return caches


def write_arrays(file: Path, arrays: Arrays) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {name: Tensor(x.shape, x.dtype, partial(arrays.__getitem__, name)) for name, x in arrays.items()}
    write_safetensors(file, tensors, {"format": "mlx"})


def _read_arrays(file: Path) -> Arrays:
    arrays = {name: tensor.load() for name, tensor in read_safetensors(file).items()}
    mx.eval(arrays)
    return arrays


@contextmanager
def written_whole(place: Path, nbytes: int) -> Iterator[Path]:
    """A context manager that gives a place for a file or folder, and moves it to `place` at the end of the block.

    A file at `place` is replaced. If the process is killed within the block, `place` is as it was.

    Args:
        nbytes: about how much will be written.

    Raises:
        OutputError: it cannot be written, because the disk is full or for another reason. `place` is as it was.
    """
    beside = place.with_name(f".{place.name}.partial")
    try:
        _remove(beside)
        if shutil.disk_usage(place.parent).free < nbytes + _SMALL_FILES:
            raise OSError(errno.ENOSPC, "")
        yield beside
        for written in [*(beside.rglob("*") if beside.is_dir() else ()), beside]:
            _flush(written)
        beside.replace(place)
        _flush(place.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(place.parent).free
            raise OutputError(
                f"{place}: the disk is full: {nbytes / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free; make"
                " room and go on with --resume from the last checkpoint"
            ) from None
        raise OutputError(f"{place}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            _remove(beside)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder: after a power failure, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
