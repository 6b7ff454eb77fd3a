"""The host never keeps the device waiting: the next token is given to it before the host sees the last one.

The graph must be lazy for that, as it is on a GPU. So C code is off.
"""

from __future__ import annotations

import pytest
from mlx_lm.sample_utils import make_sampler

import mlx_ttt
from mlx_ttt.backends.cpu import library
from mlx_ttt.cli.notes import Notes

from ..waits import watched_device
from .conftest import PROMPT

N = 12


@pytest.fixture(autouse=True)
def _lazy(monkeypatch):
    monkeypatch.setattr(library, "c_code", lambda: None)


@pytest.fixture(scope="module")
def state(bundled):
    return mlx_ttt.read(*bundled, PROMPT)


CASES = {
    "plain": {},
    "sampled": {"sampler": make_sampler(0.8, top_p=0.9, top_k=20, min_p=0.01)},
    "stop texts": {"stop": ["never in the text", "nor this"]},
    "observed": {"observe": True},
    "another learning scale": {"learning": 0.5},
    "no state to keep": {"state": None, "prompt": PROMPT},
}


@pytest.mark.parametrize("name", CASES)
def test_one_wait_for_each_token_after_the_next_one_was_given_out(bundled, state, name):
    options = {"state": state.copy(), "max_tokens": N, **CASES[name]}
    with watched_device() as device:
        responses = mlx_ttt.stream_generate(*bundled, **options)
        next(responses)  # with the prompt
        device.waits.clear()
        assert sum(1 for _ in responses) == N - 1
    assert len(device.waits) == N - 1
    assert set(device.waits) == {1}


def test_notes_of_what_was_learned_keep_nobody_waiting(bundled, state, tmp_path):
    notes = Notes(str(tmp_path / "notes.jsonl"))
    with watched_device() as device:
        responses = mlx_ttt.stream_generate(*bundled, state=state.copy(), max_tokens=N, observe=True)
        notes.add(next(responses))
        device.waits.clear()
        for response in responses:
            notes.add(response)
        assert len(device.waits) == N - 1
        assert set(device.waits) == {1}
        notes.save()
    assert len(device.waits) == N  # and at the end for the last one


def test_a_draft_model_waits_once_a_round(bundled, state):
    options = {"state": state.copy(), "draft_model": bundled[0], "draft_state": state}
    with watched_device() as device:
        tokens = list(mlx_ttt.stream_generate(*bundled, max_tokens=4 * N, **options))
    assert len(tokens) == 4 * N
    assert len(device.waits) == sum(not response.from_draft for response in tokens)  # the last of each round
