"""A pickle machine for PyTorch checkpoints that cannot run code.

A pickle is a program for a stack machine (the opcodes are documented in the standard library's `pickletools`). Python's
own machine imports what the program names and calls it. This one only knows how to build plain containers and to
describe tensors: a name outside the lists below ends the reading, and what is on the lists is never called either.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..errors import CheckpointError
from .untrusted import quoted

_MOST_INSTRUCTIONS = 4_000_000  # a 1.3B training checkpoint has about 200 000

_DTYPES = {
    "torch.float16": mx.float16,
    "torch.bfloat16": mx.bfloat16,
    "torch.float32": mx.float32,
    "torch.float64": mx.float64,
    "torch.uint8": mx.uint8,
    "torch.int8": mx.int8,
    "torch.uint16": mx.uint16,
    "torch.int16": mx.int16,
    "torch.uint32": mx.uint32,
    "torch.int32": mx.int32,
    "torch.uint64": mx.uint64,
    "torch.int64": mx.int64,
    "torch.bool": mx.bool_,
}
_STORAGES = {
    "torch.HalfStorage": mx.float16,
    "torch.BFloat16Storage": mx.bfloat16,
    "torch.FloatStorage": mx.float32,
    "torch.DoubleStorage": mx.float64,
    "torch.ByteStorage": mx.uint8,
    "torch.CharStorage": mx.int8,
    "torch.ShortStorage": mx.int16,
    "torch.IntStorage": mx.int32,
    "torch.LongStorage": mx.int64,
    "torch.BoolStorage": mx.bool_,
    "torch.storage.UntypedStorage": mx.uint8,
}
_VIEWS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_PARAMETERS = {f"torch._utils._rebuild_parameter{variant}" for variant in ("", "_with_state")}
# Harmless values that training checkpoints carry next to the weights: read past, as None.
_IGNORED = {"torch.Size", "torch.device", "_codecs.encode"} | {
    f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex")
}
_KNOWN = {"collections.OrderedDict", *_STORAGES, *_DTYPES, *_VIEWS, *_PARAMETERS, *_IGNORED}

_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": lambda: (),
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # nobody looks inside sets, and this way their members need not be hashable
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


@dataclass(frozen=True)
class StorageId:
    """What a checkpoint says of one of its storages: the record's key, the elements' dtype and how many there are."""

    key: str
    dtype: mx.Dtype
    size: int


@dataclass(frozen=True)
class _Global:
    """A name that the pickle mentions and that is on the lists. Only a name."""

    name: str


class _Mark:
    """The bottom of the topmost open group on the stack."""


_MARK = _Mark()


class _Malformed(Exception):
    """The pickle is not a well-formed program."""


class _Refused(Exception):
    """The pickle asks for something that this machine does not do."""


def read_pickle(data: bytes, where: str, rebuild: Callable[..., object]) -> object:
    """The value that a PyTorch pickle describes: dicts with string keys, lists, tuples, numbers, text, tensors.

    Args:
        data: the pickle, protocol 2 to 5.
        where: the file's name, for error messages.
        rebuild: called as rebuild(StorageId, dtype, offset, shape, strides), all but the first two unchecked;
            returns what stands for the tensor.

    Dict entries under other keys than strings lead to no weights and are dropped.

    Raises:
        CheckpointError: the pickle is damaged, or asks for any name outside the lists of this module.
    """
    try:
        return _Machine(rebuild).run(data)
    except _Refused as error:
        raise CheckpointError(
            f"{where}: refused, nothing in it was executed: {error}. If you trust the file, re-save its weights alone"
            " where PyTorch is installed: torch.save(model.state_dict(), FILE)"
        ) from None
    except (_Malformed, ValueError) as error:  # pickletools raises ValueError
        raise CheckpointError(f"{where}: truncated or damaged, its pickle is malformed ({quoted(error)})") from None


class _Machine:
    def __init__(self, rebuild: Callable[..., object]):
        self.rebuild = rebuild
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def run(self, data: bytes) -> object:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= _MOST_INSTRUCTIONS:
                raise _Refused(f"its pickle has more than {_MOST_INSTRUCTIONS:,} instructions")
            if opcode.name == "STOP":
                return self.pop()
            self.step(opcode.name, argument)
        raise _Malformed("no end")

    def step(self, opcode: str, argument: object) -> None:
        """Carry out one instruction other than STOP."""
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        else:
            match opcode:
                case "PROTO":
                    if argument < 2:
                        raise _Refused(f"pickle protocol {argument}")
                case "FRAME":
                    pass
                case "MARK":
                    self.stack.append(_MARK)
                case "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = self.top(object)
                case "MEMOIZE":
                    self.memo[len(self.memo)] = self.top(object)
                case "BINGET" | "LONG_BINGET":
                    if argument not in self.memo:
                        raise _Malformed(f"nothing remembered as {argument}")
                    self.stack.append(self.memo[argument])
                case "TUPLE" | "FROZENSET":
                    self.stack.append(tuple(self.pop_group()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    self.stack.append(tuple(reversed([self.pop() for _ in range(int(opcode[-1]))])))
                case "LIST":
                    self.stack.append(self.pop_group())
                case "DICT":
                    items = self.pop_group()
                    self.stack.append({})
                    self.set_items(items)
                case "APPEND":
                    item = self.pop()
                    self.top(list).append(item)
                case "APPENDS" | "ADDITEMS":
                    items = self.pop_group()
                    self.top(list).extend(items)
                case "SETITEM":
                    value, key = self.pop(), self.pop()
                    self.set_items([key, value])
                case "SETITEMS":
                    self.set_items(self.pop_group())
                case "GLOBAL":
                    self.stack.append(self.find(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = self.pop(), self.pop()
                    if not (isinstance(name, str) and isinstance(module, str)):
                        raise _Malformed("a name that is not text")
                    self.stack.append(self.find(module, name))
                case "BINPERSID":
                    self.stack.append(self.storage(self.pop()))
                case "REDUCE":
                    arguments, function = self.pop(), self.pop()
                    self.stack.append(self.describe(function, arguments))
                case "BUILD":
                    self.drop_attributes()
                case _:
                    raise _Refused(f"it uses the pickle instruction {opcode}, which no weights need")

    def pop(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            raise _Malformed("its stack runs empty")
        return self.stack.pop()

    def pop_group(self) -> list[object]:
        """The values above the topmost mark."""
        group = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return group[::-1]
            group.append(value)
        raise _Malformed("a mark is missing")

    def top(self, kind: type) -> object:
        if not self.stack or not isinstance(self.stack[-1], kind) or self.stack[-1] is _MARK:
            raise _Malformed(f"a {kind.__name__} was expected")
        return self.stack[-1]

    def set_items(self, items: list[object]) -> None:
        """Fill the dict on top of the stack from alternating keys and values."""
        if len(items) % 2:
            raise _Malformed("a key without a value")
        entries = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):
                entries[key] = value

    def find(self, module: str, name: str) -> _Global:
        """What GLOBAL and STACK_GLOBAL give: a name on the lists, or the end of the reading."""
        full_name = f"{module}.{name}"
        if full_name not in _KNOWN:
            raise _Refused(f"it asks for the Python object {quoted(full_name)}")
        return _Global(full_name)

    def storage(self, persistent_id: object) -> StorageId:
        """What BINPERSID gives: ("storage", type, key, device, size), as torch.save writes it."""
        match persistent_id:
            case ("storage", _Global(name=kind), str(key), str(), int(size)) if kind in _STORAGES and size >= 0:
                return StorageId(key, _STORAGES[kind], size)
            case ("storage", _Global(name=kind), *_):
                raise _Refused(f"it has a storage of type {quoted(kind)} in an unknown form")
            case _:
                raise _Refused("it has a persistent id of an unknown form")

    def describe(self, function: object, arguments: object) -> object:
        """What REDUCE gives: the result of a call that is never made."""
        if not isinstance(function, _Global):
            raise _Refused("it calls something that is not a known name")
        match function.name, arguments:
            case name, (StorageId() as storage, offset, shape, strides, *rest) if name in _VIEWS:
                return self.rebuild(storage, self.dtype(name, storage, rest), offset, shape, strides)
            case name, (tensor, *_) if name in _PARAMETERS:
                return tensor
            case "collections.OrderedDict", ():
                return {}
            case name, tuple() if name in _IGNORED:
                return None
            case name, _:
                raise _Refused(f"it calls {quoted(name)} in an unknown form")

    def dtype(self, name: str, storage: StorageId, rest: list[object]) -> mx.Dtype:
        """A tensor's dtype: its storage's, except that version 3 names one after requires_grad and the hooks."""
        match name, rest:
            case "torch._utils._rebuild_tensor_v3", (_, _, _Global(name=dtype), *_) if dtype in _DTYPES:
                return _DTYPES[dtype]
            case "torch._utils._rebuild_tensor_v3", _:
                raise _Refused(f"it calls {name} in an unknown form")
        return storage.dtype

    def drop_attributes(self) -> None:
        """BUILD sets attributes. PyTorch uses it for the versions of a state dict's modules, which nobody needs."""
        self.pop()
        if not self.stack or not isinstance(self.stack[-1], dict):
            raise _Refused("it uses the pickle instruction BUILD on something else than a dict")
