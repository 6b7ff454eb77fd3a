"""`mlx-ttt serve`, over HTTP: many clients at once get what each gets alone, whatever others send."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import mlx_ttt

from .test_app import BAD, TEMPLATE, TEXTS

ROOT = Path(__file__).parents[2]
MESSAGES = ["Who are you?", "Tell me of the sea.", "Good morrow, cousin.", "Sing a song."]


class Server:
    """A running `mlx-ttt serve`."""

    def __init__(self, process: subprocess.Popen, url: str):
        self.process, self.url = process, url
        self.port = int(url.rpartition(":")[2])

    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def complete(self, prompt, **options) -> Any:
        return self.client().completions.create(model="default_model", prompt=prompt, **options)

    def status(self, path: str, body: bytes | None = None) -> int:
        try:
            with urllib.request.urlopen(self.url + path, body, timeout=30) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def raw(self, data: bytes) -> bytes:
        """Send bytes as they are; what comes back until the server closes, or for five seconds."""
        received = b""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        with connection, contextlib.suppress(TimeoutError, ConnectionError):
            connection.sendall(data)
            while part := connection.recv(65536):
                received += part
        return received

    def memory(self) -> int:
        """Resident bytes."""
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)])) * 1024


@contextmanager
def serve(directory: Path, log: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from mlx_ttt.cli import main; main(prog_name='mlx-ttt')"
    command = [
        sys.executable,
        "-c",
        program,
        "serve",
        "--model",
        f"shakespeare={directory}",
        "--port",
        str(port),
        *options,
    ]
    with log.open("w") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        server = Server(process, f"http://127.0.0.1:{port}")
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                try:
                    assert server.status("/health") == 200
                    break
                except urllib.error.URLError:
                    time.sleep(0.1)
            yield server
        finally:
            process.kill()


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.fixture(scope="module")
def alone(directory):
    """What the model says to a prompt in this process, with nobody else asking."""
    model, tokenizer = mlx_ttt.load(directory)

    def generate(prompt: str, n: int) -> str:
        return mlx_ttt.generate(model, tokenizer, prompt, max_tokens=n)

    def answer(prompt: str, n: int) -> str:
        ids = tokenizer.encode(f"user: {prompt}\nassistant:", add_special_tokens=False)
        return mlx_ttt.generate(model, tokenizer, ids, max_tokens=n)

    generate.answer = answer
    return generate


@pytest.fixture(scope="module")
def server(directory, template, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serve(directory, folder / "log", "--chat-template", template, "--states", folder / "states") as server:
        yield server
        assert server.status("/health") == 200
        assert "Traceback" not in (folder / "log").read_text()


def messages(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def ask(server: Server, text: str, stream: bool, n: int) -> str:
    """One of TEXTS continued, or one of MESSAGES answered."""
    options = {"model": "default_model", "max_tokens": n, "stream": stream}
    if text in TEXTS:
        response = server.client().completions.create(prompt=text, **options)
        return "".join(part.choices[0].text for part in response) if stream else response.choices[0].text
    response = server.client().chat.completions.create(messages=messages(text), **options)
    if stream:
        return "".join(part.choices[0].delta.content or "" for part in response)
    return response.choices[0].message.content


@pytest.mark.slow
def test_eight_clients_at_once(server, alone):
    expected = {text: alone(text, 40) for text in TEXTS}
    expected |= {text: alone.answer(text, 40) for text in MESSAGES}
    together = threading.Barrier(8)

    def client(number: int, text: str) -> None:
        for turn in range(4):
            together.wait(timeout=120)
            time.sleep(0.02 * random.random())  # they join a batch that runs already
            n = 40 - 9 * ((number + turn) % 4)  # and leave it one after the other
            answer = ask(server, text, stream=(number + turn) % 2 == 0, n=n)
            assert expected[text].startswith(answer)
            assert len(answer) >= n or answer == expected[text]

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(client, *numbered) for numbered in enumerate(expected)]:
            done.result()


@pytest.mark.slow
def test_the_openai_client(server, alone):
    """Every call of it that is answered here, and its errors."""
    import openai

    client = server.client()
    assert [model.id for model in client.models.list()] == ["shakespeare"]
    assert client.models.retrieve("shakespeare").id == "shakespeare"
    several = client.completions.create(model="shakespeare", prompt=TEXTS[:2], max_tokens=9, logprobs=2, echo=True)
    assert [c.text for c in several.choices] == [text + alone(text, 9) for text in TEXTS[:2]]
    assert sum(len(c.logprobs.token_logprobs) for c in several.choices) == several.usage.total_tokens
    response = client.responses.create(model="shakespeare", input="Who are you?", max_output_tokens=9)
    assert response.output_text == alone.answer("Who are you?", 9)
    events = list(client.responses.create(model="shakespeare", input="Who are you?", max_output_tokens=9, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == response.output_text
    assert events[-1].type == "response.incomplete"  # cut by max_output_tokens
    book = client.completions.create(
        model="shakespeare", prompt=TEXTS[1], max_tokens=0, extra_body={"save_state": "book"}
    )
    assert book.model_extra["state"]["id"] == "book"
    more = client.completions.create(
        model="shakespeare", prompt="\n", max_tokens=9, extra_body={"state": "book", "learning": 0}
    )
    assert more.usage.completion_tokens == 9
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="shakespeare", prompt="a", temperature=9)
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="/etc", prompt="a")
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(
            model="shakespeare", messages=messages("a"), response_format={"type": "json_object"}
        )


@pytest.mark.slow
def test_raw_bytes(server, alone):
    body = json.dumps({"prompt": TEXTS[0], "max_tokens": 5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    assert b"200 OK" in server.raw(head.encode() + b"Connection: close\r\n\r\n" + body)
    assert b"200 OK" in server.raw(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    )
    for data in (b"", b"\0" * 1000, b"GET\r\n\r\n", b"POST /v1/completions HTTP/9.9\r\n\r\n", b"A" * 200_000):
        server.raw(data)
    server.raw(head.encode() + b"\r\n" + body[:10])  # a body that does not come to its end
    server.raw(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n")
    assert ask(server, TEXTS[0], stream=False, n=9) == alone(TEXTS[0], 9)


@pytest.mark.slow
def test_a_running_request_is_finished_when_the_server_is_told_to_end(directory, tmp_path, alone):
    with serve(directory, tmp_path / "log") as server:
        stream = server.complete(TEXTS[0], max_tokens=40, stream=True)
        text = next(stream).choices[0].text
        server.process.send_signal(signal.SIGTERM)
        text += "".join(part.choices[0].text for part in stream)
        assert text == alone(TEXTS[0], 40)
        assert server.process.wait(timeout=30) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_what_runs_too_long_is_ended_with_the_server(directory, tmp_path):
    with serve(directory, tmp_path / "log", "--drain", "1", "--max-tokens", "1000000000") as server:
        options = {"max_tokens": 10**9, "logit_bias": {"2": -100}}
        stream = server.complete("a", stream=True, **options)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=30) == 130


@pytest.mark.slow
def test_a_port_in_use(server):
    program = "from mlx_ttt.cli import main; main(prog_name='mlx-ttt')"
    command = [sys.executable, "-c", program, "serve", "--port", str(server.port)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: cannot listen on 127.0.0.1 port {server.port}:")
    assert result.stderr.count("\n") == 1


# ---- The soak: good requests, bad ones, and clients that leave -------------------------------------------------------


def soak(directory: Path, log: Path, play: str, seconds: float) -> tuple[int, int, list[int]]:
    """Eight clients at once. Returns how many good and bad answers came, and the server's memory on the way."""
    model, tokenizer = mlx_ttt.load(directory)
    choose = random.Random(0)
    starts = [choose.randrange(len(play) - 2000) for _ in range(40)]
    prompts = [play[start : start + choose.randrange(20, 2000)] for start in starts]
    expected = {prompt: _certain(model, tokenizer, prompt, 24) for prompt in prompts}
    end = time.monotonic() + seconds
    good, bad = [0] * 8, [0] * 8

    def client(number: int, server: Server) -> None:
        choose, api = random.Random(number), server.client()
        while time.monotonic() < end:
            kind = choose.random()
            prompt = choose.choice(prompts)
            options: dict[str, Any] = {"model": "default_model", "prompt": prompt}
            if kind < 0.3:
                fields, _ = choose.choice(BAD)
                body = json.dumps({"prompt": "a", **fields} if fields else {}).encode()
                assert server.status("/v1/completions", body) in (400, 404), fields
                bad[number] += 1
            elif kind < 0.45:  # leaves in the midst
                stream = api.completions.create(**options, max_tokens=4000, stream=True)
                for _, _ in zip(stream, range(choose.randrange(4)), strict=False):
                    pass
                stream.close()
            elif kind < 0.55:  # others in the batch, with all that makes it differ
                answer = api.completions.create(
                    **options,
                    max_tokens=choose.randrange(30),
                    temperature=1,
                    n=3,
                    logprobs=3,
                    top_p=0.9,
                    frequency_penalty=0.5,
                    extra_body={"learning": choose.choice([0, 0.5, 1])},
                )
                assert len(answer.choices) == 3
            else:
                stream = choose.random() < 0.5
                answer = api.completions.create(**options, max_tokens=24, stream=stream)
                text = "".join(p.choices[0].text for p in answer) if stream else answer.choices[0].text
                assert text.startswith(expected[prompt]), (text, expected[prompt])
                good[number] += 1

    memory: list[int] = []
    options = ("--log-level", "WARNING", "--max-tokens", "4000")  # one of the bad requests asks for 5000
    with serve(directory, log, *options) as server, ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number, server) for number in range(8)]
        while time.monotonic() < end:
            time.sleep(seconds / 60)
            memory.append(server.memory())
        for done in clients:
            done.result()
        assert server.status("/health") == 200
        metrics = urllib.request.urlopen(server.url + "/metrics").read().decode()
        assert "mlx_ttt_restarts_total 0" in metrics
        assert "mlx_ttt_failed_batches_total 0" in metrics
    assert "Traceback" not in log.read_text()
    return sum(good), sum(bad), memory


def _certain(model, tokenizer, prompt: str, n: int) -> str:
    """The model's text up to the first near tie, where the rounding of a batch may decide otherwise."""
    text = ""
    for response in mlx_ttt.stream_generate(model, tokenizer, prompt, max_tokens=n):
        second, best = sorted(response.logprobs.tolist())[-2:]
        if best - second < 1e-3:
            break
        text += response.text
    return text


@pytest.fixture
def play(shakespeare_dir) -> str:
    return (shakespeare_dir.parent / "tempest.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_minute_of_good_and_bad_requests(directory, tmp_path, play):
    """The form of the soak that CI runs; memory needs longer to be flat."""
    good, bad, _ = soak(directory, tmp_path / "log", play, seconds=60)
    assert min(good, bad) > 0


@pytest.mark.long
def test_ten_minutes_of_good_and_bad_requests(directory, tmp_path, play):
    """Answers stay those that a client gets alone, and memory stays flat."""
    good, bad, memory = soak(directory, tmp_path / "log", play, seconds=600)
    print(f"{good} good answers, {bad} refusals, resident MB: {[round(x / 1e6) for x in memory]}")
    third = len(memory) // 3  # the first is for warming up; single figures jump with the prompts that are being read
    assert median(memory[-third:]) < 1.1 * median(memory[third:-third])
