"""The streams that the official JAX implementation saves, read without JAX.

A stream is a series of MessagePack pairs: the path of a value, as a list of names, and the bytes that Flax makes of it.
`streaming_train_state` holds all of a training run, with the model's parameters under params/params;
`streaming_params` holds the parameters alone, under their bare paths. Sources: StreamingCheckpointer in the official
code, and flax.serialization.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from .jax_names import official_parameter
from .mapped import MappedFile
from .msgpack import Reader
from .tensor import Tensor, read_strided, row_major
from .untrusted import quoted

_OFFICIAL_FILE = re.compile(r"streaming_(?:train_state|params)(?:_[0-9]+)?")  # a milestone's has its step at the end
_START = re.compile(rb"\x92[\x91-\x9f][\xa0-\xbf\xd9]")  # a pair, a list, text
_PREFIX = "params/params/"  # of the parameters in a train state
_NDARRAY = 1  # Flax's extension type
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32, "float64": mx.float64}
# Far above every stream there is; the 1.3B model's has about 1 600 records.
_MOST_RECORDS, _LONGEST_PATH, _MOST_AXES, _MOST_CHUNKS = 100_000, 32, 8, 4096
_OTHERS = {b"\x80": "a pickle", b"PK": "a zip archive", b"version https://git-lfs": "a Git LFS pointer"}


def has_stream_name(name: str) -> bool:
    """Whether the official code gives a stream this name."""
    return bool(_OFFICIAL_FILE.fullmatch(name))


def starts_like_stream(start: bytes) -> bool:
    """Whether a file with these first bytes is a stream, if it is anything that a checkpoint consists of."""
    return bool(_START.match(start))


def read_jax_stream(path: Path) -> dict[str, Tensor]:
    """The parameters in a stream, in PyTorch's official names and order of axes, still in the file.

    What else a train state holds, mostly the optimizer's moments, is passed over unread.

    Raises:
        CheckpointError: the file is no stream, is truncated or damaged, or holds a parameter that no TTT model has.
    """
    file = MappedFile(path)
    _refuse_others(file)
    records = _parameters(file)
    unknown = [name for name in records if official_parameter(name) is None]
    if unknown:
        more = f", nor are {len(unknown) - 1} other names" if len(unknown) > 1 else ""
        raise CheckpointError(f"{path}: {quoted(unknown[0])} is not the name of a TTT model's parameter{more}")
    tensors = {}
    for jax_name, value in records.items():
        tensor, (name, axes) = _tensor(jax_name, value), official_parameter(jax_name)
        if axes and len(tensor.shape) != len(axes):
            raise CheckpointError(f"{path}: {jax_name} has shape {tensor.shape}, expected {len(axes)} axes")
        tensors[name] = tensor.transposed(axes) if axes else tensor
    file.forget(0, file.size)
    return tensors


def _parameters(file: MappedFile) -> dict[str, Reader]:
    """The model's parameters by path, `model/h/0/seq_norm/kernel`: a reader of each one's value."""
    records: dict[str, Reader] = {}
    stream = Reader(file, 0, file.size)
    while stream.kind() != "nothing":
        name, value = _record(stream)
        if name in records:
            raise CheckpointError(f"{file.path}: {quoted(name)} is in it twice")
        if len(records) == _MOST_RECORDS:
            raise file.damaged(f"it has more than {_MOST_RECORDS:,} records")
        records[name] = value
    own = {name.removeprefix(_PREFIX): value for name, value in records.items() if name.startswith(_PREFIX)}
    return own or records


def _refuse_others(file: MappedFile) -> None:
    start = bytes(file.view(0, min(file.size, 32)))
    if not starts_like_stream(start):
        found = next((kind for magic, kind in _OTHERS.items() if start.startswith(magic)), "something else")
        raise CheckpointError(f"{file.path}: named like a JAX stream, but is {found}; download or export it again")


def _record(stream: Reader) -> tuple[str, Reader]:
    """One pair: the path, its names joined (some contain slashes themselves), and a reader of the value."""
    if stream.array() != 2:
        raise stream.file.damaged(f"a pair was expected before byte {stream.position:,}")
    if not 0 < (length := stream.array()) <= _LONGEST_PATH:
        raise stream.file.damaged(f"it has a path of {length:,} names")
    return "/".join(stream.text() for _ in range(length)), stream.binary()


def _tensor(name: str, value: Reader) -> Tensor:
    """What Flax writes for an array: an extension, or if it is above 1 GiB, a map with pieces of it."""
    tensor = _chunked(name, value) if value.kind() == "map" else _ndarray(name, value)
    value.finish()
    return tensor


def _ndarray(name: str, value: Reader) -> Tensor:
    """(shape, dtype's name, numbers in C order), in MessagePack again."""
    array = value.extension(_NDARRAY)
    if array.array() != 3:
        raise value.file.damaged(f"{name} is not an array")
    shape = _shape(value.file, name, (array.integer() for _ in range(array.array())))
    dtype_name, numbers = array.text(), array.binary()
    file, start = numbers.file, numbers.position
    array.finish()
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise CheckpointError(f"{file.path}: {name} has dtype {quoted(dtype_name)}, which no weights have")
    if numbers.end - start != math.prod(shape) * dtype.size:
        raise file.damaged(f"{name} does not fill its place in the file")
    return Tensor(shape, dtype, lambda: read_strided(file, start, shape, row_major(shape), dtype))


def _chunked(name: str, value: Reader) -> Tensor:
    """{_CHUNKED: true, "shape": {"0": …}, "chunks": {"0": …}}: consecutive pieces of the flat array."""
    if value.map() != 3:
        raise value.file.damaged(f"{name} is not an array")
    _expect(value, _CHUNKED)
    value.boolean()
    _expect(value, "shape")
    shape = _shape(value.file, name, _members(value, value.integer))
    _expect(value, "chunks")
    chunks = list(_members(value, lambda: _ndarray(name, value)))
    if (
        not chunks
        or any(len(chunk.shape) != 1 or chunk.dtype != chunks[0].dtype for chunk in chunks)
        or sum(chunk.size for chunk in chunks) != math.prod(shape)
    ):
        raise value.file.damaged(f"{name} does not consist of its pieces")
    return Tensor(shape, chunks[0].dtype, lambda: mx.concatenate([chunk.read() for chunk in chunks]).reshape(shape))


def _members(value: Reader, read: Callable[[], object]) -> Iterator[object]:
    """A tuple as Flax writes it: a map with the keys "0", "1", …"""
    count = value.map()
    if count > _MOST_CHUNKS:
        raise value.file.damaged(f"it has an array of {count:,} pieces")
    for index in range(count):
        _expect(value, str(index))
        yield read()


def _expect(value: Reader, key: str) -> None:
    if (found := value.text()) != key:
        raise value.file.damaged(f"{key} was expected before byte {value.position:,}, not {quoted(found)}")


def _shape(file: MappedFile, name: str, lengths: Iterator[int]) -> tuple[int, ...]:
    """A shape, of which no more is read than an array can have."""
    shape = tuple(itertools.islice(lengths, _MOST_AXES + 1))
    if len(shape) > _MOST_AXES or max(shape, default=0) >= 2**31:
        raise file.damaged(f"{name} has an impossible shape")
    return shape
