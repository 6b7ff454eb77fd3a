"""The two ends of a pipe: a measured thing in a process of its own, and the process that asks it to run.

A worker answers one call at a time and sleeps on the pipe between them, so that it disturbs no other. This file needs
nothing but Python, so that a worker can run in another environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
WARM_UP = 4  # tokens of a decode that are not timed


class WorkerError(Exception):
    """A worker could not do what it was asked, or is gone. One line."""


def serve(make: Callable) -> None:
    """In the worker: make the subject from the JSON of the command line, and answer calls of its methods."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    subject = None
    for line in sys.stdin:
        call = json.loads(line)
        try:
            subject = subject or make(**json.loads(sys.argv[1]))
            answer = {"answer": getattr(subject, call["method"])(**call["arguments"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), file=answers, flush=True)


def resident_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Worker:
    """In the asking process: a worker that starts when it is first called.

    Args:
        module: the name of the module in this folder that serves.
        subject: arguments of what it serves.
        python: the interpreter; this one by default.
        threads: for BLAS libraries and OpenMP.
    """

    def __init__(self, module: str, subject: dict, *, python: str | None = None, threads: int):
        self._command = [python or sys.executable, "-m", f"benchmarks.{module}", json.dumps(subject)]
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
        self._environment = os.environ | dict.fromkeys(names, str(threads))
        self._process: subprocess.Popen | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None

    def call(self, method: str, **arguments):
        """Raises WorkerError: the method failed, or the process ended."""
        process = self._process or self._start()
        try:
            print(json.dumps({"method": method, "arguments": arguments}), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process ended: {self._last_words(process.wait())}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["answer"]

    def _start(self) -> subprocess.Popen:
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  until the process ends
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=ROOT,
            env=self._environment,
        )
        return self._process

    def _last_words(self, status: int) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().split("\n")
        self.stop()
        if status < 0:
            return f"killed by signal {-status} (out of memory?)"
        return next((line for line in reversed(lines) if line), f"exit status {status}")

    def stop(self) -> None:
        """End the process, if there is one. The next call starts another."""
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):  # of a call that it did not live to read
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._stderr.close()
            self._process = None
