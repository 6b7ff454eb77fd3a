"""The thread that generates. It is started again if it dies, and says if it is stuck."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import mlx.core as mx

from .engine import Engine
from .jobs import Job
from .metrics import Metrics

log = logging.getLogger("mlx_ttt.serve")

DIED = "the generation loop died and was started again; the server's log says why"


class Worker:
    """Runs all engines in turn, in one thread: MLX is not made for several."""

    def __init__(self, engines: Sequence[Engine], metrics: Metrics, stuck_after: float = 120.0):
        """
        Args:
            stuck_after: seconds without a result from a model that has work, after which it counts as stuck.
        """
        self.engines, self.metrics, self._stuck_after = engines, metrics, stuck_after
        self._wake = threading.Condition()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._stopped = False
        self._busy_since: float | None = None
        self._thread = self._started()

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="generation", daemon=True)
        thread.start()
        return thread

    # Called from other threads

    def submit(self, engine: Engine, jobs: Sequence[Job]) -> bool:
        """Give jobs to an engine, all or none: then its queue is full."""
        if not engine.submit(jobs):
            return False
        self.wake()
        return True

    def wake(self) -> None:
        with self._wake:
            self._wake.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Have the thread call a function between two steps."""
        future: Future = Future()
        self._calls.append((function, future))
        self.wake()
        return future

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._stopped = True
        self.wake()
        self._thread.join(timeout=10)

    def problem(self) -> str | None:
        """What is wrong with the thread, or None."""
        if not self._thread.is_alive():
            return "the generation thread is not running"
        since = self._busy_since
        if since is not None:
            quiet = time.monotonic() - max(since, *(engine.beat for engine in self.engines))
            if quiet > self._stuck_after:
                return f"generation has given nothing for {quiet:.0f} seconds"
        return None

    # The thread

    def _run(self) -> None:
        if mx.metal.is_available():  # keep the weights in memory that the GPU need not ask for
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        while not self._stopped:
            try:
                self._turn()
            except BaseException as error:  # whatever it is, the next requests are to be answered
                self._recover(error)

    def _turn(self) -> None:
        """What is called, a step of each engine; or wait for either."""
        self._busy_since = self._busy_since or time.monotonic()
        while self._calls:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():  # nobody waits for it any more
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        busy = [engine.step() for engine in self.engines]
        if any(busy):
            return
        self._busy_since = None
        with self._wake:
            if not self._calls and not self._stopped and not any(engine.waiting for engine in self.engines):
                self._wake.wait(timeout=1)

    def _recover(self, error: BaseException) -> None:
        """End the requests of a step that failed, and say what caused it."""
        running = ", ".join(f"{engine.running} running and {engine.waiting} waiting" for engine in self.engines)
        log.error("the generation loop died with %s; starting it again", running, exc_info=error)
        self.metrics.restarted()
        self._busy_since = None
        for engine in self.engines:
            engine.fail_all(500, DIED)
