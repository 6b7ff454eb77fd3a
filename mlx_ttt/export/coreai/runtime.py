"""Core AI's runtime: the functions of a saved program, run here."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from coreai.authoring import AIModelAsset
from coreai.runtime import NDArray

from ..functions import LOGITS
from ..layout import StateLayout
from ..session import Session
from . import runner_main
from .state import apart_shapes, grouped_shapes, packed, unpacked


class Runs(Protocol):
    """What runs the functions of a program: `Runtime` in this process, or a child (child.py).

    Attributes:
        names: of the functions.
    """

    names: list[str]

    def start(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """The states of a text, which begin with these arrays."""

    def write(self, states: Any, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace them."""

    def arrays(self, states: Any) -> dict[str, np.ndarray]:
        """What they are now, by name."""

    def call(self, name: str, inputs: Mapping[str, np.ndarray], states: Any = None) -> dict[str, np.ndarray]:
        """The outputs of one call of a function by name. The states are changed in place."""


class Runtime:
    """A program that is compiled and loaded, to be used as a context manager. See `Runs`.

    What the runtime makes of some programs ends the process: those that others have made belong into a child.

    Args:
        asset: the folder NAME.aimodel.
    """

    def __init__(self, asset: Path):
        self._asset = asset
        self._functions: dict[str, Any] = {}

    def __enter__(self) -> Runtime:
        self._loop, self._stack = asyncio.new_event_loop(), AsyncExitStack()
        try:
            executable = AIModelAsset.load(self._asset).executable()
            self._model: Any = self._loop.run_until_complete(self._stack.enter_async_context(executable))
            self.names = list(self._model.function_names)
        except BaseException:
            self._loop.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._functions.clear()
        self._loop.run_until_complete(self._stack.aclose())
        self._loop.close()

    def function(self, name: str) -> Any:
        """A function of the runtime's own, loaded once."""
        if name not in self._functions:
            with _without_remarks():
                self._functions[name] = self._model.load_function(name)
        return self._functions[name]

    def start(self, arrays: Mapping[str, np.ndarray]) -> dict[str, NDArray]:
        return {name: NDArray(x) for name, x in arrays.items()}

    def write(self, states: dict[str, NDArray], arrays: Mapping[str, np.ndarray]) -> None:
        states.update(self.start(arrays))

    def arrays(self, states: Mapping[str, NDArray]) -> dict[str, np.ndarray]:
        return {name: x.numpy() for name, x in states.items()}

    def call(
        self, name: str, inputs: Mapping[str, np.ndarray], states: Mapping[str, NDArray] | None = None
    ) -> dict[str, np.ndarray]:
        given = {key: NDArray(x) for key, x in inputs.items()}
        outputs = self._loop.run_until_complete(self.function(name)(inputs=given, state=dict(states or {})))
        return {key: outputs[key].numpy() for key in outputs if key not in (states or {})}


@contextmanager
def _without_remarks() -> Iterator[None]:
    """The runtime writes a line for each function that it loads straight to standard error, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def zeros(shapes: Mapping[str, tuple[int, ...]], number_type: type) -> dict[str, np.ndarray]:
    """States before the first token."""
    return {name: np.zeros(shape, number_type) for name, shape in shapes.items()}


class InParts:
    """`decode` and `prefill` of a program, and the state of one text: session.Functions."""

    def __init__(self, runtime: Runs, layout: StateLayout, number_type: type):
        self._runtime, self._layout, self._number_type = runtime, layout, number_type
        self._states = runtime.start(zeros(apart_shapes(layout), number_type))

    def predict(self, function: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self._runtime.call(function, inputs, self._states)

    @property
    def state(self) -> np.ndarray:
        return packed(self._layout, self._runtime.arrays(self._states))

    @state.setter
    def state(self, value: np.ndarray) -> None:
        self._runtime.write(self._states, unpacked(self._layout, value.astype(self._number_type)))


def start_session(runtime: Runs, layout: StateLayout, number_type: type, learning: np.ndarray | None = None) -> Session:
    """A text before its first token, to be read by `decode` and `prefill`; with a learning scale if they take one."""
    K = layout.args.mini_batch_size
    return Session(InParts(runtime, layout, number_type), K, K, learning)


class Main:
    """`main` of a program as Apple's runner drives it, and the state of one text.

    Attributes:
        offset: tokens read so far.
    """

    def __init__(self, runtime: Runs, layout: StateLayout, number_type: type):
        self._runtime, self.offset = runtime, 0
        self._states = runtime.start(zeros(grouped_shapes(layout), number_type))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The three states by name."""
        return self._runtime.arrays(self._states)

    @arrays.setter
    def arrays(self, values: Mapping[str, np.ndarray]) -> None:
        self._runtime.write(self._states, values)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """The logits of each token, [n, V], in float32."""
        self.offset += len(ids)
        inputs = {
            runner_main.IDS: np.asarray(ids, np.int32)[None],
            runner_main.POSITIONS: np.arange(self.offset, dtype=np.int32)[None],
        }
        return self._runtime.call(runner_main.MAIN, inputs, self._states)[LOGITS][0].astype(np.float32)
