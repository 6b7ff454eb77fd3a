"""PyTorch archives: every layout of a tensor in a storage, and every way to be damaged."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.checkpoint.mapped import MappedFile
from mlx_ttt.checkpoint.names import state_dict
from mlx_ttt.checkpoint.torch_zip import read_torch_zip
from mlx_ttt.errors import CheckpointError

from .torch_format import STORAGES, Raw, Storage, View, bfloat16, storage_of, tensor, write_torch


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pt"


def as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (7,), (3, 5), (2, 3, 1, 5)])
def test_dtypes_and_shapes(file, dtype, shape):
    expected = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    write_torch(file, {"x": tensor(expected)})
    found = read_torch_zip(file)["x"]
    array = found.load()
    assert found.shape == array.shape == shape and found.dtype == array.dtype
    assert str(array.dtype) in (f"mlx.core.{dtype}", f"mlx.core.{dtype}_")
    np.testing.assert_array_equal(np.array(array), expected)


def test_bfloat16(file):
    values = np.array([[1.5, -2.25, 3e38], [0.0, -0.0, 2**-130]], np.float32)
    write_torch(file, {"x": bfloat16(values)})
    array = read_torch_zip(file)["x"].load()
    assert array.dtype == mx.bfloat16
    np.testing.assert_array_equal(as_numpy(array).view(np.uint32), values.view(np.uint32) & 0xFFFF0000)


@pytest.mark.parametrize(
    "shape, strides, offset",
    [
        ((3, 4), (4, 1), 5),  # a slice of rows
        ((4, 3), (1, 4), 0),  # transposed
        ((3, 2, 2), (1, 3, 6), 2),
        ((3, 4), (0, 1), 3),  # expanded
        ((5, 1), (2, 2**62), 1),  # the stride of an axis of length 1 means nothing
        ((3, 3), (1, 1), 0),  # overlapping
        ((), (), 23),
        ((0, 3), (7, 7), 24),
    ],
)
def test_strided_views(file, shape, strides, offset):
    values = np.arange(24, dtype=np.float32)
    write_torch(file, {"x": View(storage_of(values), shape, strides, offset)})
    expected = np.zeros(shape, np.float32)
    for index in np.ndindex(*shape):
        expected[index] = values[offset + sum(i * s for i, s in zip(index, strides, strict=True))]
    np.testing.assert_array_equal(np.array(read_torch_zip(file)["x"].load()), expected)


def test_views_of_one_storage(file):
    storage = storage_of(np.arange(6, dtype=np.float32))
    write_torch(file, {"a": View(storage, (2, 3), (3, 1)), "b": View(storage, (3, 2), (1, 3))})
    tensors = read_torch_zip(file)
    np.testing.assert_array_equal(np.array(tensors["a"].load()), np.array(tensors["b"].load()).T)


@pytest.mark.parametrize(
    "shape, strides, offset",
    [
        ((25,), (1,), 0),
        ((24,), (1,), 1),
        ((2, 12), (13, 1), 0),
        ((2,), (2**62,), 0),
        ((2**31,), (0,), 0),
        ((2**70,), (0,), 0),
        ((2,), (-1,), 5),
        ((-2,), (1,), 0),
        ((2,), (1,), -1),
        ((2, 2), (1,), 0),
        ((True,), (1,), 0),
        ((1.0,), (1,), 0),
        ((1,) * 9, (1,) * 9, 0),
        ([2], (1,), 0),
        (None, (1,), 0),
    ],
)
def test_impossible_views(file, shape, strides, offset):
    write_torch(file, {"x": View(storage_of(np.arange(24, dtype=np.float32)), shape, strides, offset)})
    with pytest.raises(CheckpointError, match=r"beyond storage|impossible shape"):
        read_torch_zip(file)


def test_zip64(file, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 16)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    values = np.arange(100, dtype=np.float32)
    write_torch(file, {"x": tensor(values)})
    assert b"PK\6\6" in file.read_bytes() and b"PK\6\7" in file.read_bytes()
    np.testing.assert_array_equal(np.array(read_torch_zip(file)["x"].load()), values)


def test_values_beside_the_weights(file):
    value = {"model": {"w": tensor(np.ones(2))}, "step": 3, "lr": 0.5, "names": ["a", None], "best": (1, True), 5: {}}
    write_torch(file, value)
    found = read_torch_zip(file)
    assert found["step"] == 3 and found["lr"] == 0.5 and found["names"] == ["a", None] and found["best"] == (1, True)
    assert state_dict(found, "here").keys() == {"w"}


def flip(file, position, mask=1):
    data = bytearray(file.read_bytes())
    data[position] ^= mask
    file.write_bytes(data)


def test_flipped_bit_in_the_weights(file):
    write_torch(file, {"x": tensor(np.full(1000, 1.5, np.float32))})
    flip(file, file.read_bytes().index(np.full(1000, 1.5, np.float32).tobytes()) + 777)
    found = read_torch_zip(file)["x"]
    with pytest.raises(CheckpointError, match="data/0 does not match its checksum"):
        found.load()


def test_without_checksums(file):
    """torch.serialization.set_crc32_options(False) leaves zeros."""
    write_torch(file, {"x": tensor(np.ones(4, np.float32))})
    data = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            data = data.replace(struct.pack("<I", info.CRC), bytes(4))
    file.write_bytes(data)
    assert read_torch_zip(file)["x"].load().tolist() == [1, 1, 1, 1]


def test_truncated_anywhere(file):
    write_torch(file, {"x": tensor(np.ones(40, np.float32))})
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"truncated or damaged|empty|neither a PyTorch"):
            read_torch_zip(file)["x"].load()


def test_bytes_after_the_end(file):
    write_torch(file, {"x": tensor(np.ones(4))})
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="after its zip directory"):
        read_torch_zip(file)


@pytest.mark.parametrize("position", [0, 3, 30, 35])
def test_local_header_that_contradicts_the_directory(file, position):
    write_torch(file, {"x": tensor(np.ones(4))})
    flip(file, position)
    with pytest.raises(CheckpointError, match=r"header of record archive/data\.pkl is wrong|neither a PyTorch"):
        read_torch_zip(file)


def patch_directory(file, name: str, offset: int, values: bytes):
    """Overwrite bytes of a record's entry in the central directory, `offset` bytes from its start."""
    data = bytearray(file.read_bytes())
    at = data.rindex(f"archive/{name}".encode()) - 46 + offset
    data[at : at + len(values)] = values
    file.write_bytes(data)


def test_record_longer_than_the_file(file):
    """The directory and the pickle both say a million floats, but the file has four."""
    write_torch(file, {"x": View(Storage("FloatStorage", 10**6, [bytes(16)]), (10**6,), (1,))})
    patch_directory(file, "data/0", 20, struct.pack("<2I", 4 * 10**6, 4 * 10**6))
    with pytest.raises(CheckpointError, match="shorter than its own directory says"):
        read_torch_zip(file)


def test_record_outside_the_file(file):
    write_torch(file, {"x": tensor(np.ones(4))})
    patch_directory(file, "data/0", 42, struct.pack("<I", 10**6))
    with pytest.raises(CheckpointError, match="shorter than its own directory says"):
        read_torch_zip(file)


def test_view_of_a_mapped_file(file):
    file.write_bytes(b"0123456789")
    mapped = MappedFile(file)
    assert bytes(mapped.view(3, 4)) == b"3456" and bytes(mapped.view(10, 0)) == b""
    for start, length in ((0, 11), (10, 1), (11, 0), (-1, 2), (5, -1), (2**64, 1), (0, 2**64)):
        with pytest.raises(CheckpointError, match="shorter than"):
            mapped.view(start, length)


def test_bytes_between_directory_and_end(file):
    write_torch(file, {"x": tensor(np.ones(4))})
    data = file.read_bytes()
    file.write_bytes(data[:-22] + b"more" + data[-22:])
    with pytest.raises(CheckpointError, match="directory is not where it should be"):
        read_torch_zip(file)


def test_storage_of_another_size(file):
    write_torch(file, {"x": View(Storage("FloatStorage", 5, [bytes(16)]), (4,), (1,))})
    with pytest.raises(CheckpointError, match="storage 0 has 16 bytes"):
        read_torch_zip(file)


def test_missing_storage(file):
    raw = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x009X\3\0\0\0cpuK\1tQ"
    arguments = raw + b"K\0)))N"
    write_torch(file, {"x": Raw(b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR")})
    with pytest.raises(CheckpointError, match="storage 9 is missing"):
        read_torch_zip(file)


def test_compressed(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
    with pytest.raises(CheckpointError, match=r"archive/data\.pkl is compressed"):
        read_torch_zip(file)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_record(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(CheckpointError, match="occurs twice"):
        read_torch_zip(file)


def test_other_zip_files(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("letter.txt", b"hello")
    with pytest.raises(CheckpointError, match=r"not of torch\.save"):
        read_torch_zip(file)


def test_torchscript(file):
    write_torch(file, {"x": tensor(np.ones(4))}, extra={"constants.pkl": b"\x80\x02)."})
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_torch_zip(file)


def test_big_endian(file):
    write_torch(file, {"x": tensor(np.ones(4))}, extra={"byteorder": b"big"})
    with pytest.raises(CheckpointError, match="big-endian"):
        read_torch_zip(file)


def test_legacy_pickle(file):
    file.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    with pytest.raises(CheckpointError, match=r"before 1\.6; re-save it .*torch\.save\(torch\.load"):
        read_torch_zip(file)


def test_legacy_tar(file):
    with tarfile.open(file, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(CheckpointError, match=r"before 1\.6"):
        read_torch_zip(file)


@pytest.mark.parametrize("content", [b"hello, this is not a checkpoint", b"\x80\x02}.", bytes(100)])
def test_other_files(file, content):
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="neither a PyTorch zip archive nor a safetensors file"):
        read_torch_zip(file)


def test_empty_and_absent(file):
    with pytest.raises(CheckpointError, match="no such file"):
        read_torch_zip(file)
    file.touch()
    with pytest.raises(CheckpointError, match="empty"):
        read_torch_zip(file)


class TestAgainstTorch:
    """Files that PyTorch itself writes; skipped where it is not installed."""

    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_training_checkpoint(self, torch, file, protocol):
        model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 5))
        model[2].weight = torch.nn.Parameter(model[0].weight.detach().T)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(4, 5)).sum().backward()
        optimizer.step()
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "blob": b"\0\xff",
                "tags": {"a", "b"},
                "size": torch.Size([2, 3]),
                "dtype": torch.bfloat16,
                "device": torch.device("cpu"),
                "parameter": torch.nn.Parameter(torch.ones(2)),
            },
            file,
            pickle_protocol=protocol,
        )
        found = state_dict(read_torch_zip(file), "here")
        assert found.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(np.array(found[name].load()), value.numpy())

    def test_views_and_dtypes(self, torch, file):
        base = torch.arange(60, dtype=torch.float32)
        values = {
            "transposed": base.reshape(5, 12).T,
            "sliced": base.reshape(5, 12)[1:4, 2:9:3],
            "expanded": base[:4, None].expand(4, 3),
            "permuted": base.reshape(3, 4, 5).permute(2, 0, 1),
            "scalar": base[7],
            "nothing": base[:0],
        }
        values |= {str(dtype): base.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)}
        values |= {str(dtype): base.to(dtype) for dtype in (torch.int8, torch.uint8, torch.int16, torch.int64)}
        values |= {str(dtype): base.to(dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool)}
        torch.save(values, file)
        found = read_torch_zip(file)
        for name, value in values.items():
            array = found[name].load()
            assert str(array.dtype).removeprefix("mlx.core.").rstrip("_") == str(value.dtype).removeprefix("torch.")
            expected = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
            np.testing.assert_array_equal(as_numpy(array), expected)

    @pytest.mark.parametrize("name", ["complex", "sparse", "quantized", "module", "namespace", "numpy"])
    def test_refused_by_name(self, torch, file, name):
        import argparse

        value, message = {
            "complex": lambda: (torch.ones(2, dtype=torch.complex64), "ComplexFloatStorage"),
            "sparse": lambda: (torch.eye(3).to_sparse(), "_get_layout|_rebuild_sparse_tensor"),
            "quantized": lambda: (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
            "module": lambda: (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
            "namespace": lambda: (argparse.Namespace(lr=1), r"argparse\.Namespace"),
            "numpy": lambda: (np.float64(1.5), r"numpy.*scalar"),
        }[name]()
        torch.save({"model": {"w": torch.ones(2)}, "x": value}, file)
        with pytest.raises(CheckpointError, match=message):
            read_torch_zip(file)

    def test_legacy_format(self, torch, file):
        torch.save({"x": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match=r"before 1\.6"):
            read_torch_zip(file)

    def test_without_checksums(self, torch, file):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"x": torch.ones(2)}, file)
        finally:
            torch.serialization.set_crc32_options(True)
        assert read_torch_zip(file)["x"].load().tolist() == [1, 1]

    def test_our_writer_is_torchs_format(self, torch, file):
        values = np.arange(12, dtype=np.float32)
        write_torch(file, {"x": View(storage_of(values), (4, 3), (1, 4)), "y": bfloat16(values)})
        loaded = torch.load(file, weights_only=True)
        np.testing.assert_array_equal(loaded["x"].numpy(), values.reshape(3, 4).T)
        assert loaded["y"].dtype == torch.bfloat16
