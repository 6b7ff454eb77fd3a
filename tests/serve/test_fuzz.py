"""Requests made at random from the schema, right and wrong: every answer is 200 or says what is wrong with it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from typing import Any

import pytest

import mlx_ttt
from mlx_ttt.serve import schema
from mlx_ttt.serve.engine import Room
from mlx_ttt.serve.served import Limits

from .asgi import Client, make_front
from .test_app import BAD, TEMPLATE

PATHS = {
    "/v1/completions": schema.CompletionRequest,
    "/v1/chat/completions": schema.ChatRequest,
    "/v1/responses": schema.ResponseRequest,
    "/tokenize": schema.TokenizeRequest,
    "/detokenize": schema.DetokenizeRequest,
    "/v1/states/a/branch": schema.BranchRequest,
}
EXPECTED = {200, 400, 404, 413, 429, 507}
ODD = [None, True, False, 0, 1, -1, 2**31, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a"]
ODD += [
    "\0",
    "\u2028\U0001f600",
    "../x",
    [],
    [[]],
    [None],
    [0],
    ["a"],
    {},
    {"a": 1},
    {"": None},
    "a" * 5000,
    [1] * 3000,
]


class Fuzzer:
    """Values by a JSON schema, most of them right."""

    def __init__(self, seed: int):
        self.choose = random.Random(seed)

    def request(self) -> tuple[str, str, Any]:
        """A method, a path and a body."""
        choose = self.choose
        kind = choose.random()
        if kind < 0.05:
            name = choose.choice(["a", "b", "..", "%00", "a b", "é", "x" * 70])
            path = choose.choice(["/v1/states", f"/v1/states/{name}", f"/v1/states/{name}/content", "/metrics", "/"])
            return choose.choice(["GET", "PUT", "DELETE", "POST", "PATCH"]), path, choose.choice(ODD)
        if kind < 0.1:
            return "POST", "/v1/completions", {"prompt": "a", **choose.choice(BAD)[0]}
        if kind < 0.13:
            return "POST", choose.choice(list(PATHS)), bytes(choose.randrange(256) for _ in range(choose.randrange(60)))
        path = choose.choice([*PATHS, *["/v1/completions"] * 5])
        whole = PATHS[path].model_json_schema()
        return "POST", path, self.object(whole, whole.get("$defs", {}))

    def object(self, form: dict, defs: dict) -> dict:
        choose, required = self.choose, form.get("required", [])
        names = [n for n in form.get("properties", {}) if choose.random() < (0.97 if n in required else 0.15)]
        if "prompt" in form["properties"] and choose.random() < 0.9:
            names.append("prompt")
        made = {name: self.value(form["properties"][name], defs) for name in names}
        if isinstance(made.get("max_tokens"), int):
            made["max_tokens"] %= 12
        if "model" in made and choose.random() < 0.9:
            made["model"] = "shakespeare"
        if choose.random() < 0.03:
            made[choose.choice(["x", "suffix", "tools", ""])] = choose.choice(ODD)
        return made

    def value(self, form: dict, defs: dict) -> Any:
        choose = self.choose
        if choose.random() < 0.03:
            return choose.choice(ODD)
        if "$ref" in form:
            return self.value(defs[form["$ref"].rpartition("/")[2]], defs)
        if "anyOf" in form:
            return self.value(choose.choice(form["anyOf"]), defs)
        if "enum" in form or "const" in form:
            return choose.choice(form.get("enum", [form.get("const")]))
        kind = form.get("type")
        if kind == "object" and "properties" in form:
            return self.object(form, defs)
        if kind == "object":
            key = choose.choice(["3", "7", "300", "2047", "2048", "a"])
            return {key: self.value(form.get("additionalProperties", {}), defs)}
        if kind == "array":
            count = choose.choice([1, 1, 2, 3, 9])
            return [self.value(form.get("items", {}), defs) for _ in range(count)]
        if kind in ("integer", "number"):
            low = form.get("minimum", form.get("exclusiveMinimum", -5))
            high = min(form.get("maximum", form.get("exclusiveMaximum", 9)), max(low, 0) + 9)
            if form.get("maximum", form.get("exclusiveMaximum")) == 2**31:
                high = choose.choice([high, 2000, 2**31 - 1])
            number = choose.uniform(low, high)
            return number if kind == "number" else round(number)
        if kind == "boolean":
            return choose.random() < 0.5
        if kind == "string":
            return choose.choice(["a", "b", "ROMEO:\n", "To be, or not to be", "", "\u00e9\u4e2d", "a" * 300, "\0"])
        return choose.choice(ODD)


async def fuzz(client: Client, requests: int, seed: int, seconds: float) -> dict[int, int]:
    """So many requests, eight at a time, within this time; how many answers of each status came."""
    end = time.monotonic() + seconds
    statuses: dict[int, int] = {}
    fuzzer = Fuzzer(seed)

    async def one() -> None:
        method, path, body = fuzzer.request()
        data = body if isinstance(body, bytes) else json.dumps(body, allow_nan=True).encode("utf-8")
        leaves = fuzzer.choose.random() < 0.05
        asking = Client(client.front, patience=fuzzer.choose.randrange(3)) if leaves else client
        answer = await asking.send(method, path, data)
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        allowed = {*EXPECTED, 405, *([0, 499] if leaves else ())}
        assert answer.status in allowed, (method, path, data, answer)
        if answer.status >= 400 and answer.status != 499:
            assert set(answer.json["error"]) == {"message", "type", "param", "code"}, (method, path, data, answer)
        elif answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream") and not leaves:
            for event in answer.events:
                assert "error" not in event or event["error"] is None, (method, path, data, event)

    for _ in range(requests // 8):
        await asyncio.gather(*(one() for _ in range(8)))
        if time.monotonic() > end:
            break
    return statuses


def run(requests: int, seed: int, folder, seconds: float = math.inf) -> dict[int, int]:
    model, tokenizer = mlx_ttt.load()
    limits = Limits(body=100_000, max_tokens=12, default_tokens=4, seconds=60)
    front = make_front(model, tokenizer, folder=folder, room=Room(writing=32, queue=64), limits=limits, quota=3_000_000)
    front.first.engine.vocabulary.use_chat_template(TEMPLATE)
    try:
        started = time.monotonic()
        statuses = asyncio.run(fuzz(Client(front), requests, seed, seconds))
        assert front.metrics.restarts == front.metrics.failed_batches == 0
        assert front.worker.problem() is None
        assert Client(front).complete("ROMEO:\n", max_tokens=5).status == 200
        print(f"{statuses} in {time.monotonic() - started:.0f} s")
        return statuses
    finally:
        front.worker.stop()


@pytest.mark.slow
def test_a_minute_of_requests(tmp_path):
    """The form that CI runs."""
    statuses = run(10_000, 0, tmp_path, seconds=60)
    assert min(statuses[200], statuses[400]) > 20


@pytest.mark.long
def test_ten_thousand_requests(tmp_path):
    statuses = run(10_000, 1, tmp_path)
    assert min(statuses[200], statuses[400]) > 1000
