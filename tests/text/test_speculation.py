"""Speculative decoding: the text of plain greedy decoding, with the help of a smaller model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_ttt
from mlx_ttt.model import Model, ModelArgs
from mlx_ttt.network.cache import TTTCache
from mlx_ttt.text.detokenizer import SentencePieceDetokenizer

from ..checkpoint.sentencepiece_models import exact
from .conftest import PROMPT


@pytest.fixture(scope="module")
def draft():
    """The bundled model in 4 bits."""
    model, _ = mlx_ttt.load_model()
    nn.quantize(model, bits=4, group_size=64, class_predicate=model.quant_predicate)
    return model


@pytest.fixture(scope="module")
def stranger(bundled):
    """A model that proposes nonsense."""
    mx.random.seed(0)
    return Model(
        ModelArgs(
            vocab_size=bundled[0].args.vocab_size,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=32,
            num_hidden_layers=1,
            mini_batch_size=5,
        )
    )


@pytest.fixture(scope="module")
def text(bundled):
    return mlx_ttt.generate(*bundled, PROMPT, max_tokens=60)


@pytest.mark.parametrize("num_draft_tokens", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 16))])
def test_the_text_is_the_same(bundled, draft, text, num_draft_tokens):
    options = {"draft_model": draft, "num_draft_tokens": num_draft_tokens, "max_tokens": 60}
    responses = list(mlx_ttt.stream_generate(*bundled, PROMPT, **options))
    assert "".join(r.text for r in responses) == text
    assert sum(r.from_draft for r in responses) > 20


@pytest.mark.slow
def test_the_text_is_the_same_whatever_is_proposed(bundled, stranger, text):
    assert mlx_ttt.generate(*bundled, PROMPT, draft_model=stranger, num_draft_tokens=5, max_tokens=60) == text


def test_without_a_limit_it_ends_at_eos(bundled, draft):
    model, tokenizer = bundled
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    eos = tokenizer.eos_token_ids
    tokenizer.eos_token_ids = {newline}
    try:
        plain = mlx_ttt.generate(model, tokenizer, "To be", max_tokens=-1)
        assert mlx_ttt.generate(model, tokenizer, "To be", max_tokens=-1, draft_model=draft) == plain
    finally:
        tokenizer.eos_token_ids = eos


@pytest.mark.parametrize("n", [1, 2, 3, 4, 11])
def test_the_state_goes_on_where_the_text_stopped(bundled, draft, text, n):
    """Broken off after any token, proposed or not: plain caches after all tokens but the last."""
    model, tokenizer = bundled
    state = mlx_ttt.read(model, tokenizer, PROMPT)
    first = ""
    responses = mlx_ttt.stream_generate(
        model, tokenizer, state=state, draft_model=draft, draft_state=mlx_ttt.read(draft, tokenizer, PROMPT)
    )
    for _, response in zip(range(n), responses, strict=False):
        first += response.text
    responses.close()
    assert len(state) == len(mlx_ttt.read(model, tokenizer, PROMPT)) + n
    assert {type(c) for c in state.cache} == {TTTCache}
    assert text.startswith(first + mlx_ttt.generate(model, tokenizer, state=state, max_tokens=60 - n - 10))


def test_after_a_loaded_state_the_draft_model_reads_what_is_new(bundled, draft):
    model, tokenizer = bundled
    state = mlx_ttt.read(model, tokenizer, PROMPT)
    for prompt in ("", "But soft"):
        plain = mlx_ttt.generate(model, tokenizer, prompt, state=state.copy(), max_tokens=20)
        assert mlx_ttt.generate(model, tokenizer, prompt, state=state.copy(), max_tokens=20, draft_model=draft) == plain


def test_sampling_with_a_seed_repeats(bundled, draft):
    def sample():
        mx.random.seed(7)
        return mlx_ttt.generate(*bundled, PROMPT, max_tokens=8, sampler=make_sampler(0.8), draft_model=draft)

    assert sample() == sample()


@pytest.mark.parametrize(("interrupt_at", "num_draft_tokens"), [(1, 3), (6, 3), (20, 16)])
def test_an_interrupt_inside_a_model_leaves_what_was_yielded(
    bundled, draft, text, monkeypatch, interrupt_at, num_draft_tokens
):
    model, tokenizer = bundled
    state, draft_state = (mlx_ttt.read(m, tokenizer, PROMPT) for m in (model, draft))
    calls = 0
    block = type(model.layers[0])
    call = block.__call__

    def interrupted(self, x, cache):
        nonlocal calls
        calls += self is model.layers[1] or self is draft.layers[1]
        if calls == interrupt_at:
            raise KeyboardInterrupt
        return call(self, x, cache)

    first = ""
    options = {"draft_model": draft, "draft_state": draft_state, "num_draft_tokens": num_draft_tokens}
    with monkeypatch.context() as patch:
        patch.setattr(block, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for response in mlx_ttt.stream_generate(model, tokenizer, state=state, **options):
                first += response.text
    assert bool(first) == (interrupt_at > 1)
    assert text.startswith(first + mlx_ttt.generate(model, tokenizer, state=state, max_tokens=20))


def test_what_does_not_fit_is_refused(bundled, draft, stranger):
    model, tokenizer = bundled

    def generate(**options):
        return mlx_ttt.generate(model, tokenizer, PROMPT, max_tokens=5, **options)

    with pytest.raises(ValueError, match="num_draft_tokens is 17, expected 1 to 16"):
        generate(draft_model=draft, num_draft_tokens=17)
    with pytest.raises(ValueError, match="num_draft_tokens is 6, expected 1 to 5"):
        generate(draft_model=stranger, num_draft_tokens=6)
    with pytest.raises(ValueError, match="another text"):
        generate(draft_model=draft, draft_state=mlx_ttt.read(draft, tokenizer, "JULIET"))
    other = Model(ModelArgs(vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(ValueError, match="vocabulary of 50 tokens, the model"):
        generate(draft_model=other)


def test_a_draft_model_reads_the_very_tokens():
    """A prompt that continues a text has other tokens than at its beginning, with a tokenizer that adds a space."""
    tokenizer = TokenizerWrapper(exact("llama-2").tokenizer, SentencePieceDetokenizer)
    size = len(tokenizer.get_vocab())
    model, draft = (
        Model(ModelArgs(vocab_size=size, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)) for _ in range(2)
    )
    state = mlx_ttt.read(model, tokenizer, "the in")
    plain = mlx_ttt.generate(model, tokenizer, "ing", state=state.copy(), max_tokens=5)
    assert mlx_ttt.generate(model, tokenizer, "ing", state=state.copy(), max_tokens=5, draft_model=draft) == plain
