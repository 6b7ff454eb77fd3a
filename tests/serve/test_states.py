"""Named states: kept whole or not at all, and nothing taken in that the model could not have made."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

import mlx_ttt
from mlx_ttt.errors import OutputError, StateError
from mlx_ttt.serve.states import StateRefused, States, check
from mlx_ttt.text import state as text_state
from mlx_ttt.text.state import read, save_state


@pytest.fixture(scope="module")
def loaded():
    return mlx_ttt.load()


@pytest.fixture
def states(loaded, tmp_path):
    return States(tmp_path / "states", 10**7, *loaded)


def test_a_state_that_cannot_be_written_leaves_what_was_there(loaded, states, monkeypatch):
    states.save("a", read(*loaded, "one"))
    before = states.path("a").read_bytes()

    def cut(file, *args):
        with open(file, "wb") as out:
            out.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_state, "save_prompt_cache", cut)
    for name in ("a", "b"):
        with pytest.raises(OutputError):
            states.save(name, read(*loaded, "two"))
    assert states.path("a").read_bytes() == before
    assert [path.name for path in states.folder.iterdir()] == ["a.state"]


def test_what_a_killed_server_left_is_removed(loaded, states):
    (states.folder / ".incoming-x").mkdir()
    (states.folder / ".incoming-x" / "state").write_bytes(b"half")
    assert not list(States(states.folder, 10**7, *loaded).folder.iterdir())


def test_a_damaged_file_is_refused_when_it_is_used(loaded, states):
    states.save("a", read(*loaded, "one"))
    data = bytearray(states.path("a").read_bytes())
    data[-5] ^= 1
    states.path("a").write_bytes(data)
    with pytest.raises(StateError, match="damaged"):
        states.load("a")


def test_links_are_no_states(states, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (states.folder / "a.state").symlink_to(tmp_path / "secret")
    assert states.names() == []
    with pytest.raises(StateRefused):
        states.existing("a")


def test_the_last_one_used_stays_in_memory(loaded, states, monkeypatch):
    states.save("a", read(*loaded, "one"))
    states.load("a")
    monkeypatch.setattr("mlx_ttt.serve.states.load_state", None)  # not read again
    first, second = states.load("a"), states.load("a")
    loaded[0](mx.array([first.tokens[-1:]]), first.cache)
    assert second.cache[0].offset == [len(second) - 1]  # going on with one leaves the other as it was


def _changed(state, name: str, change):
    """The state with an array of its second layer changed."""
    cache = state.cache[1].copy()
    leaves = dict(tree_flatten(cache.arrays))
    leaves[name] = change(leaves[name])
    cache.arrays = tree_unflatten(list(leaves.items()))
    cache.arrays = {**cache.arrays, "weights": tuple(cache.arrays["weights"])}
    state.cache[1] = cache


WRONG = {
    "a shape": lambda s: _changed(s, "rows", lambda x: x[:, :, :-1]),
    "a batch": lambda s: _changed(s, "rows", lambda x: mx.concatenate([x, x])),
    "a dtype": lambda s: _changed(s, "weights.0", lambda x: x.astype(mx.float16)),
    "a value": lambda s: _changed(s, "weights.0", lambda x: x * mx.nan),
    "layers": lambda s: s.cache.pop(),
    "an offset": lambda s: setattr(s.cache[1], "offset", [999]),
    "negative offsets": lambda s: [setattr(c, "offset", [-1]) for c in s.cache],
    "no tokens": lambda s: setattr(s, "tokens", []),
    "a token": lambda s: setattr(s, "tokens", [10**6]),
    "a token that is no number": lambda s: setattr(s, "tokens", ["a"]),
    "learning": lambda s: setattr(s, "learning", -1.0),
    "learning that is no number": lambda s: setattr(s, "learning", "a"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_lies_is_refused(loaded, states, tmp_path, what):
    """Such a file has a digest that fits: whoever made it computed it as we do."""
    state = read(*loaded, "To be or not to be")
    check(loaded[0], state)
    WRONG[what](state)
    save_state(tmp_path / "sent", state, *loaded)
    with pytest.raises(StateRefused):
        states.take_in(tmp_path / "sent", "sent")
    assert states.names() == []


def test_a_rewindable_state_is_taken_in(loaded, states, tmp_path):
    save_state(tmp_path / "sent", read(*loaded, "To be or not to be", rewind=True), *loaded)
    assert states.take_in(tmp_path / "sent", "sent").tokens == len(loaded[1].encode("To be or not to be"))
