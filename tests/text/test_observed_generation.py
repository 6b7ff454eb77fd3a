"""What is learned from written tokens, and what is written with another learning scale."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlx_ttt
from mlx_ttt.text.generation import ObservedResponse

from .conftest import PROMPT


@pytest.mark.parametrize("max_tokens", [1, 20])
def test_responses_show_what_observe_shows_of_the_same_text(bundled, text, max_tokens):
    model, tokenizer = bundled
    responses = list(mlx_ttt.stream_generate(model, tokenizer, PROMPT, max_tokens=max_tokens, observe=True))
    assert all(isinstance(r, ObservedResponse) for r in responses)
    assert text.startswith("".join(r.text for r in responses))
    prompt = tokenizer.encode(PROMPT)
    seen = mlx_ttt.observe(model, mx.array([[*prompt, *(r.token for r in responses)]]))
    for i, r in enumerate(responses, len(prompt)):
        assert np.isclose(r.surprisal, seen.surprisal[0, i].item(), rtol=1e-3, atol=1e-4)
        for name, found in r.signals._asdict().items():
            assert np.allclose(found, getattr(seen, name)[:, 0, :, i], rtol=1e-3, atol=1e-6), (i, name)


def test_a_text_that_is_observed_continues_as_any_other(bundled):
    """Also from its state after it was broken off."""
    model, tokenizer = bundled
    states = [mlx_ttt.read(model, tokenizer, PROMPT) for _ in range(2)]
    for state, observe in zip(states, (False, True), strict=True):
        for r in mlx_ttt.stream_generate(model, tokenizer, state=state, observe=observe):
            if r.generation_tokens == 7:
                break
    assert all(c.seen is None for c in states[1].cache)
    plain, observed = (mlx_ttt.generate(model, tokenizer, state=state, max_tokens=9) for state in states)
    assert plain == observed


def test_the_learning_scale_is_that_of_prompt_and_text(bundled):
    model, tokenizer = bundled
    prompt = tokenizer.encode("Now is the winter of our discontent made glorious summer by this sun of York.")
    state = mlx_ttt.read(model, tokenizer, prompt, learning=0)
    start = model.make_cache()
    assert all(
        mx.array_equal(w, w0)
        for c, c0 in zip(state.cache, start, strict=True)
        for w, w0 in zip(c.weights, c0.weights, strict=True)
    )
    whole = [r.token for r in mlx_ttt.stream_generate(model, tokenizer, prompt, max_tokens=12, learning=0)]
    ids, cache = list(prompt), model.make_cache()
    for token in whole:
        assert model(mx.array([ids]), model.make_cache(), learning=0)[0, -1].argmax().item() == token
        ids.append(token)
    assert cache[0].empty()


@pytest.mark.parametrize("options", [{"observe": True}, {"learning": 0.5}, {"learning": [1.0]}])
def test_not_with_a_draft_model(bundled, options):
    model, tokenizer = bundled
    with pytest.raises(ValueError, match="observe and learning do not go together with a draft model"):
        next(mlx_ttt.stream_generate(model, tokenizer, PROMPT, draft_model=model, **options))
