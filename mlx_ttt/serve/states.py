"""Saved states by name, in a folder with a quota."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_reduce
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import OutputError, StateError, TTTError
from ..network.model import Model
from ..network.rewind import RewindableTTTCache
from ..text.state import TextState, load_state, save_state

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_SUFFIX = ".state"
_INCOMING = ".incoming-"


class StateRefused(TTTError):
    """A state that does not exist, cannot be kept, or is not what it should be, with the HTTP status that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class StateInfo:
    """What is told of a state."""

    id: str
    tokens: int
    learning: float
    bytes: int
    created: int

    def as_json(self) -> dict[str, Any]:
        return {"object": "state", **asdict(self)}


class States:
    """The states of one model. A name is a file; a file is there whole or not at all.

    Methods that make or load arrays are for the thread of the model. The others are for any thread.
    """

    def __init__(self, folder: Path, quota: int, model: Model, tokenizer: TokenizerWrapper, kept: int = 16):
        """
        Args:
            folder: where they are. It is made if it is not there.
            quota: bytes that all states may take together.
            kept: how many are kept in memory.

        Raises:
            OutputError: the folder cannot be made or written to.
        """
        self.folder, self.quota = folder, quota
        self._model, self._tokenizer, self._kept = model, tokenizer, kept
        self._memory: OrderedDict[str, tuple[tuple[int, int], TextState]] = OrderedDict()
        self._known: dict[str, tuple[tuple[int, int], StateInfo]] = {}
        self._lock = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{_INCOMING}*"):  # by a server that was killed
                shutil.rmtree(left, ignore_errors=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be used for states: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise OutputError(f"{folder}: cannot be used for states: it is not writable")

    def path(self, name: str) -> Path:
        """The file of a name. No name leaves the folder.

        Raises:
            StateRefused: it is no name.
        """
        if not re.fullmatch(NAME, name):
            raise StateRefused(400, "a state's name has 1 to 64 letters, digits, dots, dashes or underscores")
        return self.folder / f"{name}{_SUFFIX}"

    def existing(self, name: str) -> Path:
        """The file of a state that is there.

        Raises:
            StateRefused: it is not.
        """
        path = self.path(name)
        if not path.is_file() or path.is_symlink():
            raise StateRefused(404, f"there is no state {name}")
        return path

    def names(self) -> list[str]:
        files = (f for f in self.folder.glob(f"*{_SUFFIX}") if f.is_file() and not f.is_symlink())
        return sorted(f.name.removesuffix(_SUFFIX) for f in files if re.fullmatch(NAME, f.name.removesuffix(_SUFFIX)))

    @property
    def nbytes(self) -> int:
        return sum(self.existing(name).stat().st_size for name in self.names())

    def delete(self, name: str) -> None:
        with self._lock:
            self.existing(name).unlink()
            self._memory.pop(name, None)
            self._known.pop(name, None)

    def branch(self, name: str, new: str) -> None:
        """A second name for what a state is now. Each goes on by itself."""
        with self._lock:
            source = self.existing(name)
            with self.incoming() as incoming:
                copy = Path(incoming) / "state"
                shutil.copyfile(source, copy)
                self._take_in(copy, new)

    # For the thread of the model

    def load(self, name: str) -> TextState:
        """A state, to be continued on its own.

        Raises:
            StateRefused: there is none of this name.
            StateError: it is damaged, or that of another model.
        """
        with self._lock:
            stamp = _stamp(self.existing(name))
            if name not in self._memory or self._memory[name][0] != stamp:
                self._memory[name] = stamp, self._read(self.existing(name))
            self._memory.move_to_end(name)
            while len(self._memory) > self._kept:
                self._memory.popitem(last=False)
            return self._memory[name][1].copy()

    def info(self, name: str) -> StateInfo:
        with self._lock:
            path = self.existing(name)
            stamp = _stamp(path)
            if name not in self._known or self._known[name][0] != stamp:
                state, file = self.load(name), path.stat()
                info = StateInfo(name, len(state), float(state.learning), file.st_size, int(file.st_mtime))
                self._known[name] = stamp, info
            return self._known[name][1]

    def save(self, name: str, state: TextState) -> None:
        """Keep a state by a name, in place of another of that name if there is one.

        Raises:
            StateRefused: it does not fit into the quota.
            OutputError: it cannot be written.
        """
        with self.incoming() as incoming:
            file = Path(incoming) / "state"
            save_state(file, state, self._model, self._tokenizer)
            self._take_in(file, name)

    def take_in(self, file: Path, name: str) -> StateInfo:
        """Keep a file that somebody has sent, if it is a state of this model.

        Raises:
            StateRefused: it is not, or it does not fit into the quota.
        """
        try:
            self._read(file)
        except TTTError as error:
            raise StateRefused(400, str(error).replace(f"{file}: ", "")) from error
        self._take_in(file, name)
        return self.info(name)

    def _read(self, file: Path) -> TextState:
        state = load_state(file, self._model, self._tokenizer)
        check(self._model, state)
        mx.eval([c.arrays for c in state.cache])
        return state

    def _take_in(self, file: Path, name: str) -> None:
        """Give a complete file its name."""
        path = self.path(name)
        with self._lock:
            before = path.stat().st_size if path.is_file() else 0
            size = file.stat().st_size
            if (taken := self.nbytes - before) + size > self.quota:
                raise StateRefused(
                    507,
                    f"the states of this server may take {self.quota:,} bytes; {taken:,} are taken and this one has"
                    f" {size:,}: delete some with DELETE /v1/states/NAME",
                )
            try:
                os.replace(file, path)
            except OSError as error:
                raise OutputError(f"the state cannot be written: {error.strerror}") from error
            self._memory.pop(name, None)

    def incoming(self) -> tempfile.TemporaryDirectory[str]:
        """A folder for a file that comes in. It goes with the context.

        Raises:
            OutputError: it cannot be made.
        """
        try:
            return tempfile.TemporaryDirectory(prefix=_INCOMING, dir=self.folder, ignore_cleanup_errors=True)
        except OSError as error:
            raise OutputError(f"the state cannot be written: {error.strerror}") from error


def check(model: Model, state: TextState) -> None:
    """Check that a state from outside is one that this model could have made.

    Its file says what it likes. With other shapes than the model's, C code would read beyond the arrays.

    Raises:
        StateError: it is not.
    """
    expected: Any = model.make_cache()
    if len(state.cache) != len(expected):
        raise StateError("the state has another number of layers than the model")
    if isinstance(state.cache[0], RewindableTTTCache):
        expected = [RewindableTTTCache(c) for c in expected]
    arrays: list[mx.array] = []
    for found, wanted in zip(state.cache, expected, strict=True):
        if type(found) is not type(wanted) or _shapes(found.arrays) != _shapes(wanted.arrays):
            raise StateError("the state's arrays have other names, shapes or dtypes than the model's")
        arrays = tree_reduce(lambda all, x: [*all, x], found.arrays, arrays)
    offsets = {tuple(c.offset) for c in state.cache}
    if len(offsets) != 1 or not all(len(o) == 1 and 0 <= o[0] < 2**62 for o in offsets):
        raise StateError("the state's layers are not at the same token")
    if any(not 0 <= r <= c.mini_batch_size for c in state.cache for r in getattr(c, "reach", ())):
        raise StateError("the state says that more tokens can be taken back than a mini-batch has")
    tokens = state.tokens
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= 64 or len(tokens) > len(state):
        raise StateError("the state's last tokens are missing")
    if any(type(t) is not int or not 0 <= t < model.args.vocab_size for t in tokens):
        raise StateError("the state has tokens that the model does not know")
    learning = state.learning
    if type(learning) not in (int, float) or not math.isfinite(learning) or not 0 <= learning <= 100:
        raise StateError("the state's learning scale is not a number from 0 to 100")
    if not mx.all(mx.stack([mx.isfinite(x).all() for x in arrays])).item():
        raise StateError("the state holds values that are not numbers")


def _shapes(arrays: dict[str, Any]) -> dict[str, tuple]:
    leaves: Any = tree_flatten(arrays)
    return {name: (x.shape, x.dtype) for name, x in leaves}


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_ino
