"""Reads the pickles in PyTorch checkpoints, without running code.

A pickle is a program for a stack machine (the opcodes are documented in the standard library's `pickletools`). Python's
own machine imports and calls what the program names. This one only builds plain containers and describes tensors. It
refuses every name outside the lists below, and does not call those on the lists either.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx

from ..errors import CheckpointError
from .untrusted import quoted

_Value = TypeVar("_Value")

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
_VIEWS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2")}
_VIEWS_WITH_DTYPE = {"torch._utils._rebuild_tensor_v3"}
_PARAMETERS = {f"torch._utils._rebuild_parameter{variant}" for variant in ("", "_with_state")}
# Harmless objects that training checkpoints hold beside the weights. They are read as None.
_IGNORED = {"torch.Size", "torch.device", "_codecs.encode"} | {
    f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex")
}
_KNOWN = {"collections.OrderedDict", *_STORAGES, *_DTYPES, *_VIEWS, *_VIEWS_WITH_DTYPE, *_PARAMETERS, *_IGNORED}

_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": lambda: (),
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # no weights are in sets, and members of a list need not be hashable
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


@dataclass(frozen=True)
class StorageId:
    """A storage, as the pickle names it: the key of its record, its dtype, and how many elements it has."""

    key: str
    dtype: mx.Dtype
    size: int


@dataclass(frozen=True)
class _Global:
    """The name of a Python object, which is on the lists. The object itself is never looked up."""

    name: str


class _Refused(Exception):
    """The pickle needs something that this machine does not do."""


def read_pickle(data: bytes, where: str, rebuild: Callable[..., object]) -> object:
    """The value in a PyTorch pickle: dicts, lists, tuples, numbers, text, tensors.

    Dict entries whose keys are not strings are dropped: they hold no weights.

    Args:
        data: the pickle, protocol 2 to 5.
        where: the file, for error messages.
        rebuild: called as rebuild(StorageId, dtype, offset, shape, strides) for each tensor; returns the value to put
            in its place. The last three arguments are whatever the pickle says, unchecked.

    Raises:
        CheckpointError: the pickle is damaged, or names an object outside the lists of this module.
    """
    try:
        return _Machine(rebuild).run(data)
    except _Refused as error:
        raise CheckpointError(
            f"{where}: refused, nothing in it was executed: {error}. If you trust the file, re-save its weights alone"
            " where PyTorch is installed: torch.save(model.state_dict(), FILE)"
        ) from None
    except ValueError as error:  # from pickletools, or from the machine
        raise CheckpointError(f"{where}: truncated or damaged, its pickle is malformed ({quoted(error)})") from None


class _Machine:
    """The stack machine. It raises ValueError for a program that is not well-formed.

    `stack` holds the values since the last mark, `below` those before each mark, and `memo` values that are used again.
    """

    def __init__(self, rebuild: Callable[..., object]):
        self.rebuild = rebuild
        self.stack: list[object] = []
        self.below: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self, data: bytes) -> object:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= _MOST_INSTRUCTIONS:
                raise _Refused(f"its pickle has more than {_MOST_INSTRUCTIONS:,} instructions")
            if opcode.name == "STOP":
                return self.pop()
            self.step(opcode.name, argument)
        raise ValueError("no end")

    def step(self, opcode: str, argument: Any) -> None:
        """Execute one instruction other than STOP."""
        if opcode in _LITERALS:
            self.push(argument)
        elif opcode in _CONSTANTS:
            self.push(_CONSTANTS[opcode]())
        else:
            match opcode:
                case "PROTO":
                    if argument < 2:
                        raise _Refused(f"pickle protocol {argument}")
                case "FRAME":
                    pass
                case "MARK":
                    self.below.append(self.stack)
                    self.stack = []
                case "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = self.top(object)
                case "MEMOIZE":
                    self.memo[len(self.memo)] = self.top(object)
                case "BINGET" | "LONG_BINGET":
                    if argument not in self.memo:
                        raise ValueError(f"nothing remembered as {argument}")
                    self.push(self.memo[argument])
                case "TUPLE" | "FROZENSET":
                    self.push(tuple(self.pop_group()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    self.push(tuple(reversed([self.pop() for _ in range(int(opcode[-1]))])))
                case "LIST":
                    self.push(self.pop_group())
                case "DICT":
                    items = self.pop_group()
                    self.push({})
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
                    self.push(self.find(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = self.pop(), self.pop()
                    if not (isinstance(name, str) and isinstance(module, str)):
                        raise ValueError("a name that is not text")
                    self.push(self.find(module, name))
                case "BINPERSID":
                    self.push(self.storage(self.pop()))
                case "REDUCE":
                    arguments, function = self.pop(), self.pop()
                    self.push(self.describe(function, arguments))
                case "BUILD":
                    # It sets attributes. PyTorch sets those of state dicts, the versions of modules: not needed.
                    self.pop()
                    if not self.stack or not isinstance(self.stack[-1], dict):
                        raise _Refused("it uses the pickle instruction BUILD on something else than a dict")
                case _:
                    raise _Refused(f"it uses the pickle instruction {opcode}, which no weights need")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if not self.stack:
            raise ValueError("its stack runs empty")
        return self.stack.pop()

    def pop_group(self) -> list[object]:
        """The values above the topmost mark."""
        if not self.below:
            raise ValueError("a mark is missing")
        group, self.stack = self.stack, self.below.pop()
        return group

    def top(self, kind: type[_Value]) -> _Value:
        """The value on top of the stack, which must be of this kind."""
        if self.stack and isinstance(value := self.stack[-1], kind):
            return value
        raise ValueError(f"a {kind.__name__} was expected")

    def set_items(self, items: list[object]) -> None:
        """Add entries to the dict on top of the stack; `items` are keys and values in turns."""
        if len(items) % 2:
            raise ValueError("a key without a value")
        entries = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):
                entries[key] = value

    def find(self, module: str, name: str) -> _Global:
        """The result of GLOBAL and STACK_GLOBAL. A name that is not on the lists is refused."""
        full_name = f"{module}.{name}"
        if full_name not in _KNOWN:
            raise _Refused(f"it asks for the Python object {quoted(full_name)}")
        return _Global(full_name)

    def storage(self, persistent_id: object) -> StorageId:
        """The result of BINPERSID on ("storage", type, key, device, size), as torch.save writes it."""
        match persistent_id:
            case ("storage", _Global(name=kind), str(key), str(), int(size)) if kind in _STORAGES and size >= 0:
                return StorageId(key, _STORAGES[kind], size)
            case ("storage", _Global(name=kind), *_):
                raise _Refused(f"it has a storage of type {quoted(kind)} in an unknown form")
            case _:
                raise _Refused("it has a persistent id of an unknown form")

    def describe(self, function: object, arguments: object) -> object:
        """The result of REDUCE: a description of what the call would return. No call is made."""
        if not isinstance(function, _Global):
            raise _Refused("it calls something that is not a known name")
        match function.name, arguments:
            case name, (StorageId() as storage, offset, shape, strides, *_) if name in _VIEWS:
                return self.rebuild(storage, storage.dtype, offset, shape, strides)
            case name, (StorageId() as storage, offset, shape, strides, _, _, _Global(name=dtype), *_) if (
                name in _VIEWS_WITH_DTYPE and dtype in _DTYPES
            ):  # after the strides: whether it needs a gradient, and hooks
                return self.rebuild(storage, _DTYPES[dtype], offset, shape, strides)
            case name, (tensor, *_) if name in _PARAMETERS:
                return tensor
            case "collections.OrderedDict", ():
                return {}
            case name, tuple() if name in _IGNORED:
                return None
            case name, _:
                raise _Refused(f"it calls {quoted(name)} in an unknown form")
