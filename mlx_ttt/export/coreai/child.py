"""Core AI's runtime in a process of its own, so that what ends it does not end us.

On some programs it does not fail but stops the process, with a signal: four-bit constants that are not packed are one
way to get there (Linux, 1.0.0b3). The child keeps the states; calls and answers go through a pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError
from ..errors import first_line
from .runtime import Runtime

_PATIENCE = 10  # seconds that a child gets to end


class ChildRuntime:
    """A program that is compiled, loaded and run by a child, to be used as a context manager. See runtime.Runs.

    Args:
        asset: the folder NAME.aimodel.

    Raises:
        CheckpointError: the runtime ended the child, on entering or in any call.
        RuntimeError: the runtime refuses the program or a call.
    """

    def __init__(self, asset: Path):
        self._asset = asset

    def __enter__(self) -> ChildRuntime:
        self._log = tempfile.TemporaryFile()  # closed on leaving
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._asset, os.getpid()), daemon=True)
        kept = os.dup(2)
        try:  # what the runtime says to standard error when it ends itself is long
            os.dup2(self._log.fileno(), 2)
            self._process.start()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        theirs.close()
        try:
            self.names: list[str] = self._answer("loading it")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self._log.close()

    def start(self, arrays: Mapping[str, np.ndarray]) -> int:
        return self._ask("start", "taking states", arrays)

    def write(self, states: int, arrays: Mapping[str, np.ndarray]) -> None:
        self._ask("write", "taking states", states, arrays)

    def arrays(self, states: int) -> dict[str, np.ndarray]:
        return self._ask("arrays", "giving states", states)

    def call(self, name: str, inputs: Mapping[str, np.ndarray], states: int | None = None) -> dict[str, np.ndarray]:
        return self._ask("call", f"running {name!r}", name, inputs, states)

    def _ask(self, method: str, doing: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise self._ended(doing) from None
        return self._answer(doing)

    def _answer(self, doing: str) -> Any:
        try:
            error, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended(doing) from None
        if error is not None:
            raise RuntimeError(error)
        return value

    def _ended(self, doing: str) -> CheckpointError:
        self._process.join(_PATIENCE)
        code = self._process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
        self._log.seek(0)
        said = [line for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return CheckpointError(
            f"{self._asset}: Core AI's runtime ended itself ({how}) {doing}"
            + (f": {first_line(Exception(said[0]))}" if said else "")
        )


def _serve(connection: Connection, asset: Path, parent: int) -> None:
    """The child: answers until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which then closes the pipe
    states: list[Any] = []
    try:
        with Runtime(asset) as runtime:
            connection.send((None, runtime.names))
            while os.getppid() == parent:
                method, arguments = connection.recv()
                connection.send(_answered(runtime, states, method, arguments))
    except EOFError:
        pass
    except Exception as error:
        connection.send((first_line(error), None))


def _answered(runtime: Runtime, states: list[Any], method: str, arguments: tuple[Any, ...]) -> tuple[str | None, Any]:
    """An error or None, and the value. States are known to the parent by their place in a list."""
    try:
        if method == "start":
            states.append(runtime.start(*arguments))
            return None, len(states) - 1
        if method == "call":
            name, inputs, place = arguments
            return None, runtime.call(name, inputs, None if place is None else states[place])
        place, *rest = arguments
        return None, getattr(runtime, method)(states[place], *rest)
    except Exception as error:
        return first_line(error), None
