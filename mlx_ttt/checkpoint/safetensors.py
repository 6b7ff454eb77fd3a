"""The safetensors format: the header's length, the header in JSON, then the bytes of one tensor after another."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from .mapped import MappedFile
from .tensor import Tensor, contiguous, is_length
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
    """The tensors of a safetensors file, by name. Their values stay in the file.

    Raises:
        CheckpointError: the file is truncated or damaged, or has a dtype that MLX does not know.
    """
    file = MappedFile(path)
    file.require(file.size >= 8, "it has no header")
    (header_length,) = struct.unpack("<Q", file.view(0, 8))
    fits = header_length <= min(LONGEST_JSON, file.size - 8)
    file.require(fits, f"its header would have {header_length:,} bytes")
    header = parse_json(bytes(file.view(8, header_length)), f"{path}: header")
    metadata = header.pop("__metadata__", None)  # MLX writes null when it has no metadata
    file.require(metadata is None or _is_text(metadata), "its metadata are not text")

    position = 8 + header_length
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _tensor(file, position, name, entry)
        spans.append(span)
    for begin, end in sorted(spans):  # the format allows no holes, no overlaps, and nothing after the last tensor
        file.require(begin == position, "its tensors overlap or leave holes")
        position = end
    file.require(position == file.size, f"its header describes {position:,} bytes, the file has {file.size:,}")
    return tensors


def _is_text(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _tensor(file: MappedFile, data_start: int, name: str, entry: object) -> tuple[Tensor, tuple[int, int]]:
    """The tensor that an entry of the header describes, and the positions of its first byte and behind its last one."""
    match entry:
        case {"dtype": str(dtype_name), "shape": list(shape), "data_offsets": [begin, end]} if all(
            map(is_length, (*shape, begin, end))
        ):
            if (dtype := _DTYPES.get(dtype_name)) is None:
                what = f"{quoted(name)} has dtype {quoted(dtype_name)}"
                raise CheckpointError(f"{file.path}: {what}, which is not supported")
            span = data_start + begin, data_start + end
            return contiguous(file, quoted(name), span, tuple(shape), dtype), span
    raise file.damaged(f"the header entry of {quoted(name)} is malformed")


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    written: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Write a safetensors file with one tensor in memory at a time: the header needs only shapes and dtypes.

    Args:
        written: called after each tensor with its name and its size in bytes.

    Raises:
        CheckpointError: a tensor cannot be loaded from where it comes from.
        OSError: the file cannot be written.
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
            array = tensor.load()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(f"{name}: announced {tensor.shape} {tensor.dtype}, got {array.shape} {array.dtype}")
            if tensor.size:
                file.write(memoryview(array.reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]  # it has a buffer
            written(name, tensor.nbytes)
            del array
            mx.clear_cache()
