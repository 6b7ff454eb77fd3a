"""Each golden checkpoint, converted with the command line: the official implementation's logits and greedy tokens."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..conftest import GOLDEN
from ..models import BOUND, in_calls, largest_error

PYTORCH = [name for name in GOLDEN if not name.startswith("jax")]  # more is known of these than logits


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request, golden_model):
    return golden_model(request.param)


def test_logits_in_one_call(golden):
    model, expected = golden
    assert largest_error(model(expected["input_ids"]), expected["logits"]) <= BOUND


def test_logits_token_by_token(golden):
    model, expected = golden
    ids = expected["input_ids"]
    assert largest_error(in_calls(model, ids, range(1, ids.shape[1])), expected["logits"]) <= BOUND


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 60)))
def test_logits_in_random_splits(golden, cuts):
    model, expected = golden
    ids = expected["input_ids"]
    cuts = {n for n in cuts if n < ids.shape[1]}
    assert largest_error(in_calls(model, ids, cuts), expected["logits"]) <= BOUND


@pytest.mark.parametrize("golden", PYTORCH, indirect=True)
def test_hidden_states_of_every_block(golden):
    model, expected = golden
    cache = model.make_cache()
    x = model.model.embed_tokens(expected["input_ids"])
    for i, (layer, c) in enumerate(zip(model.layers, cache, strict=True)):
        c.expand(x.shape[0])
        x = layer(x, c)
        assert largest_error(x, expected[f"hidden_states.{i}"]) <= BOUND, i
    assert largest_error(model.model.norm(x), expected[f"hidden_states.{i + 1}"]) <= BOUND


@pytest.mark.parametrize("golden", PYTORCH, indirect=True)
def test_greedy_tokens(golden):
    """By mlx-lm's own generation loop: a prompt of 13 tokens, then one at a time."""
    from mlx_lm.generate import generate_step

    model, expected = golden
    ids = expected["generated_ids"][0]
    prompt, n = ids[:13], ids.shape[0] - 13
    assert [token for token, _ in generate_step(prompt, model, max_tokens=n)] == ids[13:].tolist()
