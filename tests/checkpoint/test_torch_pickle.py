"""Pickles that try to run code, or to eat memory: refused, and nothing happens."""

from __future__ import annotations

import pickle
import pickletools
import struct
import tracemalloc

import mlx.core as mx
import pytest

from mlx_ttt.checkpoint import torch_pickle
from mlx_ttt.checkpoint.torch_pickle import read_pickle
from mlx_ttt.checkpoint.torch_zip import read_torch_zip
from mlx_ttt.errors import CheckpointError

from .torch_format import Raw, write_torch


def unpickled(code: bytes, protocol: int = 2):
    return read_pickle(b"\x80" + bytes([protocol]) + code, "weights.bin", lambda *parts: parts)


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


@pytest.fixture
def sentinel(tmp_path):
    """A file that the hostile pickles would create; it must not exist after the test."""
    file = tmp_path / "executed"
    yield str(file)
    assert not file.exists()


# Python's own pickle would call or build something for each of them, or create the sentinel (asserted below).
def attacks(sentinel: str) -> dict[str, tuple[bytes, str]]:
    command = f"touch {sentinel}"
    line = command.encode() + b"\n"
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    open_file = b"X" + struct.pack("<I", len(sentinel)) + sentinel.encode() + b"X\1\0\0\0w"
    system = "posix.system"
    return {
        "GLOBAL and REDUCE": (b"cposix\nsystem\n(" + text + b"tR.", system),
        "GLOBAL with a dotted name": (b"cos\npath.os.system\n(" + text + b"tR.", r"os\.path\.os\.system"),
        "STACK_GLOBAL": (short("posix") + short("system") + b"\x93(" + text + b"tR.", system),
        "builtins": (b"cbuiltins\nopen\n(" + open_file + b"tR.", r"builtins\.open"),
        "eval": (b"c__builtin__\neval\n(" + text + b"tR.", r"__builtin__\.eval"),
        "getattr": (b"cbuiltins\ngetattr\n)R.", r"builtins\.getattr"),
        "INST": (b"(" + text + b"iposix\nsystem\n.", "INST"),
        "OBJ": (b"(cposix\nsystem\n" + text + b"o.", system),
        "OBJ without GLOBAL": (b"(ctorch\nSize\no.", "OBJ"),
        "NEWOBJ": (b"csubprocess\nPopen\n(" + text + b"t\x81.", r"subprocess\.Popen"),
        "NEWOBJ of a known name": (b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        "NEWOBJ_EX": (b"ctorch\nSize\n)}\x92.", "NEWOBJ_EX"),
        "BUILD of a tensor": (b"ctorch\nSize\n}b.", "BUILD"),
        "BUILD of a list": (b"]}b.", "BUILD"),
        "EXT1": (b"\x82\x01.", "EXT1"),
        "EXT2": (b"\x83\x01\x00.", "EXT2"),
        "EXT4": (b"\x84\x01\x00\x00\x00.", "EXT4"),
        "PERSID": (b"P" + line + b".", "PERSID"),
        "BINPERSID of text": (text + b"Q.", "persistent id"),
        "BINPERSID of another tag": (b"(X\6\0\0\0moduleNNNNtQ.", "persistent id"),
        "BINPERSID of another type": (b"(X\7\0\0\0storagectorch\nSize\nX\1\0\0\x000X\3\0\0\0cpuK\1tQ.", "torch.Size"),
        "REDUCE of text": (text + b")R.", "not a known name"),
        "REDUCE of a dtype": (b"ctorch\nfloat32\n)R.", r"torch\.float32 in an unknown form"),
        "REDUCE of a storage": (b"ctorch\nFloatStorage\nK\x04\x85R.", "FloatStorage in an unknown form"),
        "REDUCE with other arguments": (b"ccollections\nOrderedDict\n(" + text + b"tR.", "OrderedDict in an unknown"),
        "tensor of no storage": (b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0))\x89NtR.", "_rebuild_tensor_v2 in an unk"),
        "tensor of no dtype": (
            b"ctorch._utils\n_rebuild_tensor_v3\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1tQ"
            b"K\0))\x89Nctorch\nSize\ntR.",
            "_rebuild_tensor_v3 in an unknown form",
        ),
        "DUP": (b"]2.", "DUP"),
        "POP": (b"]0.", "POP"),
        "buffer": (b"\x97.", "NEXT_BUFFER"),
        "old text": (b"S'x'\n.", "STRING"),
        "old integer": (b"I7\n.", "INT"),
        "torch's own code runners": (b"ctorch.jit._script\nunpackage_script_module\n)R.", "unpackage_script_module"),
        "torch.load": (b"ctorch.serialization\nload\n(" + text + b"tR.", r"torch\.serialization\.load"),
        "numpy": (b"cnumpy.core.multiarray\n_reconstruct\n)R.", r"numpy\.core\.multiarray\._reconstruct"),
        "namespace": (b"cargparse\nNamespace\n)\x81}b.", r"argparse\.Namespace"),
    }


@pytest.mark.parametrize("attack", attacks(""))
def test_refused_by_name(attack, sentinel):
    code, name = attacks(sentinel)[attack]
    with pytest.raises(CheckpointError, match=f"refused, nothing in it was executed: .*{name}") as error:
        unpickled(code, protocol=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("attack", ["GLOBAL and REDUCE", "STACK_GLOBAL", "INST", "OBJ", "builtins"])
def test_the_attacks_are_real(attack, tmp_path):
    file = tmp_path / "executed"
    pickle.loads(b"\x80\x04" + attacks(str(file))[attack][0])
    assert file.exists()


@pytest.mark.parametrize("attack", attacks(""))
def test_refused_inside_a_state_dict(attack, sentinel, tmp_path):
    code, name = attacks(sentinel)[attack]
    write_torch(tmp_path / "weights.bin", {"model.norm.weight": 1, "x": Raw(code.removesuffix(b"."))})
    with pytest.raises(CheckpointError, match=name):
        read_torch_zip(tmp_path / "weights.bin")


def test_a_tensor_with_a_dtype_of_its_own():
    """As PyTorch describes tensors of the dtypes that have no class of storages."""
    storage = b"(X\7\0\0\0storagectorch.storage\nUntypedStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x08tQ"
    code = b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage + b"K\0K\2\x85K\1\x85\x89Nctorch\nuint32\ntR."
    storage_id, *view = unpickled(code)
    assert storage_id.size == 8 and view == [mx.uint32, 0, (2,), (1,)]


def test_every_opcode_is_known_or_refused():
    """Instructions only build data: on an empty stack each one gives plain data or an error."""
    arguments = {1: b"\1", 2: b"\1\0", 4: b"\1\0\0\0", 8: b"\1" + bytes(7)}
    for opcode in pickletools.opcodes:
        size = getattr(opcode.arg, "n", 0)
        code = opcode.code.encode("latin-1") + arguments.get(size, b"\0" * 9)
        try:
            value = unpickled(code + b".", protocol=5)
        except CheckpointError:
            continue
        assert isinstance(value, None | bool | int | float | str | bytes | bytearray | tuple | list | dict)


@pytest.mark.parametrize(
    "code",
    [
        b"",  # no end
        b".",
        b"(.",
        b"N",
        b"t.",
        b"u.",
        b"(u.",
        b"](NNNu.",
        b"}(Nu.",
        b"a.",
        b"NNa.",
        b"s.",
        b"R.",
        b"Q.",
        b"b.",
        b"h\7.",
        b"j\0\0\0\1.",
        b"\x94.",
        b"(q\0.",
        b"\x85.",
        b"(\x85.",
        b"\x93.",
        b"NN\x93.",
        b"X\xff\xff\xff\xffabc.",  # text longer than the file
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc.",
        b"\x8b\xff\xff\xff\x7f\1.",
        b"\x8b\xff\xff\xff\xff\1.",
        b"X\2\0\0\0\xff\xfe.",  # not UTF-8
        b"c\xff\n\xff\n.",
        b"cposix",
        b"\xfe.",  # no such instruction
        b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
)
def test_malformed(code):
    with pytest.raises(CheckpointError, match="malformed"):
        unpickled(code)


def test_protocol_0_and_unknown():
    with pytest.raises(CheckpointError, match="protocol 1"):
        unpickled(b"N.", protocol=1)


def test_nesting_without_end():
    depth = 300_000
    value = unpickled(b"]" * depth + b"a" * (depth - 1) + b".")
    assert isinstance(value, list)
    while value:  # from the outside in: Python's destructor would recurse
        value = value.pop()


def test_deep_keys():
    """Hashing a deep tuple would overflow the C stack: keys that are not text are dropped without hashing."""
    assert unpickled(b"})" + b"\x85" * 100_000 + b"K\1s.") == {}


def test_names_for_terminals():
    """A name with control characters or a lone surrogate prints as one harmless line."""
    with pytest.raises(CheckpointError) as error:
        unpickled(short("a\x1b[2J\rb") + b"\x8c\x03\xed\xa0\x80\x93.")
    assert str(error.value).isprintable() and str(error.value).encode()


@pytest.mark.parametrize("filler", [b"]", b"}", b"\x8f", b"(", b"\x8c\x01a", b"K\1\x94", b")\x85"])
def test_memory_is_bounded(filler, monkeypatch):
    """An instruction needs at most a few hundred bytes of memory."""
    monkeypatch.setattr(torch_pickle, "_MOST_INSTRUCTIONS", 20_000)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"more than 20,000 instructions"):
        unpickled(filler * 100_000)
    assert tracemalloc.get_traced_memory()[1] < 20_000 * 400 + 2_000_000
    tracemalloc.stop()


def test_billion_laughs():
    """A value that contains another one twice refers to it twice: it is not copied."""
    code = b"]q\0" + b"".join(b"(h\x00h\x00tq\0" for _ in range(200)) + b"."
    assert isinstance(unpickled(code), tuple)


def test_recursive_dict_as_wrapper(tmp_path):
    write_torch(tmp_path / "weights.pt", Raw(b"}q\7X\5\0\0\0modelh\7s"))
    from mlx_ttt.checkpoint.source import open_source

    with pytest.raises(CheckpointError, match="no state dict"):
        open_source(tmp_path / "weights.pt")


def test_huge_integers():
    """Numbers too long to print are not printed."""
    number = b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000
    assert unpickled(number + b".") > 0
    with pytest.raises(CheckpointError, match=r"persistent id|unknown form"):
        unpickled(b"(X\7\0\0\0storagectorch\nSize\nX\1\0\0\x000X\3\0\0\0cpu" + number + b"tQ.")
