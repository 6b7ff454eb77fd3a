"""What this machine can do at best: how fast it reads memory, and how fast it multiplies matrices."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import mlx_ttt  # noqa: F401  before MLX: OpenBLAS

import mlx.core as mx  # isort: skip
import numpy as np

from .protocol import serve

BYTES = 1 << 29  # more than caches hold
COLUMNS = 4096
REPETITIONS = 3
PAUSE = 0.1  # seconds: so long the threads of any BLAS may wait for more work, each busy on a core


class Limits:
    def __init__(self, dtype: str, threads: int):
        self.dtype, self.threads = getattr(mx, dtype), threads
        self.on_cpu = mx.default_device() == mx.cpu
        self.numbers = np.zeros(BYTES // 4, np.float32) + 1 if self.on_cpu else mx.ones((BYTES // 4,), mx.float32)
        self.side = 1024 if self.on_cpu else 4096
        self.a, self.b = (mx.random.normal((self.side, self.side)).astype(self.dtype) for _ in range(2))
        mx.eval(self.a, self.b)
        self._memory()
        self._multiply()

    def measure(self) -> dict:
        """bytes_per_second: an array read once; flops_per_second: a square product, 2 per multiply-add."""
        memory, multiply = self._memory(), self._multiply()
        return {"bytes_per_second": BYTES / memory, "flops_per_second": 2 * self.side**3 / multiply}

    def _memory(self) -> float:
        """On a CPU in NumPy, in as many threads as matrix products have: MLX reduces in one. For the largest of all
        numbers or a product with a vector, whichever is faster: the second reads in more places at a time."""
        if not self.on_cpu:
            return _fastest(lambda: mx.eval(mx.max(self.numbers)))
        parts = np.array_split(self.numbers, 4 * self.threads)
        matrix = self.numbers.reshape(-1, COLUMNS)
        vector = np.ones(COLUMNS, np.float32)
        with ThreadPoolExecutor(self.threads) as pool:
            return min(_fastest(lambda: list(pool.map(np.max, parts))), _fastest(lambda: matrix @ vector))

    def _multiply(self) -> float:
        return _fastest(lambda: mx.eval(self.a @ self.b.T))


def _fastest(function) -> float:
    """Seconds."""
    time.sleep(PAUSE)
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    serve(Limits)
