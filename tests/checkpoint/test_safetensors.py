"""Reading and writing safetensors, against MLX's own reader and writer."""

from __future__ import annotations

import json
import struct

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.checkpoint.safetensors import read_safetensors, write_safetensors
from mlx_ttt.checkpoint.tensor import Tensor
from mlx_ttt.errors import CheckpointError

DTYPES = [mx.float16, mx.bfloat16, mx.float32, mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32]
DTYPES += [mx.int64, mx.uint64, mx.bool_]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def arrays() -> dict[str, mx.array]:
    shapes = [(), (1,), (3, 5), (0, 4), (2, 3, 7)]
    return {f"{d}.{s}": mx.random.randint(0, 100, s).astype(d) for d in DTYPES for s in shapes}


def assert_same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert mx.array_equal(found[name], array).item(), name


def test_read(file):
    expected = arrays()
    mx.save_safetensors(str(file), expected, {"format": "pt"})
    tensors = read_safetensors(file)
    for name, array in expected.items():
        assert tensors[name].shape == array.shape and tensors[name].dtype == array.dtype
        assert tensors[name].nbytes == array.nbytes
    assert_same({name: tensor.load() for name, tensor in tensors.items()}, expected)


def test_float64(file):
    values = np.array([1.5, 1e300, -2.0])
    header = json.dumps({"x": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    with mx.stream(mx.cpu):
        tensor = read_safetensors(file)["x"]
        assert tensor.dtype == mx.float64
        np.testing.assert_array_equal(np.array(tensor.load()), values)


def test_write(file):
    expected = arrays()
    written = []
    tensors = {n: Tensor(a.shape, a.dtype, lambda a=a: a) for n, a in expected.items()}
    write_safetensors(file, tensors, {"format": "mlx"}, lambda name, nbytes: written.append((name, nbytes)))
    found, metadata = mx.load(str(file), return_metadata=True)
    assert_same(found, expected)
    assert metadata == {"format": "mlx"}
    assert written == [(name, array.nbytes) for name, array in expected.items()]
    assert_same({name: tensor.load() for name, tensor in read_safetensors(file).items()}, expected)


@pytest.mark.parametrize("length", range(1, 9))
def test_data_are_aligned(file, length):
    write_safetensors(file, {"x" * length: Tensor((2,), mx.float32, lambda: mx.ones((2,)))}, {})
    (header_length,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert header_length % 8 == 0 and file.stat().st_size == 8 + header_length + 8


def test_write_of_a_view(file):
    array = mx.arange(24).reshape(2, 3, 4).swapaxes(1, 2)
    write_safetensors(file, {"x": Tensor((2, 4, 3), mx.int32, lambda: array)}, {})
    assert_same(mx.load(str(file)), {"x": array})


def test_write_reads_one_tensor_at_a_time(file):
    events = []

    def tensor(name):
        def load():
            events.append(f"read {name}")
            return mx.zeros((2,))

        return Tensor((2,), mx.float32, load)

    write_safetensors(file, {n: tensor(n) for n in "ab"}, {}, lambda name, _: events.append(f"wrote {name}"))
    assert events == ["read a", "wrote a", "read b", "wrote b"]


@pytest.mark.parametrize("array", [mx.zeros((3,)), mx.zeros((2,), mx.float16)])
def test_write_of_another_tensor_than_announced(file, array):
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(file, {"x": Tensor((2,), mx.float32, lambda: array)}, {})


X = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write_raw(file, header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header, message",
    [
        ({"x": X | {"shape": [2, 3]}}, "does not fill its place"),
        ({"x": X | {"dtype": "F16"}}, "does not fill its place"),
        ({"x": X | {"dtype": "F8_E4M3"}}, "x has dtype F8_E4M3"),
        ({"x": X | {"dtype": 4}}, "malformed"),
        ({"x": X | {"shape": [-2, -2]}}, "malformed"),
        ({"x": X | {"shape": [2.0, 2]}}, "malformed"),
        ({"x": X | {"shape": [True, 4]}}, "malformed"),
        ({"x": X | {"shape": "22"}}, "malformed"),
        ({"x": X | {"shape": [1] * 9, "data_offsets": [0, 4]}}, "does not fill"),
        ({"x": X | {"shape": [0, 2**40], "data_offsets": [0, 0]}}, "does not fill"),
        ({"x": X | {"data_offsets": [16, 0]}}, "does not fill"),
        ({"x": X | {"data_offsets": [0]}}, "malformed"),
        ({"x": X | {"data_offsets": [-16, 0]}}, "malformed"),
        ({"x": X | {"data_offsets": [4, 20]}}, "overlap or leave holes"),
        ({"x": X | {"shape": [2], "data_offsets": [0, 8]}}, "describes .* bytes, the file has"),
        ({"x": X, "y": X}, "overlap or leave holes"),
        ({"x": X, "__metadata__": {"a": 1}}, "metadata are not text"),
        ({"x": X, "__metadata__": "pt"}, "metadata are not text"),
        ({"x": X, "__metadata__": 0}, "metadata are not text"),
        ({"x": []}, "malformed"),
        ({"x": {}}, "malformed"),
        (b"[]", "holds a JSON list"),
        (b"{", "not valid JSON"),
        (b'{"x": 1, "x": 2}', "a key occurs twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON|malformed"),
    ],
)
def test_damaged_header(file, header, message):
    write_raw(file, header)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(file)


def test_truncated_anywhere(file):
    mx.save_safetensors(str(file), {"a": mx.ones((3,)), "b": mx.ones((2, 2))})
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"truncated or damaged|not valid JSON|empty"):
            read_safetensors(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_safetensors(file)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**9, 17])
def test_header_length(file, length):
    file.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(14))
    with pytest.raises(CheckpointError, match="its header would have"):
        read_safetensors(file)
