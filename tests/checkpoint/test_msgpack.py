"""Our reader of MessagePack against the msgpack package."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ttt.checkpoint.mapped import MappedFile
from mlx_ttt.checkpoint.msgpack import Reader
from mlx_ttt.errors import CheckpointError

KINDS = ("array", "map", "integer", "boolean", "text", "binary", "extension")
LENGTHS = [0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 255, 256, 65535, 65536]


@pytest.fixture(scope="module")
def reader_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("msgpack")

    def reader_of(data: bytes, end: int | None = None) -> Reader:
        path = Path(folder, "file")
        path.unlink(missing_ok=True)  # an earlier one may still be mapped
        path.write_bytes(data)
        return Reader(MappedFile(path), 0, len(data) if end is None else end)

    return reader_of


def contents(reader: Reader) -> bytes:
    return bytes(reader.file.view(reader.position, reader.end - reader.position))


def decoded(reader: Reader) -> object:
    """The next value, of whatever kind the reader finds."""
    match reader.kind():
        case "array":
            return [decoded(reader) for _ in range(reader.array())]
        case "map":
            return {reader.text(): decoded(reader) for _ in range(reader.map())}
        case "extension":
            return msgpack.ExtType(7, contents(reader.extension(7)))
        case "binary":
            return contents(reader.binary())
        case "text":
            return reader.text()
        case "boolean":
            return reader.boolean()
        case _:
            return reader.integer()


VALUES = st.recursive(
    st.integers(0, 2**64 - 1)
    | st.booleans()
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | st.binary(max_size=40).map(lambda data: msgpack.ExtType(7, data)),
    lambda values: st.lists(values, max_size=20) | st.dictionaries(st.text(max_size=5), values, max_size=20),
    max_leaves=15,
)


@settings(max_examples=15, deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=3))
def test_any_values_one_after_another(reader_of, values):
    reader = reader_of(b"".join(map(msgpack.packb, values)))
    assert [decoded(reader) for _ in values] == values
    assert reader.kind() == "nothing"
    reader.finish()


@pytest.mark.parametrize("length", LENGTHS)
def test_every_size_of_head(reader_of, length):
    data = bytes(i % 251 for i in range(length))
    assert decoded(reader_of(msgpack.packb(data))) == data
    assert decoded(reader_of(msgpack.packb(msgpack.ExtType(7, data)))) == msgpack.ExtType(7, data)
    assert reader_of(msgpack.packb([True] * length)).array() == length
    assert reader_of(msgpack.packb(dict.fromkeys(map(str, range(length)), 0))).map() == length
    for number in (length, 256 * length, 2**16 * length, 2**32 * length):
        assert reader_of(msgpack.packb(number)).integer() == number


def expected_kind(first: int) -> str | None:
    """The kind that the msgpack package finds for a first byte; None for kinds that no checkpoint has."""
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(bytes([first]) + bytes(80))
    try:
        found = unpacker.unpack()
    except (msgpack.UnpackException, ValueError):
        return None
    types = {bool: "boolean", int: "integer", str: "text", bytes: "binary", list: "array", dict: "map"}
    types |= {msgpack.ExtType: "extension", msgpack.Timestamp: "extension"}
    is_signed = isinstance(found, int) and first >= 0xD0
    return None if is_signed else types.get(type(found))


def test_every_first_byte(reader_of):
    """Exactly one method accepts it; none does if no checkpoint has such a value."""
    for first in range(256):
        reader = reader_of(bytes([first]) + bytes(80))
        taken = []
        for kind in KINDS:
            reader.position = 0
            try:
                getattr(reader, kind)(*[0] * (kind == "extension"))
                taken.append(kind)
            except CheckpointError as error:
                assert f"{kind} was expected at byte 0, not" in str(error)
        assert taken == [kind for kind in [expected_kind(first)] if kind], first


@pytest.mark.parametrize("value", [[1, 2], "name", b"bytes", 300, 2**40, msgpack.ExtType(7, b"abcde"), {"a": True}])
def test_value_that_does_not_end(reader_of, value):
    """It reaches beyond the end of the file, or of the value that contains it."""
    data = msgpack.packb(value)
    for end in range(len(data)):
        for reader in (reader_of(data, end), *([reader_of(data[:end])] if end else [])):
            with pytest.raises(CheckpointError, match=r"does not end before|was expected at byte \d+, not nothing"):
                decoded(reader)


def test_absurd_sizes_cost_nothing(reader_of):
    for head in (b"\xc6", b"\xc9", b"\xdb"):
        with pytest.raises(CheckpointError, match=r"does not end before|4,294,967,295 bytes"):
            decoded(reader_of(head + b"\xff" * 4 + b"\x07abc"))
    assert reader_of(b"\xdd" + b"\xff" * 4).array() == reader_of(b"\xdf" + b"\xff" * 4).map() == 2**32 - 1


def test_extension_of_another_type(reader_of):
    with pytest.raises(CheckpointError, match="extension type 1 was expected at byte 2, not 7"):
        reader_of(msgpack.packb(msgpack.ExtType(7, b"a"))).extension(1)


def test_text_that_is_none(reader_of):
    with pytest.raises(CheckpointError, match="name at byte 1 is not text"):
        reader_of(b"\xa2\xff\xfe").text()


def test_more_than_was_expected(reader_of):
    reader = reader_of(b"\x01\x02")
    reader.integer()
    with pytest.raises(CheckpointError, match="nothing was expected at byte 1, not integer"):
        reader.finish()
