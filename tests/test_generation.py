"""Text in, text out: streaming, stopping, and going on from a state."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mlx_ttt
from mlx_ttt.errors import OutputError, PromptError, StateError
from mlx_ttt.generation import encode, fingerprint
from mlx_ttt.model import Model

from .checkpoint.sentencepiece_models import exact

PROMPT = "ROMEO:\n"


@pytest.fixture(scope="module")
def bundled():
    return mlx_ttt.load()


@pytest.fixture(scope="module")
def text(bundled):
    """200 greedy tokens after the prompt."""
    return mlx_ttt.generate(*bundled, PROMPT, max_tokens=200)


def test_what_mlx_lm_generates(bundled, text):
    import mlx_lm

    assert mlx_lm.generate(*bundled, PROMPT, max_tokens=200) == text


def test_mlx_lm_loads_a_model_directory(bundled, text):
    """By its own loader, in the weights' own half precision."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(mlx_ttt.bundled_model()))
    assert model.model.norm.weight.dtype == mx.float16
    assert tokenizer.encode(PROMPT) == bundled[1].encode(PROMPT)
    assert text.startswith(mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=12))


def test_responses_count_and_measure(bundled):
    responses = list(mlx_ttt.stream_generate(*bundled, PROMPT, max_tokens=5))
    assert [r.generation_tokens for r in responses] == [1, 2, 3, 4, 5]
    assert {r.prompt_tokens for r in responses} == {len(bundled[1].encode(PROMPT))}
    assert [r.finish_reason for r in responses] == [None] * 4 + ["length"]
    assert all(r.generation_tps > 0 and r.prompt_tps > 0 for r in responses)


@pytest.mark.parametrize("n", [1, 2, 17, 60])
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


@pytest.mark.parametrize("after", [1, 3, 30])
def test_a_generation_that_is_broken_off_leaves_what_was_yielded(bundled, text, after):
    model, tokenizer = bundled
    state = mlx_ttt.read(model, tokenizer, PROMPT)
    responses = mlx_ttt.stream_generate(model, tokenizer, state=state)
    first = "".join(next(responses).text for _ in range(after))
    responses.close()
    assert len(state) == len(tokenizer.encode(PROMPT)) + after
    assert text.startswith(first + mlx_ttt.generate(model, tokenizer, state=state, max_tokens=20))


def test_an_interrupt_inside_the_model_leaves_what_was_yielded(bundled, text, monkeypatch):
    model, tokenizer = bundled
    state = mlx_ttt.read(model, tokenizer, PROMPT)
    calls = 0
    original = Model.__call__

    def interrupted(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Model, "__call__", interrupted)
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        for response in mlx_ttt.stream_generate(model, tokenizer, state=state):
            pieces.append(response.text)
    monkeypatch.undo()
    assert len(pieces) == 6
    first = "".join(pieces)
    assert text.startswith(first + mlx_ttt.generate(model, tokenizer, state=state, max_tokens=20))


def test_stop_strings(bundled, text):
    stop = text[60:66]
    assert (
        mlx_ttt.generate(*bundled, PROMPT, max_tokens=200, stop=[stop, "never in the text"]) == text[: text.index(stop)]
    )
    segments = [r.text for r in mlx_ttt.stream_generate(*bundled, PROMPT, max_tokens=200, stop=["\nNever"])]
    assert "".join(segments) == text
    last = list(mlx_ttt.stream_generate(*bundled, PROMPT, max_tokens=200, stop=[stop]))[-1]
    assert last.finish_reason == "stop"


def test_one_stop_string_is_one(bundled, text):
    assert mlx_ttt.generate(*bundled, PROMPT, max_tokens=200, stop="mad") == text[: text.index("mad")]


@pytest.mark.parametrize("ids", [np.array([1, 500, 600]), mx.array([1, 500, 600]), (1, 500, 600)])
def test_token_ids_of_any_kind(bundled, ids, tmp_path):
    state = mlx_ttt.read(*bundled, ids)
    mlx_ttt.save_state(tmp_path / "state", state, *bundled)
    assert mlx_ttt.load_state(tmp_path / "state", *bundled).tokens == [1, 500, 600]


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_a_bad_number_of_tokens(bundled, max_tokens):
    with pytest.raises(ValueError, match="max_tokens"):
        mlx_ttt.generate(*bundled, PROMPT, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("prompt", "written", "shown"),
    [
        ("hello ", ["world"], "world"),
        ("hello ", ["\u0120world"], " world"),
        ("hello", ["\u0120", "\u0120", "world"], "  world"),
        ("hello ", ["\u00f0", "\u0141", "\u0130", "\u0143", "!"], "🎭!"),
        ("hello ", ["world", "\u0120"], "world "),
    ],
)
def test_a_byte_level_tokenizer_shows_each_character_once(bundled, tmp_path, prompt, written, shown):
    """Its streaming holds back spaces, of the prompt too."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*letters, "hello", "world", "\u0120world", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)
    wrapper = TokenizerWrapper(fast, BPEStreamingDetokenizer)
    script = iter([vocab[piece] for piece in [*written, "</s>", "</s>"]])
    responses = mlx_ttt.stream_generate(bundled[0], wrapper, prompt, sampler=lambda logprobs: mx.array([next(script)]))
    assert "".join(response.text for response in responses) == shown


def test_it_ends_at_eos(bundled):
    """A sampler that writes three tokens and then EOS."""
    model, tokenizer = bundled
    script = iter([[500], [600], [700], [tokenizer.eos_token_id], [500]])
    responses = list(mlx_ttt.stream_generate(model, tokenizer, PROMPT, sampler=lambda logprobs: mx.array(next(script))))
    assert [r.token for r in responses] == [500, 600, 700, tokenizer.eos_token_id]
    assert responses[-1].finish_reason == "stop"
    assert "".join(r.text for r in responses) == tokenizer.decode([500, 600, 700])


def test_no_response_ends_in_half_a_character(bundled):
    """A sampler that writes characters of one to four bytes, byte by byte, cut off in the middle of the last."""
    model, tokenizer = bundled
    written = "é≠🎭a🎭"
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in written.encode()]
    assert tokenizer.unk_token_id not in ids
    script = iter([[i] for i in [*ids, ids[-1], 0, 0]])
    segments = [
        r.text
        for r in mlx_ttt.stream_generate(
            model, tokenizer, PROMPT, max_tokens=len(ids) - 2, sampler=lambda logprobs: mx.array(next(script))
        )
    ]
    assert "".join(segments) == "é≠🎭a"
    assert segments == ["", "é", "", "", "≠", "", "", "", "🎭", "a", "", ""]


def test_a_character_is_completed_after_a_state(bundled):
    model, tokenizer = bundled
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🎭".encode()]
    state = mlx_ttt.read(model, tokenizer, [1, 500, *ids[:3]])
    script = iter([[ids[3]], [500]])
    responses = mlx_ttt.stream_generate(
        model, tokenizer, state=state, max_tokens=1, sampler=lambda logprobs: mx.array(next(script))
    )
    assert [r.text for r in responses] == ["🎭"]


def test_sampling_repeats_with_a_seed(bundled):
    texts = []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        texts.append(mlx_ttt.generate(*bundled, PROMPT, max_tokens=30, sampler=make_sampler(0.8, top_p=0.9)))
    assert texts[0] == texts[1] != texts[2]


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

    monkeypatch.setattr("mlx_ttt.generation.save_prompt_cache", full)
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


@pytest.mark.parametrize("family", ["llama-2", "shakespeare"])
def test_continued_text_gets_no_space_in_front(family, bundled):
    """Llama's tokenizer puts a space in front of every text it is given; between two parts of one there is none."""
    tokenizer = bundled[1] if family == "shakespeare" else exact(family).wrapper
    for first, second in [
        ("Once upon", " a time"),
        ("Once up", "on a time"),
        ("a\n", "b"),
        ("a", "\nb"),
        ("é", "é  é"),
    ]:
        ids = encode(tokenizer, first, continues=False)
        more = encode(tokenizer, second, continues=True)
        assert tokenizer.decode(ids + more, skip_special_tokens=True) == first + second
        assert tokenizer.bos_token_id not in more
