"""Reads the checkpoints of the official JAX implementation ("streams"), without JAX.

A stream is a series of MessagePack pairs: the path of a value as a list of names, and the value as Flax serializes it.
`streaming_train_state` holds the state of a training run, with the model's parameters under params/params.
`streaming_params` holds only the parameters, without that prefix. Sources: StreamingCheckpointer in the official code,
and flax.serialization.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from ..errors import CheckpointError
from .jax_names import official_parameter
from .mapped import MappedFile
from .msgpack import Reader
from .names import unknown_names
from .tensor import MOST_AXES, Tensor, contiguous, is_possible_shape
from .untrusted import quoted

_Member = TypeVar("_Member")
_OFFICIAL_FILE = re.compile(r"streaming_(?:train_state|params)(?:_[0-9]+)?")  # milestones end in their step
_START = re.compile(rb"\x92[\x91-\x9f][\xa0-\xbf\xd9]")  # an array of two, an array, text
_PREFIX = "params/params/"  # of the parameters in a train state
_NDARRAY = 1  # Flax's extension type
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32, "float64": mx.float64}
# Far above every existing stream; the 1.3B model's has about 1 600 records.
_MOST_RECORDS, _LONGEST_PATH, _MOST_CHUNKS = 100_000, 32, 4096
_OTHER_FORMATS = {b"\x80": "a pickle", b"PK": "a zip archive", b"version https://git-lfs": "a Git LFS pointer"}


def has_stream_name(name: str) -> bool:
    """Whether the official code gives a stream this name."""
    return bool(_OFFICIAL_FILE.fullmatch(name))


def starts_like_stream(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a stream. No other checkpoint format starts like this."""
    return bool(_START.match(start))


def read_jax_stream(path: Path) -> dict[str, Tensor]:
    """The parameters in a stream, with PyTorch's official names and order of axes. Their values stay in the file.

    The rest of a training state, mostly the optimizer's moments, is skipped.

    Raises:
        CheckpointError: the file is no stream, is truncated or damaged, or has a parameter that no TTT model has.
    """
    file = MappedFile(path)
    _refuse_others(file)
    records = _parameters(file)
    known = {jax_name: parameter for jax_name in records if (parameter := official_parameter(jax_name))}
    if unknown := [jax_name for jax_name in records if jax_name not in known]:
        raise CheckpointError(f"{path}: {unknown_names(unknown)}")
    tensors = {}
    for jax_name, (name, axes) in known.items():
        tensor = _tensor(jax_name, records[jax_name])
        if axes and len(tensor.shape) != len(axes):
            raise CheckpointError(f"{path}: {jax_name} has shape {tensor.shape}, expected {len(axes)} axes")
        tensors[name] = tensor.transposed(axes) if axes else tensor
    file.forget(0, file.size)
    return tensors


def _parameters(file: MappedFile) -> dict[str, Reader]:
    """The model's parameters: a reader of each value, by the path without prefix (`model/h/0/seq_norm/kernel`)."""
    records: dict[str, Reader] = {}
    stream = Reader(file, 0, file.size)
    while stream.kind() != "nothing":
        name, value = _record(stream)
        if name in records:
            raise CheckpointError(f"{file.path}: {quoted(name)} is in it twice")
        file.require(len(records) < _MOST_RECORDS, f"it has more than {_MOST_RECORDS:,} records")
        records[name] = value
    own = {name.removeprefix(_PREFIX): value for name, value in records.items() if name.startswith(_PREFIX)}
    return own or records


def _refuse_others(file: MappedFile) -> None:
    start = bytes(file.view(0, min(file.size, 32)))
    if not starts_like_stream(start):
        found = next((kind for magic, kind in _OTHER_FORMATS.items() if start.startswith(magic)), "something else")
        raise CheckpointError(f"{file.path}: named like a JAX stream, but is {found}; download or export it again")


def _record(stream: Reader) -> tuple[str, Reader]:
    """The next pair: the path's names, joined (some contain slashes themselves), and a reader of the value."""
    stream.file.require(stream.array() == 2, f"a pair was expected before byte {stream.position:,}")
    length = stream.array()
    stream.file.require(0 < length <= _LONGEST_PATH, f"it has a path of {length:,} names")
    return "/".join(stream.text() for _ in range(length)), stream.binary()


def _tensor(name: str, value: Reader) -> Tensor:
    """An array as Flax writes it: an extension type, or a map with pieces of it if it is larger than 1 GiB."""
    tensor = _chunked(name, value) if value.kind() == "map" else _ndarray(name, value)
    value.finish()
    return tensor


def _ndarray(name: str, value: Reader) -> Tensor:
    """An array in one piece: MessagePack in MessagePack, with shape, dtype's name and bytes in C order."""
    file, array = value.file, value.extension(_NDARRAY)
    file.require(array.array() == 3, f"{name} is not an array")
    shape = _shape(file, name, (array.integer() for _ in range(array.array())))
    dtype_name, numbers = array.text(), array.binary()
    array.finish()
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise CheckpointError(f"{file.path}: {name} has dtype {quoted(dtype_name)}, which no weights have")
    return contiguous(file, name, (numbers.position, numbers.end), shape, dtype)


def _chunked(name: str, value: Reader) -> Tensor:
    """An array in pieces: {_CHUNKED: true, "shape": {"0": …}, "chunks": {"0": …}} of the flat array."""
    value.file.require(value.map() == 3, f"{name} is not an array")
    _expect(value, _CHUNKED)
    value.boolean()
    _expect(value, "shape")
    shape = _shape(value.file, name, _members(value, value.integer))
    _expect(value, "chunks")
    chunks = list(_members(value, lambda: _ndarray(name, value)))
    consists_of_them = (
        len(chunks) > 0
        and all(len(chunk.shape) == 1 and chunk.dtype == chunks[0].dtype for chunk in chunks)
        and sum(chunk.size for chunk in chunks) == math.prod(shape)
    )
    value.file.require(consists_of_them, f"{name} does not consist of its pieces")
    return Tensor(shape, chunks[0].dtype, lambda: mx.concatenate([chunk.load() for chunk in chunks]).reshape(shape))


def _members(value: Reader, member: Callable[[], _Member]) -> Iterator[_Member]:
    """The members of a tuple, which Flax writes as a map with the keys "0", "1", …; `member` reads the next one."""
    count = value.map()
    value.file.require(count <= _MOST_CHUNKS, f"it has an array of {count:,} pieces")
    for index in range(count):
        _expect(value, str(index))
        yield member()


def _expect(value: Reader, key: str) -> None:
    found = value.text()
    value.file.require(found == key, f"{key} was expected before byte {value.position:,}, not {quoted(found)}")


def _shape(file: MappedFile, name: str, lengths: Iterator[int]) -> tuple[int, ...]:
    """A shape out of its lengths, of which no more are read than an array can have."""
    shape = tuple(itertools.islice(lengths, MOST_AXES + 1))
    file.require(is_possible_shape(shape), f"{name} has an impossible shape")
    return shape
