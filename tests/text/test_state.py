"""States of texts: reading, going on, and files that are sound, damaged or of another model."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

import mlx_ttt
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.errors import OutputError, PromptError, StateError
from mlx_ttt.learning.states import freeze
from mlx_ttt.model import Model
from mlx_ttt.text.state import EARLIER_BUNDLED, fingerprint

from .conftest import PROMPT


@pytest.mark.parametrize(
    "n", [1, pytest.param(2, marks=pytest.mark.slow), 17, pytest.param(60, marks=pytest.mark.slow)]
)
def test_a_state_continues_where_the_text_stopped(bundled, text, n, tmp_path):
    """Write n tokens, save, load, and go on: the same text as in one go."""
    model, tokenizer = bundled
    state = mlx_ttt.read(model, tokenizer, PROMPT)
    first = mlx_ttt.generate(model, tokenizer, state=state, max_tokens=n)
    mlx_ttt.save_state(tmp_path / "state", state, model, tokenizer)
    for _ in range(2):  # any number of times
        resumed = mlx_ttt.load_state(tmp_path / "state", model, tokenizer)
        rest = mlx_ttt.generate(model, tokenizer, state=resumed, max_tokens=80)
        assert text.startswith(first + rest)
        assert len(rest) > 80


def test_reading_on_is_reading_at_once(bundled):
    """Neither a second BOS nor a stray space where two readings meet."""
    model, tokenizer = bundled
    whole = mlx_ttt.read(model, tokenizer, "To be, or not\nto be")
    parts = mlx_ttt.read(model, tokenizer, "to be", mlx_ttt.read(model, tokenizer, "To be, or not\n"))
    assert len(parts) == len(whole)
    assert parts.tokens[-2:] == whole.tokens[-2:]
    options = {"max_tokens": 20}
    assert mlx_ttt.generate(model, tokenizer, state=parts, **options) == mlx_ttt.generate(
        model, tokenizer, state=whole, **options
    )


def test_reading_leaves_the_state_it_goes_on_from(bundled):
    model, tokenizer = bundled
    start = mlx_ttt.read(model, tokenizer, PROMPT)
    before = [np.array(c.rows) for c in start.cache], len(start)
    mlx_ttt.read(model, tokenizer, "What light through yonder window breaks?", start)
    mlx_ttt.generate(model, tokenizer, state=start.copy(), max_tokens=20)
    assert len(start) == before[1]
    assert all(np.array_equal(c.rows, rows) for c, rows in zip(start.cache, before[0], strict=True))


@pytest.mark.parametrize("ids", [np.array([1, 500, 600]), mx.array([1, 500, 600]), (1, 500, 600)])
def test_token_ids_of_any_kind(bundled, ids, tmp_path):
    state = mlx_ttt.read(*bundled, ids)
    mlx_ttt.save_state(tmp_path / "state", state, *bundled)
    assert mlx_ttt.load_state(tmp_path / "state", *bundled).tokens == [1, 500, 600]


def test_progress_of_a_long_prompt(bundled):
    seen = []
    mlx_ttt.read(*bundled, [1] + [500] * 5000, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 5000)
    assert seen[-1] == (5000, 5000)
    assert len(seen) >= 4
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", PromptError, "the prompt is empty"),
        ([], PromptError, "the prompt is empty"),
        ([1, 2048], PromptError, "token id 2048 is outside the model's vocabulary of 2048"),
        ([-1], PromptError, "token id -1"),
    ],
)
def test_bad_prompts(bundled, prompt, error, message):
    with pytest.raises(error, match=message):
        mlx_ttt.generate(*bundled, prompt)


@pytest.fixture(scope="module")
def saved(bundled, tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("state") / "state"
    model, tokenizer = bundled
    mlx_ttt.save_state(file, mlx_ttt.read(model, tokenizer, PROMPT), model, tokenizer)
    return file.read_bytes()


def test_a_state_that_is_not_there(bundled, tmp_path):
    with pytest.raises(StateError, match="no such file"):
        mlx_ttt.load_state(tmp_path / "state", *bundled)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"no state at all, but long enough for a header", b"PK\3\4"])
def test_a_file_that_is_no_state(bundled, tmp_path, content):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(StateError, match="the state cannot be read"):
        mlx_ttt.load_state(tmp_path / "state", *bundled)


def test_a_model_is_no_state(bundled):
    with pytest.raises(StateError, match="not a state"):
        mlx_ttt.load_state(mlx_ttt.bundled_model() / "model.safetensors", *bundled)


def test_a_truncated_state(bundled, saved, tmp_path):
    for length in (9, 100, len(saved) // 2, len(saved) - 1):
        (tmp_path / "state").write_bytes(saved[:length])
        with pytest.raises(StateError):
            mlx_ttt.load_state(tmp_path / "state", *bundled)


def test_a_state_with_a_flipped_bit(bundled, saved, tmp_path):
    """Refused, or no different: a bit of the padding may not matter."""
    model, tokenizer = bundled
    expected = mlx_ttt.read(model, tokenizer, PROMPT)
    rng = np.random.default_rng(0)
    header = int.from_bytes(saved[:8], "little") + 8
    refused = 0
    for n in range(80):
        data = bytearray(saved)
        data[rng.integers(header if n % 2 else len(data))] ^= 1 << rng.integers(8)
        (tmp_path / "state").write_bytes(data)
        try:
            state = mlx_ttt.load_state(tmp_path / "state", *bundled)
        except StateError:
            refused += 1
        else:
            assert state.tokens == expected.tokens
            for c, c_expected in zip(state.cache, expected.cache, strict=True):
                assert mx.array_equal(c.rows, c_expected.rows)
                assert mx.array_equal(c.weights[0], c_expected.weights[0])
    assert refused > 74


def test_a_state_of_another_model(bundled, saved, tmp_path):
    model, tokenizer = bundled
    (tmp_path / "state").write_bytes(saved)
    layer = model.layers[2].seq_modeling_block
    original = layer.W1
    try:
        layer.W1 = original * 1.0001
        with pytest.raises(StateError, match="made with another model or tokenizer"):
            mlx_ttt.load_state(tmp_path / "state", model, tokenizer)
    finally:
        layer.W1 = original
    mlx_ttt.load_state(tmp_path / "state", model, tokenizer)


def test_a_state_of_the_model_of_an_earlier_version(bundled, shakespeare_dir, tmp_path):
    """The bundled model of 0.1.0 was this checkpoint in float16."""
    convert(shakespeare_dir, tmp_path / "model", dtype=mx.float16)
    earlier = mlx_ttt.load(tmp_path / "model")
    mlx_ttt.save_state(tmp_path / "state", mlx_ttt.read(*earlier, PROMPT), *earlier)
    with pytest.raises(StateError, match=r"the model that came with mlx_ttt 0\.1\.0; read the text again") as refused:
        mlx_ttt.load_state(tmp_path / "state", *bundled)
    assert "\n" not in str(refused.value)
    assert len(mlx_ttt.load_state(tmp_path / "state", *earlier)) == len(earlier[1].encode(PROMPT))


def test_the_bundled_weights_change_only_with_the_version(bundled):
    """Whoever changes them enters this fingerprint into EARLIER_BUNDLED, with the version that had it."""
    shipped = "eceba7e34fd2789457e7868502790337361b27ee9ab666bb97d08f092595a88f"
    assert fingerprint(*bundled) == shipped
    assert shipped not in EARLIER_BUNDLED
    assert mlx_ttt.__version__ not in EARLIER_BUNDLED.values()


def test_a_state_of_another_tokenizer(bundled):
    model, tokenizer = bundled

    class Other:
        def get_vocab(self):
            return tokenizer.get_vocab() | {"\n": 7}

    assert fingerprint(model, Other()) != fingerprint(model, tokenizer)


def test_a_state_that_cannot_be_written_leaves_the_old_one(bundled, tmp_path, monkeypatch):
    model, tokenizer = bundled
    state = mlx_ttt.read(model, tokenizer, PROMPT)
    (tmp_path / "state").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_ttt.text.state.save_prompt_cache", full)
    with pytest.raises(OutputError, match="No space left"):
        mlx_ttt.save_state(tmp_path / "state", state, model, tokenizer)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("state", b"old")]
    with pytest.raises(OutputError, match="no such folder"):
        mlx_ttt.save_state(tmp_path / "nowhere" / "state", state, model, tokenizer)


def test_a_state_is_written_through_a_link(bundled, tmp_path):
    model, tokenizer = bundled
    state = mlx_ttt.read(model, tokenizer, PROMPT)
    (tmp_path / "link").symlink_to(tmp_path / "state")
    mlx_ttt.save_state(tmp_path / "link", state, model, tokenizer)
    assert (tmp_path / "link").is_symlink()
    assert len(mlx_ttt.load_state(tmp_path / "state", model, tokenizer)) == len(state)


@pytest.mark.parametrize("n", [0, 1, 2, 9, 16])
def test_forgotten_tokens_were_never_read(bundled, n, tmp_path):
    """The shorter text, and the same continuation as of that; saved and loaded, too."""
    model, tokenizer = bundled
    ids = tokenizer.encode("But soft, what light through yonder window breaks? It is the east, and Juliet is")
    assert len(ids) > 18
    state = mlx_ttt.read(model, tokenizer, ids, rewind=True)
    shorter = state.forget(n)
    expected = mlx_ttt.read(model, tokenizer, ids[: len(ids) - n])
    assert (len(state), len(shorter)) == (len(ids), len(expected))
    assert shorter.tokens[-8:] == expected.tokens
    mlx_ttt.save_state(tmp_path / "state", shorter, model, tokenizer)
    loaded = mlx_ttt.load_state(tmp_path / "state", model, tokenizer)
    written = mlx_ttt.generate(model, tokenizer, state=expected, max_tokens=20)
    for s in (shorter, loaded):
        assert mlx_ttt.generate(model, tokenizer, state=s, max_tokens=20) == written
        assert [c.reach for c in s.cache] == [[16]] * 4
    back = loaded.forget(16)  # of what was written, too
    assert (len(back), back.tokens[-1]) == (len(loaded) - 16, loaded.tokens[-17])


def test_a_short_text_can_be_forgotten_whole(bundled):
    state = mlx_ttt.read(*bundled, [1, 500, 600], rewind=True)
    empty = state.forget(3)
    assert (len(empty), empty.tokens) == (0, [])
    assert mlx_ttt.generate(*bundled, [1, 700], state=empty, max_tokens=5) == mlx_ttt.generate(
        *bundled, [1, 700], max_tokens=5
    )
    assert state.forget(2).tokens == [1]
    for n in (-1, 4):
        with pytest.raises(StateError, match=f"cannot take back {n} tokens of 3: within reach are 3"):
            state.forget(n)


def test_what_cannot_be_forgotten(bundled):
    plain = mlx_ttt.read(*bundled, [1, *range(500, 530)])
    with pytest.raises(StateError, match="read the text with rewind=True"):
        plain.forget(1)
    state = mlx_ttt.read(*bundled, [5, 6, 7], plain, rewind=True)
    assert state.forget(3).tokens[-1] == 529
    with pytest.raises(StateError, match="cannot take back 4 tokens of 34: within reach are 3"):
        state.forget(4)
    with pytest.raises(StateError, match="within reach are 1"):
        state.forget(2).forget(2)
    assert len(state) == 34


def test_a_draft_model_leaves_a_state_rewindable(bundled):
    """And as it is after decoding without one."""
    model, tokenizer = bundled
    drafted, plain = (mlx_ttt.read(model, tokenizer, PROMPT, rewind=True) for _ in range(2))
    mlx_ttt.generate(model, tokenizer, state=drafted, max_tokens=20, draft_model=model)
    mlx_ttt.generate(model, tokenizer, state=plain, max_tokens=20)
    assert drafted.tokens == plain.tokens
    assert [c.history["conv"].shape for c in drafted.cache] == [c.history["conv"].shape for c in plain.cache]
    assert drafted.forget(10).tokens == plain.forget(10).tokens


@pytest.fixture
def scales(monkeypatch):
    """The learning scales with which the model is called; it is called without them."""
    seen, call = [], Model.__call__

    def recorded(self, inputs, cache=None, learning=1.0):
        seen.append(learning)
        return call(self, inputs, cache)

    monkeypatch.setattr(Model, "__call__", recorded)
    return seen


def test_a_state_says_how_much_is_learned(bundled, scales, tmp_path):
    """In reading and in writing, with a draft model and after a file."""
    model, tokenizer = bundled
    state = mlx_ttt.read(model, tokenizer, PROMPT)
    state.learning = 0.5
    mlx_ttt.save_state(tmp_path / "state", state, model, tokenizer)
    for s in (state, mlx_ttt.load_state(tmp_path / "state", model, tokenizer)):
        del scales[:]
        after = mlx_ttt.read(model, tokenizer, "But soft", s)
        mlx_ttt.generate(model, tokenizer, state=after, max_tokens=3)
        assert set(scales) == {0.5}
        assert after.learning == after.copy().learning == 0.5
        del scales[:]
        mlx_ttt.generate(
            model, tokenizer, state=after, max_tokens=3, draft_model=model, draft_state=with_scale(after, 1.0)
        )
        assert set(scales) == {0.5, 1.0}
        assert after.learning == 0.5


@pytest.mark.parametrize("drafted", [False, True])
def test_a_frozen_text_goes_on_without_learning(bundled, drafted, tmp_path):
    """Its weights stay bit for bit while it is continued, with a draft model and after a file."""
    model, tokenizer = bundled
    frozen = freeze(model, mlx_ttt.read(model, tokenizer, "KING LEAR:\nBlow, winds, and crack your cheeks! rage!"))
    assert frozen.cache[0].phase != [0]
    mlx_ttt.save_state(tmp_path / "state", frozen, model, tokenizer)
    state = mlx_ttt.load_state(tmp_path / "state", model, tokenizer)
    options = {"draft_model": model} if drafted else {}
    mlx_ttt.generate(model, tokenizer, "\nKENT:\n", state=state, max_tokens=30, **options)
    assert len(state) > len(frozen) + 30
    for before, after in zip(frozen.cache, state.cache, strict=True):
        assert all(mx.array_equal(x, y) for x, y in zip(before.weights, after.weights, strict=True))


def with_scale(state, learning):
    state = state.copy()
    state.learning = learning
    return state


@pytest.mark.parametrize("learning", [-1.0, math.nan, 1e300])
def test_a_saved_state_that_says_no_learning_scale(bundled, tmp_path, learning):
    state = mlx_ttt.read(*bundled, PROMPT)
    mlx_ttt.save_state(tmp_path / "state", with_scale(state, learning), *bundled)
    with pytest.raises(StateError, match=r"the state cannot be read: learning is .*, expected finite numbers"):
        mlx_ttt.load_state(tmp_path / "state", *bundled)


def test_older_readers_refuse_what_they_would_go_on_with_wrongly(bundled, saved, tmp_path):
    """A plain state is of the file's first version, bit for bit. One with a learning scale or a way back is not."""
    model, tokenizer = bundled
    state = mlx_ttt.read(model, tokenizer, PROMPT)
    file = tmp_path / "state"
    mlx_ttt.save_state(file, state, model, tokenizer)
    assert file.read_bytes() == saved
    frozen = with_scale(state, 0.0)
    for s in (frozen, mlx_ttt.read(model, tokenizer, PROMPT, rewind=True)):
        mlx_ttt.save_state(file, s, model, tokenizer)
        _, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
        assert metadata["0.mlx_ttt"] == "2"


def test_a_learning_scale_that_was_changed_in_the_file(bundled, tmp_path):
    model, tokenizer = bundled
    file = tmp_path / "state"
    mlx_ttt.save_state(file, with_scale(mlx_ttt.read(model, tokenizer, PROMPT), 0.25), model, tokenizer)
    file.write_bytes(file.read_bytes().replace(b"0.25", b"0.75"))
    with pytest.raises(StateError, match="damaged"):
        mlx_ttt.load_state(file, model, tokenizer)
