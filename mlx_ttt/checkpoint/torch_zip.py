"""PyTorch's zip format (torch.save since 1.6), read without PyTorch.

An archive holds `NAME/data.pkl`, a pickle in which tensors are views (offset, shape, strides) of storages, and each
storage's bytes as a record `NAME/data/KEY`.
"""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from .mapped import MappedFile
from .tensor import Tensor, extent, read_strided
from .torch_pickle import StorageId, read_pickle
from .untrusted import quoted
from .zip_records import ZipRecords

_LARGEST_PICKLE = 32 << 20  # bytes
_MOST_AXES = 8
# The first bytes of torch.save before 1.6: a pickled magic number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_torch_zip(path: Path) -> object:
    """The value that torch.save wrote, with a `Tensor` in place of each tensor.

    Nothing that the file says is executed: see `torch_pickle`.

    Raises:
        CheckpointError: the file is in the format before PyTorch 1.6, truncated, damaged, or holds other objects than
            tensors and plain containers.
    """
    file = MappedFile(path)
    _refuse_legacy(file)
    archive = _Archive(ZipRecords(file))
    return read_pickle(archive.pickle(), str(path), archive.tensor)


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
    """The records of a PyTorch archive, and tensors as views of them."""

    def __init__(self, records: ZipRecords):
        self.records, self.file = records, records.file
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointError(f"{self.file.path}: a zip file, but not of torch.save (it has no data.pkl)")
        self.root = pickles[0].removesuffix("data.pkl")
        if f"{self.root}constants.pkl" in records:
            raise CheckpointError(
                f"{self.file.path}: a TorchScript archive; save the weights instead:"
                " torch.save(torch.jit.load(FILE).state_dict(), OTHER_FILE)"
            )
        if f"{self.root}byteorder" in records and records.read(f"{self.root}byteorder", 16) != b"little":
            raise CheckpointError(f"{self.file.path}: written on a big-endian machine, which is not supported")

    def pickle(self) -> bytes:
        return self.records.read(f"{self.root}data.pkl", _LARGEST_PICKLE)

    def tensor(self, storage: StorageId, dtype: mx.Dtype, offset: object, shape: object, strides: object) -> Tensor:
        """A view of a storage, its numbers checked: every element lies inside."""
        record, start, nbytes = self._storage(storage)
        numbers = (offset, *shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else ()
        if not (
            numbers
            and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
            and len(shape) == len(strides) <= _MOST_AXES
            and max(shape, default=0) < 2**31
        ):
            raise self.file.damaged(f"a tensor of storage {quoted(storage.key)} has an impossible shape")
        # An axis of length 1 may have any stride: it is never taken.
        strides = tuple(stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and (offset + extent(shape, strides)) * dtype.size > nbytes:
            raise self.file.damaged(f"a tensor reaches beyond storage {quoted(storage.key)}")

        def read() -> mx.array:
            self.records.verify(record)
            return read_strided(self.file, start + offset * dtype.size, shape, strides, dtype)

        return Tensor(shape, dtype, read)

    def _storage(self, storage: StorageId) -> tuple[str, int, int]:
        """A storage's record, the position of its first byte, and its size in bytes."""
        record = f"{self.root}data/{storage.key}"
        if record not in self.records:
            raise self.file.damaged(f"storage {quoted(storage.key)} is missing")
        start, nbytes = self.records.locate(record)
        if nbytes != storage.size * storage.dtype.size:
            raise self.file.damaged(f"storage {quoted(storage.key)} has {nbytes:,} bytes, not what its tensors need")
        return record, start, nbytes
