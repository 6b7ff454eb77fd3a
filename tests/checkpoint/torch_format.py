"""A writer of PyTorch's zip format without PyTorch: for tests of hostile and unusual files, and for benchmarks."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STORAGES = {
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes of an archive. `kind` is PyTorch's storage class; `size` counts elements."""

    kind: str
    size: int
    chunks: Iterable[bytes]


@dataclass(frozen=True)
class View:
    """A tensor: a strided view of a storage, strides in elements."""

    storage: Storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Raw:
    """Pickle instructions to insert unchanged."""

    code: bytes


def storage_of(array: np.ndarray) -> Storage:
    flat = np.ascontiguousarray(array).reshape(-1)
    return Storage(STORAGES[flat.dtype.name], flat.size, [flat.tobytes()])


def tensor(array: np.ndarray) -> View:
    """An array as torch.save writes a contiguous tensor that owns its storage."""
    array = np.asarray(array)
    strides = tuple(stride // array.itemsize for stride in np.ascontiguousarray(array).strides)
    return View(storage_of(array), array.shape, strides if array.ndim else ())


def bfloat16(array: np.ndarray) -> View:
    """A float32 array truncated to bfloat16."""
    bits = (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype("<u2")
    row_major = tensor(np.zeros(array.shape, np.uint8)).strides
    return View(Storage("BFloat16Storage", bits.size, [bits.tobytes()]), array.shape, row_major)


class Assembler:
    """Turns values into pickle instructions, protocol 2, and collects the storages."""

    def __init__(self):
        self.storages: list[Storage] = []

    def pickle(self, value: object) -> bytes:
        return b"\x80\x02" + self.code(value) + b"."

    def code(self, value: object) -> bytes:
        match value:
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int():
                size = value.bit_length() // 8 + 1
                return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                encoded = value.encode()
                return b"X" + struct.pack("<I", len(encoded)) + encoded
            case tuple():
                return b"(" + b"".join(map(self.code, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self.code, value)) + b"e"
            case dict():
                return b"}(" + b"".join(self.code(k) + self.code(v) for k, v in value.items()) + b"u"
            case Raw():
                return value.code
            case View():
                return b"ctorch._utils\n_rebuild_tensor_v2\n" + self.code(self._arguments(value)) + b"R"
            case Storage():
                return self._persistent_id(value)
        raise TypeError(type(value))

    def _arguments(self, view: View) -> tuple:
        hooks = Raw(b"ccollections\nOrderedDict\n)R")
        return (view.storage, view.offset, view.shape, view.strides, False, hooks)

    def _persistent_id(self, storage: Storage) -> bytes:
        if storage not in self.storages:
            self.storages.append(storage)
        key = str(self.storages.index(storage))
        kind = Raw(f"ctorch\n{storage.kind}\n".encode())
        return self.code(("storage", kind, key, "cpu", storage.size)) + b"Q"


def write_torch(path: Path, value: object, extra: dict[str, bytes] | None = None, root: str = "archive") -> Path:
    """What torch.save(value, path) writes. `extra` adds records, or replaces those of the same name."""
    assembler = Assembler()
    records: dict[str, Iterable[bytes]] = {"data.pkl": [assembler.pickle(value)], "byteorder": [b"little"]}
    records |= {f"data/{key}": storage.chunks for key, storage in enumerate(assembler.storages)}
    records |= {"version": [b"3\n"]} | {name: [data] for name, data in (extra or {}).items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, chunks in records.items():
            with archive.open(f"{root}/{name}", "w", force_zip64=True) as record:
                for chunk in chunks:
                    record.write(chunk)
    return path
