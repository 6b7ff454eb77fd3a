"""What the learner shows, and the learning scale, in C: the definition's, and those of MLX operations."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_ttt
from mlx_ttt.network import reference
from mlx_ttt.network.dual import observe, observed_dual_form, update

from ...models import KINDS, largest_error
from ...network.cases import Sizes, make_case, relative_error, scalar
from ...network.test_signals import assert_observed
from .c_code import needs_c, without_c
from .test_decode_step import build, copies, started

pytestmark = needs_c

SCALES = [0.5, [2.0, 0.0, 1.0], [[0.3, 1.2], [1.0, 0.0]], np.linspace(0, 2, 12).reshape(2, 3, 2)]


# ---- The update rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", range(5))
def test_from_any_phase(kind, phase, spy):
    for T in (16, 19, 20):
        case = make_case(kind, T=T, sizes=Sizes(K=5), phase=[phase], seed=T)
        assert_observed(observe(*case), reference.observe(*case))
        assert spy.taken() == {"update"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("H", "D", "K"), [(3, 8, 1), (2, 24, 16), (1, 64, 16), (1, 96, 20)])
def test_sizes(kind, H, D, K):
    case = make_case(kind, T=37, sizes=Sizes(H, D, K), phase=[K - 1, K // 2])
    assert_observed(observe(*case), reference.observe(*case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [None, [40, 5, 0], [1, 39, 16], [0, 0, 0]])
def test_sequences_in_different_phases_and_of_different_lengths(kind, lengths):
    case = make_case(kind, T=40, sizes=Sizes(K=16), phase=[0, 3, 15], lengths=lengths)
    assert_observed(observe(*case), reference.observe(*case), lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(kind, dtype):
    case = make_case(kind, T=20, phase=[2], dtype=dtype)
    signals, expected = observe(*case)[2], reference.observe(*case)[2]
    for x, x_expected in zip(signals, expected, strict=True):
        assert x.dtype == mx.float32 and relative_error(x, x_expected) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_nothing(kind):
    case = make_case(kind, T=50, sizes=Sizes(D=64, K=16), phase=[0, 13], lengths=[50, 31])
    (y, state), (y_seen, state_seen, _) = update(*case), observe(*case)
    for x, x_seen in zip((y, *state.weights, state.rows), (y_seen, *state_seen.weights, state_seen.rows), strict=True):
        assert mx.array_equal(x, x_seen)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_operations(kind, spy):
    """Of y, the state and the signals, while somebody looks."""
    case = make_case(kind, T=20, phase=[3])

    def gradients(rule):
        def of(*arrays):
            y, state, signals = rule(*case.with_arrays(arrays))
            return scalar(y, state) + sum(x.sum() for x in signals)

        return mx.grad(of, argnums=list(range(len(case.arrays))))(*case.arrays)

    found = gradients(observe)
    assert spy.taken() == {"update"}
    for x, expected in zip(found, gradients(observed_dual_form.in_mlx), strict=True):
        assert relative_error(x, expected) <= 1e-4


# ---- A decoded token -------------------------------------------------------------------------------------------------


def looked_at(model, cache, tokens, **options) -> list[mlx_ttt.Observation]:
    return [mlx_ttt.observe(model, tokens[:, i : i + 1], cache, **options) for i in range(tokens.shape[1])]


def signals(seen: list[mlx_ttt.Observation]) -> list[mx.array]:
    return [mx.concatenate([getattr(x, name) for x in seen], axis=-1) for name in ("loss", "lr", "write_norm")]


@pytest.mark.parametrize("learning", [1.0, *SCALES])
@pytest.mark.parametrize("flags", ["000", "111"])
@pytest.mark.parametrize("kind", KINDS)
def test_signals_and_scales_are_those_of_mlx_operations(kind, flags, learning, spy, monkeypatch):
    model = build(kind, flags)
    cache = started(model, (0, 3, 5))
    tokens, expected_cache = mx.random.randint(0, 61, (3, 20)), copies(cache)

    def in_mlx():
        seen = looked_at(model, expected_cache, tokens, learning=learning)
        return signals(seen), mx.concatenate([x.logits for x in seen], axis=1)

    expected, expected_logits = without_c(monkeypatch, in_mlx)
    spy.taken()
    seen = looked_at(model, cache, tokens, learning=learning)
    assert spy.taken() == {"token"}
    for found, wanted in zip(signals(seen), expected, strict=True):
        assert largest_error(found, wanted) <= 1e-5
    assert largest_error(mx.concatenate([x.logits for x in seen], axis=1), expected_logits) <= 1e-5
    arrays = (tree_flatten([c.arrays for c in layers]) for layers in (cache, expected_cache))
    for (name, x), (_, x_expected) in zip(*arrays, strict=True):
        assert largest_error(x, x_expected) <= 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_looked_at_is_the_same_bit_for_bit(kind):
    model = build(kind, "111")
    cache = started(model, (2, 5))
    plain, tokens = copies(cache), mx.random.randint(0, 61, (2, 20))
    for i, seen in enumerate(looked_at(model, cache, tokens)):
        assert mx.array_equal(seen.logits, model(tokens[:, i : i + 1], plain)).item()
    for (_, x), (_, y) in zip(*(tree_flatten([c.arrays for c in c_]) for c_ in (cache, plain)), strict=True):
        assert mx.array_equal(x, y).item()


def test_looking_leaves_the_state_in_c():
    """Taking it back and giving it again for each token would cost a fifth of the token."""
    model = build("mlp", "111")
    cache = started(model, (2, 5))
    looked_at(model, cache, mx.array([[3], [4]]))
    keepers = [c._keeper for c in cache]
    looked_at(model, cache, mx.array([[5, 6], [7, 8]]))
    assert None not in keepers and [c._keeper for c in cache] == keepers


def test_a_scale_of_one_for_some_is_bit_for_bit_the_model_for_those(spy):
    model = build("linear", "111")
    cache = started(model, (2, 5))
    plain, tokens = copies(cache), mx.random.randint(0, 61, (2, 20))
    for i in range(20):
        token = tokens[:, i : i + 1]
        assert mx.array_equal(model(token, cache, learning=[1.0, 0.4])[0], model(token, plain)[0]).item()
    assert spy.taken() >= {"token"}
