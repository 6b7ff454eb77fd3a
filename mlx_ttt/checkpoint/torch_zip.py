"""Reads PyTorch's zip format (torch.save since 1.6), without PyTorch.

An archive holds `NAME/data.pkl`, a pickle in which tensors are views (offset, shape, strides) of storages, and for each
storage a record `NAME/data/KEY` with its bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeGuard

import mlx.core as mx

from ..errors import CheckpointError
from .mapped import MappedFile
from .tensor import Tensor, extent, is_length, is_possible_shape, read_strided
from .torch_pickle import StorageId, read_pickle
from .untrusted import quoted
from .zip_records import zip_records

_LARGEST_PICKLE = 32 << 20  # bytes
# What torch.save before 1.6 wrote first: a pickled magic number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_torch_zip(path: Path) -> object:
    """The value that torch.save wrote, with a `Tensor` in place of each tensor.

    No code in the file is executed: see `torch_pickle`.

    Raises:
        CheckpointError: the file is in the format before PyTorch 1.6, truncated, damaged, or holds other objects than
            tensors and plain containers.
    """
    file = MappedFile(path)
    _refuse_legacy(file)
    archive = _Archive(file)
    return read_pickle(archive.content("data.pkl", _LARGEST_PICKLE), str(path), archive.tensor)


def _refuse_legacy(file: MappedFile) -> None:
    start = bytes(file.view(0, min(file.size, 512)))
    is_tar = start[257:262] == b"ustar"
    if start.startswith(_LEGACY) or is_tar:
        raise CheckpointError(
            f"{file.path}: written in the format of PyTorch before 1.6; re-save it with a newer one:"
            " torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    if not start.startswith(b"PK"):
        raise CheckpointError(f"{file.path}: neither a PyTorch zip archive nor a safetensors file nor a JAX stream")


class _Archive:
    """The records of a PyTorch archive: its pickle, and storages that tensors are views of."""

    def __init__(self, file: MappedFile):
        self.file, self.records = file, zip_records(file)
        pickles = [name for name in self.records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointError(f"{file.path}: a zip file, but not of torch.save (it has no data.pkl)")
        self.root = pickles[0].removesuffix("data.pkl")
        if f"{self.root}constants.pkl" in self.records:
            raise CheckpointError(
                f"{file.path}: a TorchScript archive; save the weights instead:"
                " torch.save(torch.jit.load(FILE).state_dict(), OTHER_FILE)"
            )
        if f"{self.root}byteorder" in self.records and self.content("byteorder", 16) != b"little":
            raise CheckpointError(f"{file.path}: written on a big-endian machine, which is not supported")

    def content(self, name: str, longest: int) -> bytes:
        """The content of a record of at most `longest` bytes, by its name without the archive's own."""
        return self.records[self.root + name].content(longest)

    def tensor(self, storage: StorageId, dtype: mx.Dtype, offset: object, shape: object, strides: object) -> Tensor:
        """A view of a storage. Offset, shape and strides come from the pickle, and are checked here.

        Raises:
            CheckpointError: they are not numbers, or an element lies outside of the storage.
        """
        key = quoted(storage.key)
        if (record := self.records.get(f"{self.root}data/{storage.key}")) is None:
            raise self.file.damaged(f"storage {key} is missing")
        start = record.start()
        is_whole = record.size == storage.size * storage.dtype.size
        self.file.require(is_whole, f"storage {key} has {record.size:,} bytes, not what its tensors need")
        if not (
            is_length(offset)
            and _are_lengths(shape)
            and _are_lengths(strides)
            and len(shape) == len(strides)
            and is_possible_shape(shape)
        ):
            raise self.file.damaged(f"a tensor of storage {key} has an impossible shape")
        # The stride of an axis of length 1 is never used: it may have any value.
        strides = tuple(stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
        is_inside = not math.prod(shape) or (offset + extent(shape, strides)) * dtype.size <= record.size
        self.file.require(is_inside, f"a tensor reaches beyond storage {key}")

        def load() -> mx.array:
            record.verify()
            return read_strided(self.file, start + offset * dtype.size, shape, strides, dtype)

        return Tensor(shape, dtype, load)


def _are_lengths(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(map(is_length, value))
