"""The safetensors format: a length, a JSON header, and the tensors' bytes one after another."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from .mapped import MappedFile
from .tensor import Tensor, read_strided, row_major
from .untrusted import LONGEST_JSON, parse_json, quoted

_DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F64": mx.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, still in the file.

    Raises:
        CheckpointError: the file is truncated or damaged, or has a dtype that MLX does not know.
    """
    file = MappedFile(path)
    if file.size < 8:
        raise file.damaged("it has no header")
    (header_length,) = struct.unpack("<Q", file.view(0, 8))
    if header_length > min(LONGEST_JSON, file.size - 8):
        raise file.damaged(f"its header would have {header_length:,} bytes")
    header = parse_json(bytes(file.view(8, header_length)), f"{path}: header")
    metadata = header.pop("__metadata__", None)  # MLX writes null when there is none
    if metadata is not None and not _is_text(metadata):
        raise file.damaged("its metadata are not text")

    data_start = 8 + header_length
    tensors, spans = {}, []
    for name, entry in header.items():
        shape, dtype, begin, end = _entry(file, name, entry)
        spans.append((begin, end))
        tensors[name] = _tensor(file, data_start + begin, shape, dtype)

    position = 0  # the format has neither holes nor overlaps, and nothing after the last tensor
    for begin, end in sorted(spans):
        if begin != position:
            raise file.damaged("its tensors overlap or leave holes")
        position = end
    if data_start + position != file.size:
        raise file.damaged(f"its header describes {data_start + position:,} bytes, the file has {file.size:,}")
    return tensors


def _is_text(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _entry(file: MappedFile, name: str, entry: object) -> tuple[tuple[int, ...], mx.Dtype, int, int]:
    """A header entry as shape, dtype, first byte and end."""
    match entry:
        case {"dtype": str(dtype_name), "shape": list(shape), "data_offsets": [begin, end]} if all(
            type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)
        ):
            pass
        case _:
            raise file.damaged(f"the header entry of {quoted(name)} is malformed")
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise CheckpointError(f"{file.path}: {quoted(name)} has dtype {quoted(dtype_name)}, which is not supported")
    if end - begin != math.prod(shape) * dtype.size or len(shape) > 8 or max(shape, default=0) >= 2**31:
        raise file.damaged(f"{quoted(name)} does not fill its place in the file")
    return tuple(shape), dtype, begin, end


def _tensor(file: MappedFile, start: int, shape: tuple[int, ...], dtype: mx.Dtype) -> Tensor:
    return Tensor(shape, dtype, lambda: read_strided(file, start, shape, row_major(shape), dtype))


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    written: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Write tensors one at a time: the header comes first, from shapes and dtypes alone.

    `written(name, nbytes)` is called after each tensor. Raises OSError when the disk does.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            array = tensor.read()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(f"{name}: announced {tensor.shape} {tensor.dtype}, got {array.shape} {array.dtype}")
            if tensor.size:
                file.write(memoryview(array.reshape(-1).view(mx.uint8)))
            written(name, tensor.nbytes)
            del array
            mx.clear_cache()
