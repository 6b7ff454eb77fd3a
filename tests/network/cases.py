"""Calls of the update rule, and how to compare their results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ttt.network.inner import INNER_MODELS
from mlx_ttt.network.rule import Learner, State, Tokens

BOUND = 1e-5  # relative L2 error of float32 arithmetic


@dataclass(frozen=True)
class Sizes:
    """Heads, head dimension and mini-batch size."""

    H: int = 2
    D: int = 8
    K: int = 8


class Case(NamedTuple):
    """The arguments of a call: `update(*case)`."""

    tokens: Tokens
    learner: Learner
    state: State

    @property
    def kind(self) -> str:
        return self.learner.inner.name

    @property
    def arrays(self) -> list[mx.array]:
        """What a call can be differentiated in: tokens, constants, rows, weights."""
        tokens, learner, state = self
        constants = (learner.t, learner.gamma, learner.beta)
        return [tokens.q, tokens.k, tokens.v, tokens.lr, *constants, state.rows, *state.weights]

    @property
    def names(self) -> list[str]:
        """Of those arrays."""
        return ["q", "k", "v", "lr", "t", "gamma", "beta", "rows", *self.learner.inner.weight_names]

    def with_arrays(self, arrays: Sequence[mx.array]) -> Case:
        """The same call of other arrays."""
        q, k, v, lr, t, gamma, beta, rows, *weights = arrays
        return Case(
            replace(self.tokens, q=q, k=k, v=v, lr=lr),
            replace(self.learner, t=t, gamma=gamma, beta=beta),
            replace(self.state, rows=rows, weights=tuple(weights)),
        )

    def changed(self, name: str, value) -> Case:
        """With another value of one field, or of one of the weights."""
        if name in self.learner.inner.weight_names:
            weights = dict(zip(self.learner.inner.weight_names, self.state.weights, strict=True)) | {name: value}
            name, value = "weights", tuple(weights.values())
        return Case(*(replace(part, **{name: value}) if name in vars(part) else part for part in self))

    def value(self, name: str):
        """Of a field, or one of the weights."""
        weights = dict(zip(self.learner.inner.weight_names, self.state.weights, strict=True))
        return (vars(self.tokens) | vars(self.learner) | vars(self.state) | weights)[name]

    def part(self, start: int, stop: int) -> Case:
        """The call with some of its tokens, all of which count."""
        return self._replace(tokens=self.tokens.part(start, stop, None))

    def alone(self, b: int) -> Case:
        """The call with one of its sequences."""
        tokens, _, state = self
        arrays = (x[b : b + 1] for x in (tokens.q, tokens.k, tokens.v, tokens.lr))
        lengths = None if tokens.lengths is None else tokens.lengths[b : b + 1]
        return self._replace(tokens=Tokens(*arrays, lengths=lengths), state=sequence(state, b))


def make_case(
    kind: str,
    *,
    phase: Sequence[int],
    T: int,
    sizes: Sizes = Sizes(),
    lengths: Sequence[int] | None = None,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> Case:
    """A call with a sequence for each phase, in which every term matters: nothing is near zero or one."""
    key = mx.random.split(mx.random.key(seed), 12)
    inner, B, H, D, K = INNER_MODELS[kind], len(phase), sizes.H, sizes.D, sizes.K

    def normal(i, *shape, scale=1.0):
        return scale * mx.random.normal(shape, key=key[i])

    weights = tuple(
        normal(i, B, H, *shape, scale=0.1 if name.startswith("b") else 1 / math.sqrt(shape[0]))
        for i, (name, shape) in enumerate(inner.weight_shapes(D).items())
    )
    written = mx.array([[slot < p for slot in range(K)] for p in phase])[:, None, :, None]
    rows = normal(4, B, H, K, inner.row_width(D), scale=0.3) * written
    q, k, v = (normal(i, B, T, H, D).astype(dtype) for i in (5, 6, 7))
    lr = (mx.random.uniform(shape=(B, T, H), key=key[8]) / D).astype(dtype)
    t = mx.maximum(1 / mx.arange(1, K + 1) + normal(9, K, scale=0.1), 0)
    learner = Learner(inner, t, 1 + normal(10, H, D, scale=0.2), normal(11, H, D, scale=0.2))
    return Case(Tokens(q, k, v, lr, lengths), learner, State(weights, rows, list(phase)))


def sequence(state: State, b: int) -> State:
    """The state of one sequence."""
    with mx.stream(mx.cpu):  # the reference's is float64
        weights = tuple(w[b : b + 1] for w in state.weights)
        return State(weights, state.rows[b : b + 1], state.phase[b : b + 1])


def relative_error(found: mx.array, expected: mx.array) -> float:
    """Relative L2 distance; the absolute one where nothing is expected."""
    found, expected = (np.array(x.astype(mx.float64, stream=mx.cpu)) for x in (found, expected))
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1))


def counted(y: mx.array, lengths: Sequence[int] | None) -> mx.array:
    """y [B, T, H, D] with the tokens past each sequence's length, whose outputs mean nothing, set to zero."""
    if lengths is None:
        return y
    counts = mx.arange(y.shape[1]) < mx.array(lengths)[:, None]
    return mx.where(counts[..., None, None], y, mx.zeros_like(y), stream=mx.cpu)


def scalar(y: mx.array, state: State, lengths: Sequence[int] | None = None) -> mx.array:
    """Something to differentiate, in which every output takes part."""
    outputs = (counted(y, lengths), *state.weights, state.rows)
    return sum((x * mx.sin(mx.arange(x.size, dtype=x.dtype).reshape(x.shape))).sum() for x in outputs)


def phases(state: State) -> list[int]:
    return state.phase.tolist() if isinstance(state.phase, mx.array) else list(state.phase)


def assert_agrees(found, expected, lengths=None, bound=BOUND) -> None:
    """Two results (y, state) of the update rule agree within `bound`."""
    (y, state), (y_expected, state_expected) = found, expected
    assert relative_error(counted(y, lengths), counted(y_expected, lengths)) <= bound, "y"
    for name, w, w_expected in zip(("W1", "b1", "W2", "b2"), state.weights, state_expected.weights, strict=False):
        assert relative_error(w, w_expected) <= bound, name
    assert relative_error(state.rows, state_expected.rows) <= bound, "rows"
    assert phases(state) == phases(state_expected)
