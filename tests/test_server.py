"""`mlx-ttt serve`, over HTTP: many clients at once get what each gets alone."""

from __future__ import annotations

import json
import random
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

import mlx_lm
import pytest
from mlx_lm.server import convert_chat

ROOT = Path(__file__).parents[1]
# The 40 greedy tokens after these meet no near tie: the best two logits are 0.02 apart or more.
TEXTS = ["ROMEO:\n", "To be, or not to be, that is the question:\n", "First Witch.\n", "JULIET:\nO Romeo"]
MESSAGES = ["Who are you?", "Tell me of the sea.", "Good morrow, cousin.", "Sing a song."]


class Server:
    """A running `mlx-ttt serve`."""

    def __init__(self, process: subprocess.Popen, url: str):
        self.process, self.url = process, url

    def client(self):
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def complete(self, prompt: str, **options):
        return self.client().completions.create(model="default_model", prompt=prompt, **options)

    def status(self, path: str, body: bytes | None = None) -> int:
        try:
            with urllib.request.urlopen(self.url + path, body, timeout=30) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def memory(self) -> int:
        """Resident bytes."""
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)])) * 1024


@contextmanager
def serve(directory: Path, log: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from mlx_ttt.cli import main; main(prog_name='mlx-ttt')"
    command = [sys.executable, "-c", program, "serve", "--model", directory, "--port", str(port), *options]
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
def alone(directory):
    """What the model says to a prompt in a process of its own, with nobody else asking."""
    model, tokenizer = mlx_lm.load(str(directory))

    def generate(prompt: str, n: int) -> str:
        return mlx_lm.generate(model, tokenizer, tokenizer.encode(prompt), max_tokens=n)

    return generate


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory) -> Iterator[Server]:
    with serve(directory, tmp_path_factory.mktemp("server") / "log") as server:
        yield server
        assert server.status("/health") == 200


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
    expected |= {text: alone(convert_chat(messages(text)), 40) for text in MESSAGES}
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
def test_what_was_read_before_is_not_read_again(server, alone):
    text = "PROSPERO.\nOur revels now are ended. These our actors,\n"
    prompts = [text, text, text + "As I foretold you, were all spirits", text + "As I told you"]
    responses = [server.complete(prompt, max_tokens=20) for prompt in prompts]
    assert [response.choices[0].text for response in responses] == [alone(prompt, 20) for prompt in prompts]
    cached = [response.usage.prompt_tokens_details.cached_tokens for response in responses]
    assert cached == [0, *[responses[0].usage.prompt_tokens - 1] * 3]  # all of the text but its last token


@pytest.mark.slow
def test_a_text_that_the_server_has_written_is_continued(server, alone):
    text = TEXTS[1]
    for _ in range(3):
        text += server.complete(text, max_tokens=10).choices[0].text
    assert text == TEXTS[1] + alone(TEXTS[1], 30)


@pytest.mark.slow
def test_an_empty_prompt(server):
    answers = {server.complete("", max_tokens=10).choices[0].text for _ in range(2)}
    assert len(answers) == 1


@pytest.mark.slow
def test_a_request_with_a_seed_is_answered_outside_the_batch(server, alone):
    assert server.complete(TEXTS[2], max_tokens=20, seed=1).choices[0].text == alone(TEXTS[2], 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_",
    [
        b"{",
        b"[]",
        b"{}",
        {"prompt": 5},
        {"prompt": None},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "max_tokens": "many"},
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "stream": "yes"},
        {"prompt": "a", "logit_bias": {"a": 1}},
        {"prompt": "a", "model": "/no/such/model"},
        {"prompt": "a", "model": "default_model", "adapters": 5},
    ],
    ids=str,
)
def test_malformed_requests(server, request_):
    body = request_ if isinstance(request_, bytes) else json.dumps(request_).encode()
    assert 400 <= server.status("/v1/completions", body) < 500
    assert server.status("/v1/chat/completions", json.dumps({"messages": "hello"}).encode()) == 400
    assert server.complete("a", max_tokens=1).choices[0].finish_reason == "length"


@pytest.mark.slow
def test_a_client_that_hangs_up_frees_its_slot(directory, tmp_path, alone):
    """The server has one slot. Without an end of the first answer there would be no second one."""
    with serve(directory, tmp_path / "log", "--decode-concurrency", "1", "--prompt-concurrency", "1") as server:
        stream = server.complete(TEXTS[0], max_tokens=10**9, stream=True)
        for part, _ in zip(stream, range(5), strict=False):
            assert part.choices[0].text
        stream.close()
        assert server.complete(TEXTS[1], max_tokens=20).choices[0].text == alone(TEXTS[1], 20)


@pytest.mark.slow
def test_a_draft_model_in_a_request_is_not_used(directory, tmp_path):
    """The answer is an error, not a text: mlx-lm takes tokens back from no state that cannot give them back."""
    import openai

    with serve(directory, tmp_path / "log") as server:
        with pytest.raises(openai.APIError):
            server.complete("a", max_tokens=4, extra_body={"draft_model": str(directory)})
        assert "requires a trimmable prompt cache" in (tmp_path / "log").read_text()
        assert server.complete("a", max_tokens=4).choices[0].finish_reason == "length"


@pytest.mark.long
def test_memory_stays_flat_under_load(directory, tmp_path, shakespeare_dir):
    """Ten minutes of eight clients with ever new texts, some of whom hang up."""
    play = (shakespeare_dir.parent / "tempest.txt").read_text(encoding="utf-8")
    end = time.monotonic() + 600
    answers = [0] * 8

    def client(number: int, server: Server) -> None:
        choose = random.Random(number)
        api = server.client()
        while time.monotonic() < end:
            start = choose.randrange(len(play) - 2000)
            prompt = play[start : start + choose.randrange(20, 2000)]
            n = choose.randrange(5, 60)
            response = api.completions.create(model="default_model", prompt=prompt, max_tokens=n, stream=n % 2 == 0)
            if n % 2 == 0:
                for part, _ in zip(response, range(n if n % 3 else 4), strict=False):
                    assert part.choices
                response.close()
            answers[number] += 1

    with serve(directory, tmp_path / "log", "--log-level", "WARNING") as server, ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number, server) for number in range(8)]
        memory = []
        while time.monotonic() < end:
            time.sleep(10)
            memory.append(server.memory())
        for done in clients:
            done.result()
        assert server.status("/health") == 200
    print(f"{sum(answers)} answers, resident MB: {[round(x / 1e6) for x in memory]}")
    third = len(memory) // 3  # the first is for warming up; single figures jump with the prompts that are being read
    assert median(memory[-third:]) < 1.1 * median(memory[third:-third])
