"""One text, read through a package: in Core ML on a Mac, in the interpreter elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import coremltools as ct
import numpy as np
from coremltools.models.utils import load_spec

from ..errors import CheckpointError
from .interpreter import Interpreter, load
from .package import FORMAT, FUNCTIONS, PREFIX

STATE = "tttState"


class Predictor(Protocol):
    """A function of a package: `Interpreter` and coremltools' MLModel both are."""

    def predict(self, inputs: Mapping[str, np.ndarray], state=None) -> Mapping[str, np.ndarray]: ...

    def make_state(self): ...


class Session:
    """Reads tokens as an app does: whole blocks and the prompt's tail through `prefill`, single ones through `decode`.

    Args:
        functions: `decode` and `prefill`.
        metadata: of the package.
        shared: whether they are of one package, so that one state serves both.

    Attributes:
        offset: tokens read so far.
    """

    def __init__(self, functions: Mapping[str, Predictor], metadata: Mapping, shared: bool = True):
        self.offset = 0
        self.mini_batch_size = metadata["mini_batch_size"]
        self.block = metadata["prefill_tokens"]
        in_out = metadata["state_mode"] == "io"
        self._memory = InOut(functions, metadata["state"]["shape"]) if in_out else InState(functions, shared)

    def read(self, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """For each call, the number of tokens read after it and its logits, [1, V] or, of all tokens, [n, V]."""
        ids = np.asarray(ids, np.int32)
        while len(ids):
            phase = self.offset % self.mini_batch_size
            n = min(self.block, len(ids)) if phase == 0 and len(ids) > 1 else 1
            if n == 1:
                logits = self._call("decode", ids[None, :1], position=phase)
            else:
                block = np.zeros((1, self.block), np.int32)
                block[0, :n] = ids[:n]
                logits = self._call("prefill", block, length=n)
            self.offset += n
            ids = ids[n:]
            yield self.offset, logits[0, :n]

    def _call(self, function: str, ids: np.ndarray, **where: int) -> np.ndarray:
        inputs = {"inputIds": ids} | {name: np.array([n], np.int32) for name, n in where.items()}
        return np.asarray(self._memory.predict(function, inputs)["logits"], np.float32)

    @property
    def state(self) -> np.ndarray:
        """[layers, H, R, D], a copy in float32."""
        return np.array(self._memory.value, np.float32)

    def restore(self, state: np.ndarray, offset: int) -> None:
        """Go on from a state that was saved after `offset` tokens."""
        self._memory.value, self.offset = state.astype(np.float16), offset


class InOut:
    """The state as an input and an output."""

    def __init__(self, functions: Mapping[str, Predictor], shape: Sequence[int]):
        self._functions, self.value = functions, np.zeros(shape, np.float16)

    def predict(self, function: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        outputs = self._functions[function].predict({**inputs, STATE: self.value})
        self.value = outputs[STATE + "Out"]
        return outputs


class InState:
    """The state in Core ML's keeping, or the interpreter's. Separate packages have one each: the latest counts."""

    def __init__(self, functions: Mapping[str, Predictor], shared: bool):
        self._functions, self._latest = functions, "decode"
        state = functions["decode"].make_state()
        self._states = {"decode": state, "prefill": state if shared else functions["prefill"].make_state()}

    def predict(self, function: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        state = self._states[function]
        if state is not self._states[self._latest]:
            state.write_state(STATE, self.value)
        self._latest = function
        return self._functions[function].predict(inputs, state=state)

    @property
    def value(self) -> np.ndarray:
        return self._states[self._latest].read_state(STATE)

    @value.setter
    def value(self, value: np.ndarray) -> None:
        self._states[self._latest].write_state(STATE, value)


def packages_of(path: Path) -> dict[str, Path]:
    """By function, the package that holds it: one for both, or NAME-decode and NAME-prefill beside each other.

    Raises:
        CheckpointError: there is none, or `path` is one of two.
    """
    for name in FUNCTIONS:
        stem = path.stem.removesuffix(f"-{name}")
        if stem != path.stem and all(path.with_name(f"{stem}-{each}{path.suffix}").is_dir() for each in FUNCTIONS):
            raise CheckpointError(f"{path}: one of two; give {stem}{path.suffix} without -decode or -prefill")
    if path.is_dir():
        return dict.fromkeys(FUNCTIONS, path)
    separate = {name: path.with_name(f"{path.stem}-{name}{path.suffix}") for name in FUNCTIONS}
    if all(package.is_dir() for package in separate.values()):
        return separate
    raise CheckpointError(f"{path}: no such package; `convert.py coreml` makes one")


def read_metadata(package: Path) -> dict:
    """What the package says of itself; see package.py.

    Raises:
        CheckpointError: it is not one of ours.
    """
    try:
        given = load_spec(str(package)).description.metadata.userDefined
    except Exception as error:  # whatever protobuf makes of a damaged file
        raise CheckpointError(f"{package}: cannot be read as a Core ML package") from error
    if given.get(PREFIX + "format") != FORMAT:
        raise CheckpointError(f"{package}: not a package that this version of `convert.py coreml` makes")
    words = ("format", "model", "state_mode", "weights", "compute")
    found = {key.removeprefix(PREFIX): value for key, value in given.items() if key.startswith(PREFIX)}
    return {key: value if key in words else json.loads(value) for key, value in found.items()}


def interpreted(path: Path, rounding: bool = True) -> Callable[[], Session]:
    """Sessions in the interpreter; loading is done once."""
    return _sessions(path, lambda package, function: Interpreter(load(package, function), rounding))


def on_device(path: Path, compute_unit: str) -> Callable[[], Session]:
    """Sessions in Core ML, macOS only. `compute_unit` is the name of a coremltools.ComputeUnit."""
    unit = ct.ComputeUnit[compute_unit]
    return _sessions(
        path, lambda package, function: ct.models.MLModel(str(package), compute_units=unit, function_name=function)
    )


def _sessions(path: Path, predictor: Callable[[Path, str | None], Predictor]) -> Callable[[], Session]:
    packages = packages_of(path)
    shared = packages["decode"] == packages["prefill"]
    functions = {name: predictor(package, name if shared else None) for name, package in packages.items()}
    metadata = read_metadata(packages["decode"])
    return lambda: Session(functions, metadata, shared)
