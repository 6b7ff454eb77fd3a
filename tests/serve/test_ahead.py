"""The next token is given out before the last one is seen; texts and states are those of a server that looks first."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_ttt
from mlx_ttt.backends.cpu import library
from mlx_ttt.network.model import computes_when_called
from mlx_ttt.serve.engine import Engine, Room
from mlx_ttt.serve.jobs import Ask, Failed, Job, Written
from mlx_ttt.serve.sampling import LogitChanges, Sampling
from mlx_ttt.serve.states import States

from ..waits import watched_device

TEXTS = ["ROMEO:\n", "To be, or not to be, that is the question:\n", "First Witch.\n"]
PENALTIES = Sampling(bias={300: 4.0, 301: -100.0}, presence=0.7, frequency=0.3, repetition=1.2)
SEEDED = Sampling(temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=5)
BOTH = Sampling(temperature=1.0, seed=6, frequency=0.4, presence=0.1)
ROOM = Room(reading=3)


@pytest.fixture
def loaded(monkeypatch):
    """Without C code: the graph must be lazy, as it is on a GPU."""
    monkeypatch.setattr(library, "c_code", lambda: None)
    return mlx_ttt.load()


class Run:
    """Asks, all answered.

    Attributes:
        events: of each ask.
    """

    def __init__(self, engine: Engine, asks: Sequence[Ask]):
        self.engine = engine
        self.events: list[list] = [[] for _ in asks]
        self.jobs = [Job(ask, events.append, seconds=600) for ask, events in zip(asks, self.events, strict=True)]
        assert engine.submit(self.jobs)

    def step(self, n: int) -> None:
        for _ in range(n):
            assert self.engine.step()

    def finish(self) -> Run:
        while self.engine.step():
            pass
        return self

    @property
    def tokens(self) -> list[list]:
        return [[event.token for event in events if isinstance(event, Written)] for events in self.events]


def asks(tokenizer, **options) -> list[Ask]:
    return [Ask(tokenizer.encode(text), 30, **options) for text in TEXTS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": PENALTIES},
        {"sampling": SEEDED},
        {"sampling": BOTH, "logprobs": 3},
        {"stop": ("never in the text",)},
        {"learning": 0.5},
    ],
    ids=["greedy", "penalties", "sampled", "both, and log probabilities", "a stop text", "a learning scale"],
)
def test_one_wait_for_each_token_of_a_batch_after_the_next_one_was_given_out(loaded, options):
    engine = Engine(*loaded, room=ROOM)
    run = Run(engine, asks(loaded[1], **options))
    with watched_device() as device:
        while len(engine._batch.writers) < 3:
            run.step(1)
        run.step(2)
        device.waits.clear()
        before = [len(tokens) for tokens in run.tokens]
        run.step(5)
    assert [len(tokens) for tokens in run.tokens] == [n + 5 for n in before]
    assert device.waits == [1] * 5


def test_texts_that_end_keep_nobody_waiting(loaded):
    """By their length, by a stop text, and because the client has left."""
    engine = Engine(*loaded, room=ROOM)
    text = mlx_ttt.generate(*loaded, TEXTS[0], max_tokens=30)
    ids = [loaded[1].encode(text) for text in TEXTS]
    run = Run(engine, [Ask(ids[0], 99, stop=(text[10:14],)), Ask(ids[1], 8), Ask(ids[2], 99), Ask(ids[1], 40)])
    with watched_device() as device:
        while len(engine._batch.writers) < 4:
            run.step(1)
        run.step(2)
        device.waits.clear()
        for n in range(20):
            run.jobs[2].cancelled = n > 4
            run.step(1)
    assert [job.is_over for job in run.jobs] == [True, True, True, False]
    assert device.waits == [1] * 20


def store_and_files(engine: Engine) -> dict[str, np.ndarray]:
    """All states that a server has kept."""
    kept = {f"text {i}": [c.state for c in cache] for i, cache in enumerate(engine._store._states.values())}
    assert engine.states is not None
    kept |= {name: [c.state for c in engine.states.load(name).cache] for name in engine.states.names()}
    return {name: np.array(x) for name, x in tree_flatten(kept)}


@pytest.mark.slow
def test_texts_and_states_are_those_of_a_server_that_looks_first(loaded, tmp_path):
    model, tokenizer = loaded
    text = mlx_ttt.generate(*loaded, TEXTS[0], max_tokens=30)
    wanted = [
        Ask(tokenizer.encode(TEXTS[0]), 60, stop=(text[20:24],), save_state="stop", logprobs=2),
        Ask(tokenizer.encode(TEXTS[0]), 17, save_state="length"),  # the token that completes a mini-batch
        Ask(tokenizer.encode(TEXTS[1]), 20, sampling=PENALTIES, save_state="penalties", learning=0.5),
        Ask(tokenizer.encode(TEXTS[2]), 20, sampling=BOTH, samples=3, logprobs=0),
        Ask(tokenizer.encode(TEXTS[2]), 9, sampling=Sampling(bias={tokenizer.eos_token_id: 100.0})),  # at once
        Ask(tokenizer.encode("\n"), 5, state="stop", save_state="more"),
        Ask(tokenizer.encode("\n"), 1, state="stop", save_state="one"),
        Ask(tokenizer.encode("\n"), 0, state="stop", save_state="none"),
    ]
    said, kept = [], []
    for ahead in (False, True):
        states = States(tmp_path / str(ahead), 10**9, model, tokenizer)
        engine = Engine(model, tokenizer, states=states, ahead=ahead)
        said.append([Run(engine, [ask]).finish().events for ask in wanted])
        kept.append(store_and_files(engine))
        assert not engine.running
    assert said[0] == said[1]
    assert not any(isinstance(event, Failed) for (events,) in said[0] for event in events)
    assert kept[0].keys() == kept[1].keys()
    assert all(np.array_equal(x, kept[1][name]) for name, x in kept[0].items())


@pytest.mark.slow
def test_texts_that_share_a_batch(loaded):
    """They end at different times, so that the batches differ for a step."""
    text = mlx_ttt.generate(*loaded, TEXTS[0], max_tokens=30)
    wanted = [
        *asks(loaded[1], sampling=PENALTIES),
        *asks(loaded[1], sampling=BOTH, samples=2),
        Ask(loaded[1].encode(TEXTS[0]), 60, stop=(text[20:24],)),
        Ask(loaded[1].encode(TEXTS[1]), 30, learning=0.0),
    ]
    said = [Run(Engine(*loaded, ahead=ahead), wanted).finish() for ahead in (False, True)]
    assert said[0].tokens == said[1].tokens


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_next", "_look"])
def test_a_step_that_fails_while_another_is_on_its_way(loaded, monkeypatch, where):
    """All are read again, and each gets what it gets alone."""
    options = {"sampling": Sampling(temperature=1.0, seed=1, frequency=2.0)}
    expected = Run(Engine(*loaded, room=ROOM), asks(loaded[1], **options)).finish().tokens
    engine = Engine(*loaded, room=ROOM)
    works, calls = getattr(engine, where), []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 14:
            raise RuntimeError("out of memory")
        return works(*args)

    monkeypatch.setattr(engine, where, fails_once)
    assert Run(engine, asks(loaded[1], **options)).finish().tokens == expected
    assert engine.metrics.failed_batches == 1


def test_a_text_that_ends_by_its_length_takes_no_more_steps(loaded):
    model, tokenizer = loaded
    shapes = []

    class Counts:
        args, make_cache = model.args, staticmethod(model.make_cache)

        def __call__(self, ids, cache, learning=1.0):
            shapes.append(ids.shape)
            return model(ids, cache, learning)

    run = Run(Engine(Counts(), tokenizer), [Ask([1, 2, 3], 4)]).finish()
    assert len(run.tokens[0]) == 4
    assert shapes == [(1, 2), *[(1, 1)] * 4]


def test_logits_that_are_no_numbers_end_their_text_alone(loaded):
    model, tokenizer = loaded

    class Broken:
        args, make_cache = model.args, staticmethod(model.make_cache)

        def __call__(self, ids, cache, learning=1.0):
            logits = model(ids, cache, learning)
            broken = mx.array([offset > 25 for offset in cache[0].offset])
            return mx.where(broken[:, None, None], mx.nan, logits)

    long = Ask(tokenizer.encode(TEXTS[1]), 60, sampling=SEEDED, logprobs=0)
    short = Ask(tokenizer.encode(TEXTS[0]), 5)
    run = Run(Engine(Broken(), tokenizer), [long, short]).finish()
    assert any(isinstance(event, Failed) for event in run.events[0])
    assert len(run.tokens[1]) == 5


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_bias_and_penalties(dtype):
    """Against the formula in double precision, token by token."""
    V, prompt = 50, [3, 4, 4]
    logits = mx.random.normal((V,)).astype(dtype)
    sampling = Sampling(bias={4: 2.5, 9: -100.0}, presence=0.7, frequency=0.3, repetition=1.3)
    written = [7, 7, 9, 4]
    changes = LogitChanges(sampling, prompt, written, V)
    for token in (*np.random.default_rng(0).integers(0, 12, 40).tolist(), 7):
        expected = np.array(logits.astype(mx.float32), np.float64)
        for i in {*prompt, *written}:
            expected[i] = expected[i] / 1.3 if expected[i] > 0 else expected[i] * 1.3
        for i in range(V):
            expected[i] += sampling.bias.get(i, 0) - (0.7 + 0.3 * written.count(i)) * (i in written)
        found = changes.changed(logits)
        assert found.dtype == dtype
        assert np.allclose(np.array(found.astype(mx.float32)), expected, rtol=3e-3 if dtype == mx.float16 else 1e-6)
        changes.add(mx.array(token, mx.uint32))
        written.append(token)


def test_where_c_computes_at_once_the_host_looks_first():
    if library.c_code() is None:
        pytest.skip("there is no C code here")
    assert computes_when_called()
