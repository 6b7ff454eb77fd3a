"""A running `mlx-ttt watch --serve`, and requests to it."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Server:
    def __init__(self, process: subprocess.Popen, port: int):
        self.process, self.port, self.url = process, port, f"http://127.0.0.1:{port}"

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, asked: object, **headers: str) -> tuple[int, dict]:
        headers = {"Content_Type": "application/json"} | headers
        status, body = self.request("POST", f"/{path}", json.dumps(asked).encode(), **headers)
        return status, json.loads(body)

    @contextmanager
    def events(self) -> Iterator[Iterator[dict]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", "/events")
            response = connection.getresponse()
            assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
            yield _events(iter(response.readline, b""))
        finally:
            connection.close()


def _events(lines: Iterator[bytes]) -> Iterator[dict]:
    quiet = 0  # signs of life since the last event, which keep a connection from timing out
    for line in lines:
        quiet = 0 if line.startswith(b"data: ") else quiet + line.startswith(b":")
        assert quiet < 8, "two minutes without an event"
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


@contextmanager
def serving(log: Path, *arguments: str) -> Iterator[Server]:
    program = "from mlx_ttt.cli import main; main(prog_name='mlx-ttt')"
    command = [sys.executable, "-c", program, "watch", "--serve", "--port", "0", *arguments]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"http://127\.0\.0\.1:(\d+)  ", line)
            assert found, line + log.read_text()
            yield Server(process, int(found[1]))
            assert process.poll() is None, log.read_text()
        finally:
            process.kill()
