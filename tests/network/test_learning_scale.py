"""The learning scale: what it multiplies, and what it leaves alone."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_ttt
from mlx_ttt.network.learning_scale import is_one, learning_scale

from ..models import KINDS, largest_error, shared

ALL = [0.0, 0.5, 2.0]  # for one sequence each
EVERY = np.arange(12, dtype=np.float32).reshape(2, 3, 2) / 4  # [layers, B, H]


def ids(B: int, T: int) -> mx.array:
    return mx.random.randint(0, 61, (B, T), key=mx.random.key(T))


def read(model, tokens, cuts=(), **options):
    cache, logits = model.make_cache(), []
    for a, b in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        logits.append(model(tokens[:, a:b], cache, **options))
    return mx.concatenate(logits, axis=1), cache


def same_state(cache, expected) -> bool:
    pairs = zip(tree_flatten([c.state for c in cache]), tree_flatten([c.state for c in expected]), strict=True)
    return all(mx.array_equal(mx.array(x), mx.array(y)).item() for (_, x), (_, y) in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learning", [1, 1.0, mx.ones(3), [[1.0]], np.ones((2, 3, 2))])
def test_one_is_the_model_as_it_is_bit_for_bit(kind, learning):
    model, tokens = shared(kind, "111"), ids(3, 20)
    for cuts in ([], [1, 2, 3, 17, 18]):
        (logits, cache), (expected, plain) = read(model, tokens, cuts, learning=learning), read(model, tokens, cuts)
        assert mx.array_equal(logits, expected).item() and same_state(cache, plain)


def test_one_costs_nothing():
    assert is_one(1) and is_one(1.0) and not is_one(mx.array(1.0)) and not is_one(0.5)


@pytest.mark.parametrize(
    ("learning", "full"),
    [
        (0.5, np.full((2, 3, 2), 0.5)),
        (ALL, np.broadcast_to(np.array(ALL)[:, None], (2, 3, 2))),
        (mx.array([[2.0], [3.0]]), np.broadcast_to(np.array([2.0, 3.0])[:, None, None], (2, 3, 2))),
        ([[2.0, 3.0]], np.broadcast_to([2.0, 3.0], (2, 3, 2))),
        ([[[2.0, 3.0]]], np.broadcast_to([2.0, 3.0], (2, 3, 2))),
        (EVERY, EVERY),
    ],
)
@pytest.mark.parametrize("T", [1, 20])
def test_learning_rates_are_multiplied(learning, full, T):
    """Read off the rates that the learners use; the second layer's own depend on what the first has learned."""
    model, tokens = shared("linear", "111"), ids(3, T)
    for layer, found, plain in zip(
        range(2), mlx_ttt.observe(model, tokens, learning=learning).lr, mlx_ttt.observe(model, tokens).lr, strict=True
    ):
        assert layer or np.allclose(found, np.array(plain) * full[0][..., None], rtol=1e-5)
    scale = learning_scale(learning, 2, 3, 2)
    assert np.array_equal(np.broadcast_to(np.array(scale), (2, 3, 1, 2))[:, :, 0], full)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_with_scales_of_their_own_read_as_they_do_alone(kind):
    model, tokens = shared(kind, "111"), ids(3, 25)
    logits, _ = read(model, tokens, [1, 2, 20, 21], learning=EVERY)
    for b in range(3):
        alone, _ = read(model, tokens[b : b + 1], learning=EVERY[:, b : b + 1])
        assert largest_error(logits[b : b + 1], alone) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[], range(1, 20)])
def test_with_zero_the_open_mini_batch_is_committed_and_the_weights_stay(kind, cuts):
    """K = 6: four rows are open. Two tokens later the weights are written once, and never again."""
    model, tokens = shared(kind, "111"), ids(2, 24)
    cache = model.make_cache()
    model(tokens[:, :4], cache)
    before = [np.array(c.weights[0]) for c in cache]
    rows = [np.array(c.rows) for c in cache]
    model(tokens[:, 4:5], cache, learning=0)
    for c, expected in zip(cache, rows, strict=True):
        assert np.array_equal(np.array(c.rows)[:, :, :4], expected[:, :, :4])  # they keep their e
    model(tokens[:, 5:6], cache, learning=0)
    committed = [[np.array(w) for w in c.weights] for c in cache]
    written = [not np.array_equal(a, b[0]) for a, b in zip(before, committed, strict=True)]
    writes = [layer.seq_modeling_block.token_factors()[-1].item() > 0 for layer in model.layers]
    assert written == writes and any(writes)
    start = cache[0].history["conv"]
    for a, b in zip([6, *(6 + n for n in cuts if n < 18)], [*(6 + n for n in cuts if n < 18), 24], strict=True):
        model(tokens[:, a:b], cache, learning=0)
    for c, weights in zip(cache, committed, strict=True):
        assert all(np.array_equal(np.array(w), x) for w, x in zip(c.weights, weights, strict=True))
        assert c.offset == [24, 24]
    assert not mx.array_equal(cache[0].history["conv"], start).item()


def test_it_may_change_within_a_mini_batch():
    """Each row carries the scale that it was read with."""
    model, tokens = shared("linear", "000"), ids(1, 3)
    cache = model.make_cache()
    for i, scale in enumerate((1.0, 0.0, 3.0)):
        model(tokens[:, i : i + 1], cache, learning=scale)
    _, plain = read(model, tokens, [1, 2])
    e, e_plain = (np.array(c[0].rows)[0, :, :3, 12:] for c in (cache, plain))
    assert np.allclose(e, e_plain * np.array([1, 0, 3])[:, None], rtol=1e-5)


def test_without_a_cache():
    model, tokens = shared("mlp", "111"), ids(3, 13)
    assert largest_error(model(tokens, learning=EVERY), read(model, tokens, learning=EVERY)[0]) <= 1e-5
    assert largest_error(model(tokens, learning=0.2), model(tokens)) > 1e-3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf, 1e300, [1.0, -1.0, 1.0]])
def test_values_that_are_no_scales(wrong):
    with pytest.raises(ValueError, match=r"learning is .*, expected finite numbers that are not negative"):
        shared("linear", "000")(ids(3, 2), learning=wrong)


@pytest.mark.parametrize("shape", [(2,), (1,), (0,), (3, 2), (2, 3), (2, 2, 2), (3, 3, 2), (1, 1, 1, 1)])
def test_shapes_that_do_not_fit(shape):
    expected = r"a number, \[3\] \(sequences\), \[2, 2\] \(layers, heads\) or \[2, 3, 2\]"
    with pytest.raises(ValueError, match=rf"learning has shape .*, expected {expected}"):
        shared("linear", "000")(ids(3, 2), learning=np.ones(shape))


def test_what_is_no_number():
    with pytest.raises(ValueError, match="learning is 'fast', expected numbers"):
        shared("linear", "000")(ids(3, 2), learning="fast")
