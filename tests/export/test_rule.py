"""The exported update rule against its definition, for inner models of one, two and three maps."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ttt.export.calls import Prefill
from mlx_ttt.export.layout import halves_first, stored
from mlx_ttt.export.numbers import Numbers
from mlx_ttt.export.rule import Learner, Tokens, UpdateRule
from mlx_ttt.network.inner import TTT_LINEAR, TTT_MLP, InnerModel

from ..models import build
from .eager import EagerOperations
from .texts import error

H, D, K = 2, 12, 6  # of the model whose token factors are used
INNER = [TTT_LINEAR, TTT_MLP, InnerModel("deep", "three maps, of which one narrows", (1, 3, 2, 1), base_lr=1.0)]


def layer_norm(z, gamma, beta):
    z = z - z.mean(-1, keepdims=True)
    return z * mx.rsqrt(mx.square(z).mean(-1, keepdims=True) + 1e-6) * gamma + beta


def chain(inner: InnerModel, weights: dict, x):
    """f(x) of the inner model."""
    for i in range(1, inner.num_maps + 1):
        x = x @ weights[f"W{i}"] + weights[f"b{i}"]
        x = nn.gelu_approx(x) if i < inner.num_maps else x
    return x


def by_definition(inner, weights, norm, tokens, t, n):
    """n tokens of one mini-batch: token i is read with the weights less t_i times the gradients up to it."""

    def loss(weights, k, v):
        return 0.5 * mx.square(layer_norm(chain(inner, weights, k), *norm) - (v - k)).sum()

    q, k, v, lr = tokens
    sums, outputs, now = {name: mx.zeros_like(w) for name, w in weights.items()}, [], weights
    for i in range(n):
        one = slice(i, i + 1)
        gradient = mx.grad(loss)(weights, k[:, one], v[:, one])
        sums = {name: sums[name] + lr[:, one] * gradient[name] for name in weights}
        now = {name: weights[name] - t[i] * sums[name] for name in weights}
        outputs.append(q[:, one] + layer_norm(chain(inner, now, q[:, one]), *norm))
    return mx.concatenate(outputs, axis=1), now


@pytest.mark.parametrize("length", [K, 2])
@pytest.mark.parametrize("inner", INNER, ids=lambda inner: inner.name)
def test_a_mini_batch(inner, length):
    model, rng = build("linear", "000"), np.random.default_rng(0)
    numbers = Numbers(EagerOperations(), "float32", np.float32)
    call = Prefill(numbers, model, K, np.array([length], np.int32))

    def normal(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)

    weights = {name: normal(H, *shape) for name, shape in inner.weight_shapes(D).items()}
    norm = 1 + 0.2 * normal(H, 1, D), 0.2 * normal(H, 1, D)
    q, k, v = (rng.standard_normal((H, K, D)).astype(np.float32) for _ in range(3))
    lr = rng.uniform(0.01, 0.1, (H, K, 1)).astype(np.float32)
    t = np.array(model.layers[0].seq_modeling_block.token_factors())

    order = halves_first(D)
    start = {name: stored(inner, name, w)[None] for name, w in weights.items()}
    learner = Learner(inner, start, norm[0][None, ..., order], norm[1][None, ..., order], t)
    parts = {name: rows * columns // D for name, (rows, columns) in inner.weight_shapes(D).items()}
    parts |= {name: K * width // D for name, width in inner.row_widths(D).items()}
    empty = {name: np.zeros((1, H, rows, D), np.float32) for name, rows in parts.items()}
    tokens = Tokens(*(x[None, ..., order] for x in (q, k, v)), lr[None])
    y, state = UpdateRule(numbers, learner, call, 0)(tokens, empty)

    exact = {name: mx.array(w) for name, w in weights.items()}
    exact_norm = [mx.array(x) for x in norm]
    wanted, then = by_definition(inner, exact, exact_norm, [mx.array(x) for x in (q, k, v, lr)], t.tolist(), length)
    assert error(y[0, :, :length], np.array(wanted)[..., order]) <= 1e-5
    for name in inner.weight_names:
        delta = stored(inner, name, np.array(then[name]) - weights[name]).reshape(state[name].shape[1:])
        if length == K:
            assert error(state[name][0], delta) <= 1e-4, name
        else:
            assert not state[name].any()
    for name in inner.row_names:
        rows = state[name].reshape(H, K, -1)
        assert rows[:, :length].any() == (length < K)
        assert not rows[:, length:].any()
