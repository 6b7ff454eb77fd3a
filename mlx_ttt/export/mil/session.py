"""A saved Core ML package, its functions, and who keeps their state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import coremltools as ct
import numpy as np
from coremltools.models.utils import load_spec

from ...errors import CheckpointError
from ..functions import FUNCTIONS, STATE
from ..metadata import learning_of, read_facts
from ..session import Session
from .interpreter import Interpreter, load

Predictor: TypeAlias = "Interpreter | ct.models.MLModel"  # a function of a package


class InOut:
    """Functions whose state is an input and an output. It starts with zeros of this shape."""

    def __init__(self, functions: Mapping[str, Predictor], shape: Sequence[int]):
        self._functions, self.state = functions, np.zeros(shape, np.float16)

    def predict(self, function: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        outputs = self._functions[function].predict({**inputs, STATE: self.state})
        self.state = outputs[f"{STATE}Out"]
        return outputs


class InState:
    """Functions whose state Core ML keeps, or the interpreter.

    Functions of one package share it. Separate packages have a state each: the one written last counts, and is copied
    when the other function is called.
    """

    def __init__(self, functions: Mapping[str, Predictor], shared: bool):
        self._functions, self._latest = functions, functions["decode"].make_state()
        self._states = {
            "decode": self._latest,
            "prefill": self._latest if shared else functions["prefill"].make_state(),
        }

    def predict(self, function: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        state = self._states[function]
        if state is not self._latest:
            state.write_state(STATE, self.state)
            self._latest = state
        return self._functions[function].predict(inputs, state=state)

    @property
    def state(self) -> np.ndarray:
        return self._latest.read_state(STATE)

    @state.setter
    def state(self, value: np.ndarray) -> None:
        self._latest.write_state(STATE, value)


def start_session(functions: Mapping[str, Predictor], metadata: Mapping[str, Any], shared: bool = True) -> Session:
    """A text before its first token.

    Args:
        functions: `decode` and `prefill`.
        metadata: of the package.
        shared: whether they are of one package, so that one state serves both.
    """
    in_out = metadata["state_mode"] == "io"
    with_state = InOut(functions, metadata["state"]["shape"]) if in_out else InState(functions, shared)
    return Session(with_state, metadata["mini_batch_size"], metadata["prefill_tokens"], learning_of(metadata))


def packages_of(path: Path) -> dict[str, Path]:
    """The package that holds each function: one for both, or NAME-decode and NAME-prefill beside each other.

    Raises:
        CheckpointError: there is none, or `path` is one of two.
    """
    none = CheckpointError(f"{path}: no such package; `convert.py coreml` makes one")
    if not path.name:  # a root, or the folder one is in
        raise none
    for name in FUNCTIONS:
        stem = path.stem.removesuffix(f"-{name}")
        if stem != path.stem and all(path.with_name(f"{stem}-{each}{path.suffix}").is_dir() for each in FUNCTIONS):
            raise CheckpointError(f"{path}: one of two; give {stem}{path.suffix} without -decode or -prefill")
    separate = {name: path.with_name(f"{path.stem}-{name}{path.suffix}") for name in FUNCTIONS}
    for packages in (dict.fromkeys(FUNCTIONS, path), separate):
        if all(package.is_dir() for package in packages.values()):
            return packages
    raise none


def read_metadata(package: Path) -> dict[str, Any]:
    """What the package says of itself; see export/metadata.py.

    Raises:
        CheckpointError: it is not one of ours.
    """
    try:
        given = load_spec(str(package)).description.metadata.userDefined
    except Exception as error:  # whatever protobuf makes of a damaged file
        raise CheckpointError(f"{package}: cannot be read as a Core ML package") from error
    try:
        return read_facts(given, package)
    except ValueError:
        raise CheckpointError(f"{package}: not a package that this version of `convert.py coreml` makes") from None


def interpreted(path: Path, rounding: bool = True) -> Callable[[], Session]:
    """Starts sessions in the interpreter; the package is loaded once."""
    return _sessions(path, lambda package, function: Interpreter(load(package, function), rounding))


def on_device(path: Path, compute_unit: str) -> Callable[[], Session]:
    """Starts sessions in Core ML, on macOS only. `compute_unit` is the name of a coremltools.ComputeUnit."""
    unit = ct.ComputeUnit[compute_unit]
    return _sessions(
        path, lambda package, function: ct.models.MLModel(str(package), compute_units=unit, function_name=function)
    )


def _sessions(path: Path, predictor: Callable[[Path, str | None], Predictor]) -> Callable[[], Session]:
    packages = packages_of(path)
    shared = packages["decode"] == packages["prefill"]
    functions = {name: predictor(package, name if shared else None) for name, package in packages.items()}
    metadata = read_metadata(packages["decode"])
    return lambda: start_session(functions, metadata, shared)
