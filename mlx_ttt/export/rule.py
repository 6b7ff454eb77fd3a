"""The update rule of the exported network: the dual form for any inner model, one mini-batch after the other.

Shapes: H heads, D head dimension, K mini-batch size, n tokens of a mini-batch that a call reads (1 or K). The inner
model's map l takes x_l [1, H, n, d] to z_l = x_l W_l + b_l; x_1 is a key or a query. See network/inner.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..network.inner import InnerModel
from .calls import Call, Signals
from .elementwise import gelu_and_grad, layer_norm, miss_and_grad, sqrt
from .layout import stored_transposed
from .numbers import Numbers
from .operations import Value


@dataclass(frozen=True)
class Tokens:
    """What the update rule reads: queries, keys and values [1, H, n, D], learning rates [1, H, n, 1]."""

    q: Value
    k: Value
    v: Value
    lr: Value


@dataclass(frozen=True)
class Learner:
    """What does not change while a text is read, as constants in the inner model's number type.

    Attributes:
        inner: which inner model.
        start: its weights before the first token by name, as `layout.stored` has them, [1, H, ·, ·].
        gamma, beta: of its LayerNorm, [1, H, 1, D].
        t: the factor of each token of a mini-batch, [K].
    """

    inner: InnerModel
    start: Mapping[str, np.ndarray]
    gamma: np.ndarray
    beta: np.ndarray
    t: np.ndarray

    @property
    def last_factor(self) -> np.ndarray:
        """t_{K-1}, by which a whole mini-batch is committed."""
        return np.asarray(self.t[-1])


@dataclass(frozen=True)
class _Map:
    """A map of the inner model: the names of its weights and of its two parts of a row."""

    W: str
    b: str
    x: str
    e: str
    transposed: bool  # whether W is stored so


class UpdateRule:
    """The inner model of one layer, trained on the tokens of one call.

    Args:
        numbers: operations and number types.
        learner: the constants.
        call: which tokens count, and where they stand.
        layer: the index of the layer.
    """

    def __init__(self, numbers: Numbers, learner: Learner, call: Call, layer: int):
        self.numbers, self.ops, self.learner, self.call = numbers, numbers.ops, learner, call
        self.factors = call.factors[layer]
        W, x = learner.inner.weight_names, learner.inner.row_names
        named = zip(W[::2], W[1::2], x[::2], x[1::2], strict=True)
        self.maps = [_Map(*names, stored_transposed(learner.inner, names[0])) for names in named]

    def __call__(self, tokens: Tokens, state: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
        """Read the tokens of the call.

        Args:
            tokens: T of them.
            state: the layer's parts of the state.

        Returns:
            The output [1, H, T, D], and the inner model's parts of the state after the call. If the call asks for
            signals, they are added to what it has seen.
        """
        ops, start = self.ops, self.learner.start
        deltas = {name: ops.reshape(ops.cast(state[name], self.numbers.inner), W.shape) for name, W in start.items()}
        outputs, rows_of, signals = [], [], []
        parts = [self.call.mini_batches(x) for x in (tokens.q, tokens.k, tokens.v, tokens.lr)]
        for complete, *part in zip(self.call.committed, *parts, strict=True):
            weights = {name: ops.add(W, deltas[name]) for name, W in start.items()}
            y, rows, seen = self._mini_batch(Tokens(*part), weights, state)
            outputs.append(y)
            rows_of.append(rows)
            signals.append(seen)
            deltas = self._commit(deltas, rows, complete)

        def narrow(x: Value, before: Value) -> Value:
            return ops.cast(ops.reshape(x, ops.shape(before)), self.numbers.outside)

        after = {name: narrow(x, state[name]) for name, x in deltas.items()}
        for name in self.learner.inner.row_names:
            after[name] = narrow(self.call.kept([rows[name] for rows in rows_of]), state[name])
        if self.call.seen is not None:
            by_kind = ([getattr(one, name) for one in signals] for name in ("loss", "lr", "write_norm"))
            self.call.seen.append(Signals(*(self.call.where_counted(ops.concat(x, axis=2)) for x in by_kind)))
        return ops.concat(outputs, axis=2), after

    def _mini_batch(
        self, tokens: Tokens, weights: Mapping[str, Value], open_rows: Mapping[str, Value]
    ) -> tuple[Value, dict[str, Value], Signals | None]:
        """Tokens of one mini-batch.

        Args:
            tokens: n of them.
            weights: of the inner model at the start of the mini-batch.
            open_rows: those of the tokens before, as the state has them.

        Returns:
            The output [1, H, n, D], the mini-batch's rows by part, [1, H, K, d], and its signals if they are asked for.
        """
        ops = self.ops
        n = ops.shape(tokens.q)[2]
        # Keys and queries go through the first map together: one product instead of two.
        z = self._forward(self.maps[0], ops.concat([tokens.k, tokens.q], axis=2), weights)
        z_k, z_q = ops.split(z, [n, n], axis=2)
        new, miss = self._new_rows(tokens, z_k, weights)
        rows = {name: self.call.rows(x, open_rows[name]) for name, x in new.items()}
        signals = None if self.call.seen is None else self._signals(tokens.lr, miss, new)
        return self._output(tokens.q, z_q, weights, rows), rows, signals

    def _signals(self, lr: Value, miss: Value, new: Mapping[str, Value]) -> Signals:
        """‖LN(f(k)) - (v - k)‖² / 2, the rates, and t_{K-1} sqrt(Σ_l (‖x_l‖² + 1) ‖e_l‖²), each [1, H, n, 1].

        In float32 whatever the number type of the inner model: half precision has no room for squares of errors.
        """
        ops = self.ops

        def squares(x: Value) -> Value:
            return ops.reduce_sum(ops.square(ops.cast(x, np.float32)), axis=-1)

        def written(map_: _Map) -> Value:
            return ops.mul(ops.add(squares(new[map_.x]), np.float32(1)), squares(new[map_.e]))

        norm = sqrt(ops, ops.total([written(map_) for map_ in self.maps]))
        return Signals(
            loss=ops.mul(squares(miss), np.float32(0.5)),
            lr=ops.cast(lr, np.float32),
            write_norm=ops.mul(norm, np.float32(self.learner.last_factor)),
        )

    def _new_rows(self, tokens: Tokens, z: Value, weights: Mapping[str, Value]) -> tuple[dict[str, Value], Value]:
        """Keys forward, errors backward: x_l and e_l of each map by name; and LN(f(k)) - (v - k). z is z_1 of keys."""
        ops, learner = self.ops, self.learner
        inputs, slopes = [tokens.k], []
        for map_ in self.maps[1:]:
            x, slope = gelu_and_grad(ops, z)
            inputs.append(x)
            slopes.append(slope)
            z = self._forward(map_, x, weights)
        aim = ops.sub(tokens.v, tokens.k)
        miss, gradient = miss_and_grad(ops, z, aim, learner.gamma, learner.beta)
        errors = [ops.mul(tokens.lr, gradient)]
        for map_, slope in zip(self.maps[:0:-1], slopes[::-1], strict=True):
            backward = ops.matmul(errors[-1], weights[map_.W], transpose_y=not map_.transposed)  # e Wᵀ
            errors.append(ops.mul(backward, slope))
        pairs = zip(self.maps, inputs, errors[::-1], strict=True)
        return {name: value for map_, x, e in pairs for name, value in ((map_.x, x), (map_.e, e))}, miss

    def _output(self, q: Value, z: Value, weights: Mapping[str, Value], rows: Mapping[str, Value]) -> Value:
        """Queries forward through what the inner model has learned up to each of them; z is z_1 of the queries."""
        ops, x = self.ops, q
        for map_ in self.maps:
            if map_ is not self.maps[0]:
                x = ops.gelu(z)
                z = self._forward(map_, x, weights)
            z = ops.add(z, self._causal_sum(x, rows[map_.x], rows[map_.e]))
        return ops.add(q, layer_norm(ops, z, self.learner.gamma, self.learner.beta))

    def _forward(self, map_: _Map, x: Value, weights: Mapping[str, Value]) -> Value:
        """x W + b"""
        product = self.ops.matmul(x, weights[map_.W], transpose_y=map_.transposed)
        return self.ops.add(product, weights[map_.b])

    def _causal_sum(self, q: Value, x: Value, e: Value) -> Value:
        """-t_i Σ_{j<=i} (q_i · x_j + 1) e_j: what the open mini-batch adds to z, [1, H, n, d].

        Tokens that do not count add nothing to those that do: they come after all of them.
        """
        ops = self.ops
        scores = ops.add(ops.matmul(q, x, transpose_y=True), self.numbers.inner_const(1))  # [1, H, n, K]
        return ops.matmul(ops.mul(scores, self.factors), e)

    def _commit(self, deltas: Mapping[str, Value], rows: Mapping[str, Value], complete: Value) -> dict[str, Value]:
        """W_l - t_{K-1} x_lᵀ e_l and b_l - t_{K-1} Σ e_l if the mini-batch is complete, as changes from the start."""
        ops, changed = self.ops, {}
        step = ops.mul(complete, -self.learner.last_factor)
        for map_ in self.maps:
            x, e = rows[map_.x], ops.mul(step, rows[map_.e])
            first, second = (e, x) if map_.transposed else (x, e)
            changed[map_.W] = ops.add(deltas[map_.W], ops.matmul(first, second, transpose_x=True))
            changed[map_.b] = ops.add(deltas[map_.b], ops.reduce_sum(e, axis=2))
        return changed
