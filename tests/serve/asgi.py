"""The server's front without a network: requests go straight to the application."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from mlx_ttt.serve.app import Access, Front
from mlx_ttt.serve.engine import Engine, Room
from mlx_ttt.serve.metrics import Metrics
from mlx_ttt.serve.served import Limits, Served
from mlx_ttt.serve.states import States
from mlx_ttt.serve.worker import Worker


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream, less the last one, which says that it is complete."""
        events = [line.removeprefix("data: ") for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [json.loads(event) for event in events if event != "[DONE]"]

    @property
    def text(self) -> str:
        return self.json["choices"][0]["text"]


@dataclass
class Client:
    """Asks a front.

    Attributes:
        patience: after so many events of an answer the client leaves.
    """

    front: Front
    headers: dict[str, str] = field(default_factory=dict)
    patience: int = 10**9

    async def send(self, method: str, path: str, body: Any = b"", **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        path, _, query = path.partition("?")
        given = {"host": "localhost", **self.headers, **{k.replace("_", "-"): v for k, v in headers.items()}}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "scheme": "http",
            "server": ("localhost", 80),
            "client": ("127.0.0.1", 1),
            "headers": [(k.encode(), v.encode("utf-8")) for k, v in given.items()],
        }
        answer, left = Answer(0, {}, b""), asyncio.Event()
        pending, parts = [data], 0

        async def receive() -> dict:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            nonlocal parts
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.body += message.get("body", b"")
                parts += 1
                if parts >= self.patience:
                    left.set()
                    await asyncio.sleep(0)

        if self.patience == 0:
            asyncio.get_running_loop().call_later(0.05, left.set)
        await self.front.app(scope, receive, send)
        return answer

    def __call__(self, method: str, path: str, body: Any = b"", **headers: str) -> Answer:
        return asyncio.run(self.send(method, path, body, **headers))

    def complete(self, prompt: Any, **options: Any) -> Answer:
        return self("POST", "/v1/completions", {"prompt": prompt, **options})


def make_front(
    model: Any,
    tokenizer: Any,
    *,
    folder: Any = None,
    room: Room | None = None,
    limits: Limits | None = None,
    access: Access | None = None,
    quota: int = 10**9,
    ahead: bool = True,
) -> Front:
    metrics, limits = Metrics(), limits or Limits(max_tokens=4096)
    states = None if folder is None else States(folder, quota, model, tokenizer)
    engine = Engine(model, tokenizer, room=room, states=states, metrics=metrics, ahead=ahead)
    worker = Worker([engine], metrics, stuck_after=60)
    served = Served("shakespeare", engine, worker, limits, 0)
    return Front([served], worker, metrics, access or Access(), limits)
