"""What the server answers, without a network: to good requests what the model says alone, to bad ones why not."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_ttt
from mlx_ttt.serve.app import Access
from mlx_ttt.serve.engine import Room
from mlx_ttt.serve.served import Limits
from mlx_ttt.text.state import read

from .asgi import Client, make_front

# The 40 greedy tokens after these meet no near tie: the best two logits are 0.02 apart or more.
TEXTS = ["ROMEO:\n", "To be, or not to be, that is the question:\n", "First Witch.\n", "JULIET:\nO Romeo"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def loaded(directory):
    return mlx_ttt.load(directory)


@pytest.fixture(scope="module")
def front(loaded, tmp_path_factory):
    front = make_front(*loaded, folder=tmp_path_factory.mktemp("states"))
    yield front
    assert front.metrics.restarts == front.metrics.failed_batches == 0
    front.worker.stop()


@pytest.fixture
def client(front):
    return Client(front)


@pytest.fixture
def started(loaded):
    """Makes fronts that are ended with the test."""
    fronts = []

    def start(model=loaded[0], **options):
        fronts.append(make_front(model, loaded[1], **options))
        return fronts[-1]

    yield start
    for front in fronts:
        front.worker.stop()


def alone(loaded, prompt, n: int, **options) -> str:
    return mlx_ttt.generate(*loaded, prompt, max_tokens=n, **options)


@pytest.mark.slow
class TestCompletions:
    def test_text_and_token_ids_one_or_several(self, client, loaded):
        ids = [loaded[1].encode(text) for text in TEXTS[:2]]
        expected = [alone(loaded, text, 20) for text in TEXTS[:2]]
        for prompts in (TEXTS[:2], ids):
            assert client.complete(prompts[0], max_tokens=20).text == expected[0]
            choices = client.complete(prompts, max_tokens=20).json["choices"]
            assert [choice["text"] for choice in choices] == expected
            assert [choice["index"] for choice in choices] == [0, 1]

    def test_log_probabilities_are_those_of_the_model(self, client, loaded):
        """Against one call of the model on the whole text."""
        model, tokenizer = loaded
        answer = client.complete(TEXTS[0], max_tokens=6, echo=True, logprobs=3).json
        choice, told = answer["choices"][0], answer["choices"][0]["logprobs"]
        written = alone(loaded, TEXTS[0], 6)
        assert choice["text"] == TEXTS[0] + written
        ids = tokenizer.encode(TEXTS[0])
        for response in mlx_ttt.stream_generate(model, tokenizer, TEXTS[0], max_tokens=6):
            ids.append(response.token)
        logits = model(mx.array([ids]))[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        expected = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
        for i, top in enumerate(told["top_logprobs"][1:]):
            best = sorted(logprobs[i].tolist())[-3:]
            assert sorted(top.values())[-3:] == pytest.approx(best, abs=1e-3)
        assert told["top_logprobs"][-1][told["tokens"][-1]] == max(told["top_logprobs"][-1].values())  # greedy
        assert "".join(told["tokens"][-6:]) == written
        assert told["text_offset"] == [sum(map(len, told["tokens"][:i])) for i in range(len(ids))]

    def test_a_prompt_alone_can_be_measured(self, client):
        """max_tokens 0 with echo; and as evaluation harnesses do it, with a token that is thrown away."""
        measured = client.complete(TEXTS[1], max_tokens=0, echo=True, logprobs=1).json["choices"][0]
        more = client.complete(TEXTS[1], max_tokens=1, echo=True, logprobs=1).json["choices"][0]
        assert measured["text"] == TEXTS[1]
        assert measured["logprobs"]["token_logprobs"] == more["logprobs"]["token_logprobs"][:-1]

    def test_a_seed_repeats_a_text(self, client):
        options = {"max_tokens": 12, "temperature": 1.0, "seed": 7, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
        first = client.complete(TEXTS[0], n=3, **options).json["choices"]
        assert client.complete([TEXTS[1], TEXTS[0]], n=3, **options).json["choices"][3:] == [
            {**choice, "index": choice["index"] + 3} for choice in first
        ]  # in another batch, too
        assert len({choice["text"] for choice in first}) == 3
        assert client.complete(TEXTS[0], **options).text == first[0]["text"]
        assert client.complete(TEXTS[0], **{**options, "seed": 8}).text != first[0]["text"]

    def test_the_best_of_several(self, client):
        options = {"max_tokens": 5, "temperature": 1.0, "seed": 1, "logprobs": 0}
        several = client.complete(TEXTS[0], n=6, **options).json["choices"]
        best = client.complete(TEXTS[0], best_of=6, n=2, **options).json["choices"]
        means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) / 5 for c in several}
        assert [c["text"] for c in best] == sorted(means, key=lambda text: -means[text])[:2]

    def test_stop_texts_logit_bias_and_penalties(self, client, loaded):
        text = alone(loaded, TEXTS[0], 40)
        stop = text[20:24]
        stopped = client.complete(TEXTS[0], max_tokens=40, stop=["#never#", stop]).json["choices"][0]
        assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(stop)], "stop")
        assert (
            client.complete(TEXTS[0], max_tokens=3, logit_bias={"300": 100}).text
            == (client("POST", "/detokenize", {"tokens": [300] * 3}).json["prompt"])
        )
        options = {"max_tokens": 20, "logprobs": 0}
        for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 10.0}):
            bias = {"300": 8, "301": 7.5, "302": 7}
            tokens = client.complete(TEXTS[0], logit_bias=bias, **options, **penalty).json
            without = client.complete(TEXTS[0], logit_bias=bias, **options).json
            names = [x["choices"][0]["logprobs"]["tokens"] for x in (tokens, without)]
            assert len(set(names[0])) > len(set(names[1]))

    def test_a_stream_is_the_same(self, client, loaded):
        options = {"max_tokens": 15, "logprobs": 2, "echo": True, "n": 2}
        whole = client.complete(TEXTS[0], **options).json
        events = client.complete(TEXTS[0], stream=True, stream_options={"include_usage": True}, **options).events
        for index in range(2):
            parts = [c for e in events for c in e["choices"] if c["index"] == index]
            assert "".join(part["text"] for part in parts) == whole["choices"][index]["text"]
            told = [x for part in parts for x in part["logprobs"]["text_offset"]]
            assert told == whole["choices"][index]["logprobs"]["text_offset"]
            assert [part["finish_reason"] for part in parts] == [None] * 15 + ["length"]
        assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 30

    def test_what_was_read_before_is_not_read_again(self, client, loaded):
        text = "PROSPERO.\nOur revels now are ended. These our actors,\n"
        prompts = [text, text, text + "As I foretold you, were all spirits", text + "As I told you"]
        answers = [client.complete(prompt, max_tokens=20) for prompt in prompts]
        assert [answer.text for answer in answers] == [alone(loaded, prompt, 20) for prompt in prompts]
        usage = [answer.json["usage"] for answer in answers]
        cached = [u["prompt_tokens_details"]["cached_tokens"] for u in usage]
        assert cached == [0, *[usage[0]["prompt_tokens"] - 1] * 3]  # all of the text but its last token

    def test_learning(self, client, loaded):
        long = TEXTS[1] * 3
        for learning in (0.0, 0.5):
            assert client.complete(long, max_tokens=20, learning=learning).text == alone(
                loaded, long, 20, learning=learning
            )
        both = asyncio.run(_together(client, [{"prompt": long, "learning": x, "max_tokens": 20} for x in (0.0, 1.0)]))
        assert [answer.text for answer in both] == [alone(loaded, long, 20, learning=x) for x in (0.0, 1.0)]

    def test_an_empty_prompt(self, client):
        assert client.complete("", max_tokens=5).text == client.complete([1], max_tokens=5).text


async def _together(client, bodies):
    return await asyncio.gather(*(client.send("POST", "/v1/completions", body) for body in bodies))


class TestChat:
    @pytest.fixture
    def chat(self, loaded):
        front = make_front(loaded[0], mlx_ttt.load()[1])
        front.first.engine.vocabulary.use_chat_template(TEMPLATE)
        yield Client(front)
        front.worker.stop()

    def ask(self, chat, **options):
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]}
        ]
        return chat("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 9, **options})

    @pytest.mark.slow
    def test_an_answer(self, chat, loaded):
        expected = alone(loaded, loaded[1].encode("user: Who are you?\nassistant:", add_special_tokens=False), 9)
        answer = self.ask(chat, logprobs=True, top_logprobs=2).json
        assert answer["choices"][0]["message"]["content"] == expected
        told = answer["choices"][0]["logprobs"]["content"]
        assert b"".join(bytes(token["bytes"]) for token in told).decode() == expected
        assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] for token in told)
        events = self.ask(chat, stream=True).events
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == expected
        response = chat("POST", "/v1/responses", {"input": "Who are you?", "max_output_tokens": 9}).json
        assert response["output"][0]["content"][0]["text"] == expected
        events = chat("POST", "/v1/responses", {"input": "Who are you?", "max_output_tokens": 9, "stream": True}).events
        assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == expected
        assert [e["sequence_number"] for e in events] == list(range(len(events)))

    def test_without_a_template(self, client):
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/responses", {"input": "a"}),
        ):
            answer = client("POST", path, body)
            assert answer.status == 400
            assert "--chat-template" in answer.json["error"]["message"]

    def test_a_template_that_refuses(self, loaded):
        front = make_front(loaded[0], mlx_ttt.load()[1])
        front.first.engine.vocabulary.use_chat_template("{{ raise_exception('no') }}")
        assert self.ask(Client(front)).status == 400
        front.worker.stop()


BAD = [
    ({"prompt": 5}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({}, "prompt"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 3]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"min_p": math.nan}, "min_p"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 33}, "n"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"best_of": 33}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"suffix": "end"}, "suffix"),
    ({"tools": [{}]}, "tools"),
    ({"adapters": 5}, "adapters"),
    ({"draft_model": "x"}, "draft_model"),
    ({"metadata": {"a": math.nan}}, "metadata"),
    ({"learning": -1}, "learning"),
    ({"learning": math.nan}, "learning"),
    ({"model": "/no/such/model"}, "model"),
    ({"model": "../shakespeare"}, "model"),
    ({"model": 5}, "model"),
    ({"state": "../a"}, "state"),
    ({"state": "nowhere"}, "state"),
    ({"save_state": "a/b"}, "save_state"),
    ({"save_state": "a", "n": 2}, "save_state"),
    ({"save_state": ".a"}, "save_state"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=str)
def test_a_bad_field_is_named(client, fields, param):
    body = fields if "prompt" in fields or not fields else {"prompt": "a", **fields}
    answer = client("POST", "/v1/completions", json.dumps(body).encode())
    assert answer.status == (404 if fields in ({"state": "nowhere"},) or "/" in str(fields.get("model")) else 400)
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert "\n" not in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"\xff", b'{"prompt": "\\ud800"}', b"[" * 100_000], ids=repr)
def test_a_body_that_is_no_object(client, body):
    assert client("POST", "/v1/completions", body[:]).status == 400


def test_other_paths_and_methods(client):
    assert client("GET", "/v1/completions").status == 405
    assert client("GET", "/nothing").json["error"]["type"] == "not_found_error"
    assert client("GET", "/v1/models").json["data"][0]["id"] == "shakespeare"
    assert client("GET", "/v1/models/shakespeare").status == 200
    assert client("GET", "/v1/models/other/model").status == 404


def test_tokens_and_back(client, loaded):
    told = client("POST", "/tokenize", {"prompt": TEXTS[0]}).json
    assert told == {"tokens": loaded[1].encode(TEXTS[0]), "count": len(told["tokens"])}
    assert client("POST", "/detokenize", {"tokens": told["tokens"]}).json == {"prompt": TEXTS[0]}
    assert client("POST", "/detokenize", {"tokens": [2**31 - 1]}).status == 400


class TestAccess:
    def test_a_key(self, started):
        client = Client(started(access=Access(key="secret")))
        assert client("GET", "/v1/models").status == 401
        assert client("GET", "/v1/models", authorization="Bearer secre").status == 401
        assert client("GET", "/v1/models", authorization="Bearer \u00e9").status == 401
        assert client("GET", "/v1/models", authorization="Bearer secret").status == 200
        assert client("GET", "/health").status == 200

    def test_web_pages_of_other_origins(self, client, started):
        assert client("GET", "/v1/models", origin="http://evil.example").status == 403
        allowed = Client(started(access=Access(origins=("http://app.example",))))
        answer = allowed("GET", "/v1/models", origin="http://app.example")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "http://app.example")
        assert allowed("GET", "/v1/models", origin="http://evil.example").status == 403

    def test_other_names_of_this_machine(self, started):
        client = Client(started(access=Access(hosts=frozenset({"localhost", "127.0.0.1", "::1"}))))
        hosts = ["localhost:8080", "127.0.0.1", "[::1]:8080", "evil.example:8080", ""]
        assert [client("GET", "/v1/models", host=host).status for host in hosts] == [200, 200, 200, 403, 403]

    def test_limits(self, started):
        limits = Limits(body=1000, prompt=10, max_tokens=4, default_tokens=9)
        client = Client(started(limits=limits))
        assert client.complete("a" * 2000).status == 413
        assert client.complete("ROMEO and JULIET, " * 9).json["error"]["code"] == "context_length_exceeded"
        assert client.complete("a", max_tokens=5).status == 400
        assert client.complete("a").json["usage"]["completion_tokens"] == 4

    @pytest.mark.slow
    def test_a_full_queue(self, started):
        """One place to write and two to wait."""
        front = started(room=Room(writing=1, reading=1, queue=2), limits=Limits(max_tokens=4096))
        bodies = [{"prompt": "a", "max_tokens": 40, "logit_bias": {"2": -100}} for _ in range(8)]
        answers = asyncio.run(_together(Client(front), bodies))
        full = [a for a in answers if a.status == 429]
        assert full
        assert all(a.headers["retry-after"] for a in full)
        assert {a.status for a in answers} == {200, 429}
        assert Client(front).complete(["a"] * 3).status == 400

    def test_a_request_that_takes_too_long(self, started):
        front = started(limits=Limits(seconds=0.2, max_tokens=10**9))
        assert Client(front).complete("a", max_tokens=10**8, logit_bias={"2": -100}).status == 504

    def test_a_server_that_ends(self, started):
        front = started()
        front.draining = True
        answer = Client(front).complete("a")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert Client(front)("GET", "/health").status == 503


class TestClientsThatLeave:
    @pytest.mark.parametrize("stream", [False, True])
    def test_the_place_is_free_at_once(self, started, loaded, stream):
        """There is one place. Without an end of the first answer there would be no second one."""
        front = started(room=Room(writing=1, reading=1), limits=Limits(max_tokens=10**9))
        gone = Client(front, patience=3 if stream else 0)
        gone.complete(TEXTS[0], max_tokens=10**8, stream=stream, logit_bias={"2": -100})
        deadline = time.monotonic() + 5
        while front.first.engine.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert front.first.engine.running == 0
        assert Client(front).complete(TEXTS[1], max_tokens=10).text == alone(loaded, TEXTS[1], 10)
        assert front.metrics.left == 1


class Failing(nn.Module):
    """A model that fails on a batch with a certain token in it, when some layers have read it already."""

    def __init__(self, model, token: int):
        super().__init__()
        self.model, self.args, self.token, self.make_cache = model, model.args, token, model.make_cache

    def __call__(self, ids, cache=None, learning=1.0):
        if self.token in ids.flatten().tolist():
            self.model(ids, cache)
            raise RuntimeError("out of memory")
        return self.model(ids, cache, learning)


@pytest.mark.slow
class TestFailures:
    def test_a_text_on_which_the_model_fails_ends_alone(self, started, loaded):
        """The others are read again, and get what they get alone, also in a stream."""
        token = 300
        front = started(Failing(loaded[0], token))
        client = Client(front)
        bodies = [{"prompt": text, "max_tokens": 30} for text in TEXTS[:3]]
        bodies.append({"prompt": [1, 5, token], "max_tokens": 30})  # fails when it is read
        bodies.append({"prompt": "a", "max_tokens": 30, "logit_bias": {str(token): 100}})  # when it is written
        answers = asyncio.run(_together(client, bodies))
        assert [answer.status for answer in answers] == [200, 200, 200, 500, 500]
        assert [answer.text for answer in answers[:3]] == [alone(loaded, text, 30) for text in TEXTS[:3]]
        assert front.metrics.failed_batches >= 1
        assert front.metrics.restarts == 0

    def test_a_loop_that_dies_is_started_again(self, started, loaded, monkeypatch, caplog):
        front = started()
        engine, step = front.first.engine, front.first.engine.step

        def die():
            if engine.waiting:
                raise SystemExit("the end")
            return step()

        monkeypatch.setattr(engine, "step", die)
        answer = Client(front).complete("a")
        assert (answer.status, "died" in answer.json["error"]["message"]) == (500, True)
        assert "the end" in caplog.text
        monkeypatch.undo()
        assert Client(front).complete(TEXTS[0], max_tokens=9).text == alone(loaded, TEXTS[0], 9)
        assert front.metrics.restarts == 1
        assert Client(front)("GET", "/health").status == 200

    def test_a_call_whose_client_has_left_is_left_out(self, started, loaded):
        front = started()
        release = threading.Event()
        first, second = front.worker.call(lambda: release.wait(10)), front.worker.call(lambda: 1)
        assert second.cancel()
        release.set()
        first.result()
        assert front.worker.call(lambda: 2).result(10) == 2
        assert front.metrics.restarts == 0

    def test_health_fails_when_generation_is_stuck(self, started, loaded, monkeypatch):
        front = started()
        front.worker._stuck_after = 0.05
        release = threading.Event()
        call = front.worker.call(lambda: release.wait(10))
        time.sleep(0.2)
        assert Client(front)("GET", "/health").status == 503
        release.set()
        call.result()
        time.sleep(0.1)
        assert Client(front)("GET", "/health").status == 200


class TestStates:
    def test_a_text_goes_on_from_a_state(self, client, loaded):
        book = TEXTS[1] * 2
        saved = client.complete(book, max_tokens=0, save_state="book").json
        assert saved["state"] == {"id": "book", "tokens": len(loaded[1].encode(book))}
        state = read(*loaded, book)
        expected = mlx_ttt.generate(*loaded, "And then", state=state, max_tokens=15)
        for _ in range(2):  # the state stays as it is
            assert client.complete("And then", state="book", max_tokens=15).text == expected
        with_more = client.complete("And then", state="book", max_tokens=15, save_state="more", stream=True).events
        assert with_more[-1]["state"] == {"id": "more", "tokens": len(state)}
        rest = client.complete(None, state="more", max_tokens=10).text
        assert rest == mlx_ttt.generate(*loaded, "", state=state, max_tokens=10)

    def test_list_branch_download_upload_delete(self, client):
        client.complete(TEXTS[0], max_tokens=3, save_state="one")
        assert client("POST", "/v1/states/one/branch", {"name": "two"}).json["id"] == "two"
        listed = client("GET", "/v1/states").json
        assert {"one", "two"} <= {state["id"] for state in listed["data"]}
        content = client("GET", "/v1/states/one/content").body
        assert client("PUT", "/v1/states/three/content", content).json == client("GET", "/v1/states/three").json
        texts = {client.complete("a", state=name, max_tokens=9).text for name in ("one", "two", "three")}
        assert len(texts) == 1
        assert client("DELETE", "/v1/states/one").status == 200
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/branch")):
            assert client(method, f"/v1/states/one{path}", {"name": "x"}).status == 404

    @pytest.mark.parametrize("name", ["..", "%2e%2e", ".hidden", "a" * 65, "a\x00", "a b", "é"])
    def test_a_name_cannot_leave_the_folder(self, client, name):
        assert client("PUT", f"/v1/states/{name}/content", b"x").status == 400
        assert client("GET", f"/v1/states/{name}/content").status == 400

    def test_what_is_no_state_is_refused(self, client, front):
        for content in (b"", b"no state", b"\x08\0\0\0\0\0\0\0{}      "):
            assert client("PUT", "/v1/states/bad/content", content).status == 400
        assert "bad" not in front.first.states.names()

    def test_a_quota(self, started, tmp_path):
        client = Client(started(folder=tmp_path / "states", quota=900_000))  # two of them
        answers = [client.complete("a", max_tokens=0, save_state=name) for name in ("a", "b", "c", "a")]
        assert [answer.status for answer in answers] == [200, 200, 507, 200]
        assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["a.state", "b.state"]
        assert client("POST", "/v1/states/a/branch", {"name": "c"}).status == 507
        assert client("PUT", "/v1/states/c/content", client("GET", "/v1/states/a/content").body).status == 507
        assert client("PUT", "/v1/states/c/content", b"0" * 900_001).status == 413

    def test_a_server_without_states(self, started):
        client = Client(started())
        assert client.complete("a", save_state="a").json["error"]["code"] == "no_states"
        assert client.complete("a", state="a").status == client("GET", "/v1/states").status == 400


def test_metrics(client):
    client.complete("a", max_tokens=2)
    text = client("GET", "/metrics").body.decode()
    for line in ('path="/v1/completions",status="200"', "time_to_first_token_seconds_count", "mlx_ttt_states "):
        assert line in text
    assert all(line.startswith("#") or len(line.split()) == 2 for line in text.splitlines())
