"""The live page over HTTP: what it answers, what it refuses, and that nothing ends it."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from mlx_ttt.errors import StateError
from mlx_ttt.watch import server as watch_server
from mlx_ttt.watch.server import Hub, OnlyTrustedHosts, Watcher

from .serving import Server, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("watch") / "log") as server:
        yield server


def until(events: Iterator[dict], **wanted) -> list[dict]:
    """The events up to one that has these values."""
    seen = []
    for event in events:
        seen.append(event)
        if wanted.items() <= event.items():
            return seen
    raise AssertionError(f"the events ended before {wanted}")


@pytest.mark.parametrize(
    ("serves_at", "header", "trusted"),
    [
        ("127.0.0.1", "127.0.0.1:8030", True),
        ("127.0.0.1", "localhost:8030", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "[::1]:8030", True),
        ("127.0.0.1", "127.0.0.2", True),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "evil.example:8030", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "10.0.0.7:8030", False),
        ("127.0.0.1", "[::1", False),
        ("::1", "[::1]:8030", True),
        ("0.0.0.0", "10.0.0.7:8030", True),
        ("0.0.0.0", "[fe80::1]:8030", True),
        ("0.0.0.0", f"{socket.gethostname()}:8030", True),
        ("0.0.0.0", "evil.example", False),
    ],
)
def test_which_hosts_are_trusted(serves_at, header, trusted):
    assert OnlyTrustedHosts(None, serves_at)._trusts(header) is trusted  # type: ignore[arg-type]


def test_what_goes_wrong_in_the_models_thread_is_told_and_ends_nothing(monkeypatch):
    told: list[dict] = []
    watcher = Watcher(lambda publish: (None, ""))  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(watcher._hub, "publish", told.append)

    def fail(error):
        raise error

    for error in (StateError("no such state"), ZeroDivisionError("by zero")):
        watcher._in_thread(lambda error=error: fail(error))
    watcher._thread.submit(told.append, {"kind": "alive"}).result()
    assert [event.get("message") for event in told] == ["no such state", "ZeroDivisionError: by zero", None]
    watcher._thread.shutdown()


def test_a_page_that_has_gone_is_forgotten():
    class Blank:
        def snapshot(self, join):
            join()
            return []

    async def look(watcher: Watcher) -> tuple[int, int]:
        events = watcher._events()
        await events.__anext__()
        there = len(watcher._hub._pages)
        await events.aclose()
        return there, len(watcher._hub._pages)

    watcher = Watcher(lambda publish: (Blank(), ""))  # type: ignore[arg-type, return-value]
    assert asyncio.run(look(watcher)) == (1, 0)
    watcher._thread.shutdown()


def test_a_page_that_does_not_read_is_let_go(monkeypatch):
    monkeypatch.setattr(watch_server, "MOST_EVENTS", 2)

    async def read() -> list[dict | None]:
        hub, page = Hub(), asyncio.Queue()
        hub.join(page)
        for i in range(5):
            hub.publish({"kind": str(i)})
        await asyncio.sleep(0)
        return [page.get_nowait() for _ in range(page.qsize())]

    assert asyncio.run(read()) == [{"kind": "0"}, {"kind": "1"}, None]


@pytest.mark.slow
def test_pages_of_other_sites_get_nothing(server):
    assert server.request("GET", "/")[0] == 200
    assert server.request("GET", "/", Host="evil.example")[0] == 403
    assert server.request("GET", "/events", Host="evil.example")[0] == 403
    assert server.post("stop", {}, Origin="http://evil.example")[0] == 403
    assert server.post("stop", {}, Origin=server.url)[0] == 202
    assert server.post("stop", {}, Content_Type="text/plain")[0] == 415


@pytest.mark.slow
def test_a_turn_and_its_events(server):
    with server.events() as events:
        until(events, kind="busy", busy=False)
        asked = {"sides": ["A"], "text": "ROMEO.\n", "tokens": 3, "temperature": 0.5, "seed": 1}
        assert server.post("turn", asked) == (202, {"ok": True})
        seen = until(events, kind="busy", busy=False)
        assert sum(event.get("written", False) for event in seen) == 3
        server.post("remember", {"side": "A", "name": "<script>"})
        states = until(events, kind="states")[-1]["states"]
        assert states[0]["name"] == "<script>"
        server.post("back", {"side": "B", "state": states[0]["id"]})
        assert until(events, kind="side", side="B")[-1]["name"] == "<script>"
        server.post("learning", {"side": "B", "learning": 0.5})
        until(events, kind="learning", side="B", learning=0.5)
        server.post("back", {"side": "B", "state": 99})
        assert until(events, kind="error")[-1]["message"] == "there is no state 99 (any more)"
        server.post("turn", {"sides": ["B"], "tokens": 4096})
        for path, asked in [("turn", {"sides": ["A"], "text": "x"}), ("back", {"side": "A", "state": "start"})]:
            status, answer = server.post(path, asked)
            assert status == 409 and answer["error"] == "the model is reading or writing: stop it first"
        server.post("stop", {})
        assert sum(event.get("written", False) for event in until(events, kind="busy", busy=False)) < 4096


BAD = [
    ("turn", {"sides": ["C"], "text": "x"}, "sides is ['C']"),
    ("turn", {"sides": "A", "text": "x"}, "sides is 'A'"),
    ("turn", {"sides": [["A"]], "text": "x"}, "sides is [['A']]"),
    ("turn", {"sides": ["A"], "text": 3}, "text is not a text"),
    ("turn", {"sides": ["A"], "text": "\ud800"}, "text is not a text"),
    ("turn", {"sides": ["A"], "text": ""}, "nothing to read"),
    ("turn", {"sides": ["A"], "text": "x", "tokens": -1}, "tokens is -1, expected 0 to 4096"),
    ("turn", {"sides": ["A"], "text": "x", "tokens": True}, "tokens is True"),
    ("turn", {"sides": ["A"], "text": "x", "temperature": float("nan")}, "temperature is nan, expected a number"),
    ("learning", {"side": "A", "learning": float("nan")}, "learning is nan"),
    ("learning", {"side": "A", "learning": -1}, "learning is -1, expected 0 to 10"),
    ("learning", {"side": "A", "learning": "x"}, "learning is 'x'"),
    ("learning", {"side": {}, "learning": 1}, "side is {}"),
    ("learning", {"learning": 1}, "side is None"),
    ("learning", {"side": "A", "learning": 10**400}, "learning is 1"),
    ("remember", {"side": "A", "name": "x" * 81}, "name is not a short text"),
    ("back", {"side": "A", "state": None}, "state is None"),
    ("back", {"side": "A", "state": [1]}, "state is [1]"),
    ("back", {"side": "A", "state": True}, "state is True"),
    ("forget", {"state": ["x"]}, "expected a number"),
    ("forget", {"state": True}, "state is True"),
    ("turn", [], "not a JSON object"),
]


@pytest.mark.slow
def test_bad_requests_are_answered_with_one_line(server):
    for path, asked, message in BAD:
        status, answer = server.post(path, asked)
        assert status == 400 and message in answer["error"] and "\n" not in answer["error"], (path, asked, answer)
    assert server.request("POST", "/turn", b"{", Content_Type="application/json")[0] == 400
    assert server.request("POST", "/turn", b"[" * 100_000, Content_Type="application/json")[0] == 400
    assert server.request("POST", "/turn", b"\xff\xfe", Content_Type="application/json")[0] == 400
    assert server.request("POST", "/turn", b" " * (5 << 20), Content_Type="application/json")[0] == 413
    assert server.request("GET", "/turn")[0] == 405
    assert server.request("GET", "/../../etc/passwd")[0] == 404


@pytest.mark.slow
def test_nothing_ends_the_server(server):
    rng = random.Random(0)
    for _ in range(60):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
            kind = rng.randrange(4)
            if kind == 0:
                raw.sendall(rng.randbytes(rng.randrange(1, 400)))
            elif kind == 1:
                raw.sendall(
                    b"POST /turn HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 1000\r\n\r\n{"
                )
            elif kind == 2:
                raw.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
                raw.recv(100)
            else:
                body = json.dumps({rng.choice("ab"): rng.choice([None, [], {}, 1e308])}).encode()
                head = f"POST /{rng.choice(['turn', 'forget', 'back'])} HTTP/1.1\r\nHost: localhost\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                raw.sendall(head.encode() + body)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # breaks it off
    with server.events() as events:
        until(events, kind="busy", busy=False)
    assert server.request("GET", "/")[0] == 200 and server.process.poll() is None
