"""What has happened since the server was started, in Prometheus's text format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # bounds of the histograms' buckets


class Histogram:
    """Counts times by how long they are, in seconds."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(_SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*_SECONDS, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counted by the front and by the generation loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.tokens: Counter[str] = Counter()
        self.left = self.restarts = self.failed_batches = 0
        self._first_token, self._queue = Histogram(), Histogram()

    def request(self, path: str, status: int) -> None:
        with self._lock:
            self.requests[path, status] += 1

    def client_left(self) -> None:
        with self._lock:
            self.left += 1

    def read(self, tokens: int) -> None:
        self.tokens["prompt"] += tokens  # only the loop counts tokens

    def wrote(self, tokens: int) -> None:
        self.tokens["generated"] += tokens

    def cached(self, tokens: int) -> None:
        self.tokens["cached"] += tokens

    def queued(self, seconds: float) -> None:
        with self._lock:
            self._queue.add(seconds)

    def first_token(self, seconds: float) -> None:
        with self._lock:
            self._first_token.add(seconds)

    def batch_failed(self) -> None:
        self.failed_batches += 1

    def restarted(self) -> None:
        self.restarts += 1

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All of it.

        Args:
            gauges: what is so now: name -> what it is, and its value.
        """
        with self._lock:
            return "".join(f"{line}\n" for line in self._lines(gauges))

    def _lines(self, gauges: Mapping[str, tuple[str, float]]) -> Iterator[str]:
        requests = ((f'{{path="{path}",status="{status}"}}', n) for (path, status), n in sorted(self.requests.items()))
        yield from _family("mlx_ttt_requests_total", "counter", "Requests answered.", requests)
        tokens = ((f'{{kind="{kind}"}}', self.tokens[kind]) for kind in ("prompt", "cached", "generated"))
        yield from _family("mlx_ttt_tokens_total", "counter", "Tokens read, found read already, and written.", tokens)
        for name, help, total in (
            ("clients_left", "Clients that left before their answer was complete.", self.left),
            ("restarts", "How often the generation loop was started again.", self.restarts),
            ("failed_batches", "Batches that were read again text by text.", self.failed_batches),
        ):
            yield from _family(f"mlx_ttt_{name}_total", "counter", help, [("", total)])
        for name, histogram, help in (
            ("time_to_first_token", self._first_token, "From a request to its first token."),
            ("queue_time", self._queue, "From a request to when its prompt is read."),
        ):
            yield f"# HELP mlx_ttt_{name}_seconds {help}"
            yield f"# TYPE mlx_ttt_{name}_seconds histogram"
            yield from histogram.lines(f"mlx_ttt_{name}_seconds")
        for name, (help, value) in gauges.items():
            yield from _family(f"mlx_ttt_{name}", "gauge", help, [("", value)])


def _family(name: str, kind: str, help: str, values: Iterable[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values:
        yield f"{name}{labels} {value:g}" if isinstance(value, float) else f"{name}{labels} {value}"
