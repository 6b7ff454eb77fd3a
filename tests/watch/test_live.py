"""Two texts and their states, without a server."""

from __future__ import annotations

import base64
import json
import math

import mlx_ttt

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

from mlx_ttt.errors import PromptError, StateError
from mlx_ttt.learning.states import drift
from mlx_ttt.training.evaluate import losses
from mlx_ttt.watch import live
from mlx_ttt.watch.live import START, Session, Turn
from mlx_ttt.watch.reading import Figures

TEXT = "ROMEO.\nBut soft, what light through yonder window breaks?\nIt is the east, and Juliet is the sun. 日本\n"


@pytest.fixture(scope="module")
def model():
    return mlx_ttt.load()


@pytest.fixture
def told():
    return []


@pytest.fixture
def session(model, told):
    return Session(*model, told.append)


def floats(base64_text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(base64_text), "<f4")


def advances(events, side="A"):
    return [event for event in events if event["kind"] == "advance" and event["side"] == side]


def joined(events, name, side="A"):
    return np.concatenate([floats(event[name]) for event in advances(events, side)])


def text_of(events, side="A"):
    return "".join(text for event in advances(events, side) for text in event["texts"])


def test_a_text_is_told_as_it_is_read(session, model, told, monkeypatch):
    monkeypatch.setattr(live, "PIECE", 16)
    session.take_turn(["A"], Turn(TEXT))
    json.dumps(told, allow_nan=False)
    ids = model[1].encode(TEXT)
    cache = model[0].make_cache()
    seen = mlx_ttt.observe(model[0], mx.array([ids]), cache)
    expected = Figures.of(seen)
    assert text_of(told) == TEXT
    close = {"rtol": 1e-3, "atol": 1e-5}
    assert math.isnan(joined(told, "surprisal")[0])
    np.testing.assert_allclose(joined(told, "surprisal")[1:], expected.surprisal[1:], **close)
    np.testing.assert_allclose(joined(told, "write"), expected.write_norm, **close)
    np.testing.assert_allclose(joined(told, "loss"), expected.loss, **close)
    points = [event["drift"] for event in advances(told) if event["drift"]]
    assert points[-1]["at"] == len(ids)
    np.testing.assert_allclose(points[-1]["layers"], np.array(drift(model[0], cache).of_layers().relative)[:, 0], 1e-3)


def test_a_text_that_goes_on(session, told, monkeypatch):
    """No second start of a text, and points of the drift at ends of mini-batches, but for each turn's last."""
    monkeypatch.setattr(live, "PIECE", 16)
    for _ in range(2):
        session.take_turn(["A"], Turn(TEXT))
    assert text_of(told) == 2 * TEXT
    assert [place for event in advances(told) for place, name in event["names"].items() if name == "<s>"] == [0]
    points = [event["drift"]["at"] for event in advances(told) if event["drift"]]
    assert len([at for at in points if at % 16]) <= 2 and len(points) > 6


def test_columns_grow_with_the_tokens(session, model, told):
    session.take_turn(["A"], Turn(TEXT))
    session.take_turn(["A"], Turn("", max_tokens=5))
    heads, K = 16, model[0].args.mini_batch_size
    columns: dict[int, np.ndarray] = {}
    for event in advances(told):
        for i, sums in enumerate(floats(event["columns"]).reshape(-1, heads)):
            columns[event["column"] + i] = sums
    text = session.sides["A"].text
    ids = model[1].encode(TEXT)
    n = len(text)
    written = [event for event in advances(told) if event["written"]]
    assert len(written) == n - len(ids) == 5
    assert sorted(columns) == list(range(-(-n // K)))
    norms = joined(told, "strongestNorm").reshape(-1, 3)[:, 0]
    for column, sums in columns.items():
        within = norms[column * K : (column + 1) * K]
        assert within.max() <= sums.max() + 1e-5 and sums.max() <= within.sum() + 1e-5


def test_greedy_writing_is_that_of_generate(session, model, told):
    session.take_turn(["A"], Turn(TEXT, max_tokens=20))
    assert text_of(told).startswith(TEXT)
    assert text_of(told)[len(TEXT) :] == mlx_ttt.generate(*model, TEXT, max_tokens=20)


def test_the_forgetful_state(session, model, told, monkeypatch):
    monkeypatch.setattr(live, "RESET", 16)
    ids = model[1].encode(TEXT)
    session.take_turn(["A"], Turn(TEXT, max_tokens=1))
    session.take_turn(["A"], Turn(TEXT))
    again = joined(told, "reset")
    assert len(again) == len(session.sides["A"].text) and math.isnan(again[0])
    np.testing.assert_allclose(again[1 : len(ids)], losses(model[0], ids, 16), rtol=1e-3, atol=1e-4)


def test_the_forgetful_state_learns_as_much(session, model, told):
    session.set_learning("A", 0)
    session.take_turn(["A"], Turn(TEXT))
    ids = mx.array([model[1].encode(TEXT)])
    expected = mlx_ttt.observe(model[0], ids, learning=0).surprisal[0, 1:]
    np.testing.assert_allclose(joined(told, "reset")[1:], expected, rtol=1e-3, atol=1e-4)


def test_the_forgetful_state_goes_back_too(session, told):
    session.take_turn(["A"], Turn(TEXT))
    session.remember("A")
    told.clear()
    session.take_turn(["A"], Turn("ROMEO.\n"))
    once = joined(told, "reset")
    session.go_back("A", 1)
    told.clear()
    session.take_turn(["A"], Turn("ROMEO.\n"))
    np.testing.assert_array_equal(joined(told, "reset"), once)


def test_nothing_is_learned_with_learning_zero(session, told):
    session.set_learning("B", 0)
    session.take_turn(["A", "B"], Turn(TEXT, max_tokens=4))
    assert joined(told, "write", "A").min() > 0
    assert not joined(told, "write", "B").any()


def test_both_sides_draw_the_same(session, told):
    session.take_turn(["A", "B"], Turn(TEXT, max_tokens=12, temperature=1.0, seed=3))
    assert text_of(told, "A") == text_of(told, "B")
    session.take_turn(["A"], Turn("", max_tokens=12, temperature=1.0, seed=4))
    session.take_turn(["B"], Turn("", max_tokens=12, temperature=1.0, seed=5))
    assert text_of(told, "A") != text_of(told, "B")


def test_each_token_is_drawn_with_a_number_of_its_own(session, monkeypatch):
    seeds = []
    monkeypatch.setattr(live, "_drawn", lambda logits, temperature, seed: seeds.append(seed) or 40)
    session.take_turn(["A"], Turn("ROMEO.\n", max_tokens=4, temperature=1.0, seed=3))
    assert seeds == [3, 4, 5, 6]


def test_writing_ends_with_the_models_end_of_a_text(session, model, told, monkeypatch):
    tokens = iter([40, 41, model[1].eos_token_id, 42])
    monkeypatch.setattr(live, "_drawn", lambda *_: next(tokens))
    session.take_turn(["A"], Turn("ROMEO.\n", max_tokens=4))
    assert len([event for event in advances(told) if event["written"]]) == 2 and next(tokens) == 42


def test_a_character_of_several_tokens_comes_with_its_last(session, model, told, monkeypatch):
    tokens = iter(model[1].encode("日")[-3:])
    monkeypatch.setattr(live, "_drawn", lambda *_: next(tokens))
    session.take_turn(["A"], Turn("ROMEO.\n", max_tokens=3))
    assert [event["texts"] for event in advances(told) if event["written"]] == [[""], [""], ["日"]]
    start = len(session.sides["A"].text) - 3
    assert {place for event in advances(told)[1:] for place in event["names"]} == {start, start + 1}


def test_remember_and_go_back(session, told):
    session.take_turn(["A"], Turn(TEXT))
    session.remember("A", "balcony")
    before = len(session.sides["A"].text)
    session.take_turn(["A"], Turn("", max_tokens=20))
    once = text_of(told)
    session.go_back("A", 1)
    whole = told[-1]
    assert whole["kind"] == "side" and whole["name"] == "balcony" and text_of(whole["history"]) == TEXT
    assert len(session.sides["A"].text) == before
    session.go_back("B", 1)
    told.clear()
    session.take_turn(["A", "B"], Turn("", max_tokens=20))
    assert TEXT + text_of(told, "A") == TEXT + text_of(told, "B") == once
    session.go_back("B", START)
    assert len(session.sides["B"].text) == 0
    session.go_back("B", "A")
    assert text_of(told[-1]["history"], "A") == once
    session.forget(1)
    assert told[-1] == {"kind": "states", "states": []}


def test_a_new_page_is_told_everything_once(session, told):
    session.take_turn(["A"], Turn(TEXT))
    session.remember("A")
    states, a, b = session.snapshot(lambda: None)
    assert states["states"] == [{"id": 1, "name": "state 1", "tokens": len(session.sides["A"].text)}]
    assert text_of(a["history"]) == TEXT and b["history"] == []
    assert len(joined(a["history"], "reset")) == len(session.sides["A"].text)


def test_what_is_refused(session, monkeypatch):
    with pytest.raises(PromptError, match="there is no text yet"):
        session.take_turn(["A"], Turn("", max_tokens=3))
    with pytest.raises(StateError, match="there is no state 7"):
        session.go_back("A", 7)
    with pytest.raises(StateError, match="there is no state 7"):
        session.forget(7)
    with monkeypatch.context() as patch, pytest.raises(PromptError, match="token id 9999 is outside"):
        patch.setattr(live, "encode_long", lambda *_: np.array([5, 9999]))  # of another model's tokenizer
        session.take_turn(["A"], Turn(TEXT))
    monkeypatch.setattr(live, "MOST_TOKENS", 20)
    with pytest.raises(PromptError, match="the page keeps 20"):
        session.take_turn(["A"], Turn(TEXT))
    monkeypatch.setattr(live, "MOST_STATES", 1)
    session.remember("A")
    with pytest.raises(StateError, match="remembered already"):
        session.remember("A")


def test_a_turn_can_be_stopped(session, told):
    stop_at = 5

    def publish(event):
        told.append(event)
        if len(advances(told)) == stop_at:
            session.stopping.set()

    session._publish = publish
    session.take_turn(["A"], Turn("ROMEO.\n", max_tokens=1000))
    assert len([event for event in advances(told) if event["written"]]) == stop_at - 1
    session.take_turn(["A"], Turn("", max_tokens=2))  # which the stop before it does not end
    assert len([event for event in advances(told) if event["written"]]) == stop_at + 1
