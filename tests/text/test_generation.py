"""Text in, text out: streaming, stopping, and what a state holds after a generation."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mlx_ttt
from mlx_ttt.model import Model

from .conftest import PROMPT


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
    stop = text[40:45]  # its letters alone are in the text before
    assert mlx_ttt.generate(*bundled, PROMPT, max_tokens=200, stop=stop) == text[: text.index(stop)]


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
