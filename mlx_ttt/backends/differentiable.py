"""Gradients of what MLX cannot differentiate: those of the same function in MLX operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..network.dual import dual_form, next_phase, observed_dual_form
from ..network.rule import Learner, State, Tokens

Arrays = Sequence[mx.array]
Backward = Callable[[Arrays, Arrays], Arrays]


def differentiable(
    by_kernel: Callable[..., Arrays],
    by_operations: Callable[..., Arrays],
    backward: Backward | None = None,
) -> Callable[..., Arrays]:
    """`by_kernel`, with the gradient of `by_operations`, which is computed again from the inputs.

    Args:
        backward: computes that gradient from the inputs and the cotangents of the outputs. It returns `NotImplemented`
            where it cannot; then MLX differentiates the operations.
    """
    function = mx.custom_function(by_kernel)

    @function.vjp
    def gradient(inputs: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        inputs, cotangents = ([x] if isinstance(x, mx.array) else x for x in (inputs, cotangents))  # of one
        found = backward(inputs, cotangents) if backward else NotImplemented
        if found is not NotImplemented:
            return list(found)
        return mx.vjp(by_operations, list(inputs), list(cotangents))[1]

    @function.jvp
    def tangent(inputs: Any, tangents: Any) -> list[mx.array]:
        inputs, tangents = ([x] if isinstance(x, mx.array) else x for x in (inputs, tangents))
        tangents = [mx.zeros_like(x) if dx is None else dx for x, dx in zip(inputs, tangents, strict=True)]
        return mx.jvp(by_operations, list(inputs), tangents)[1]

    return function  # type: ignore[return-value]


class Signature:
    """A call of the update rule less its arrays, which MLX differentiates as a list.

    It holds no array: a graph keeps it, and would keep the open rows from being written in place.
    """

    def __init__(self, tokens: Tokens, learner: Learner, state: State):
        self.inner = learner.inner
        self.phase = state.phase
        self.lengths = tokens.lengths
        self.counts = tokens.counts

    @staticmethod
    def arrays(tokens: Tokens, learner: Learner, state: State) -> list[mx.array]:
        constants = (learner.t, learner.gamma, learner.beta)
        return [tokens.q, tokens.k, tokens.v, tokens.lr, *constants, *state.weights, state.rows]

    def arguments(self, arrays: Arrays) -> tuple[Tokens, Learner, State]:
        """The call of the same arrays, or of others in their places."""
        q, k, v, lr, t, gamma, beta, *weights, rows = arrays
        learner = Learner(self.inner, t, gamma, beta)
        return Tokens(q, k, v, lr, self.lengths), learner, State(tuple(weights), rows, self.phase)

    def dual_form(self, *arrays: mx.array) -> list[mx.array]:
        """y, and the weights and rows after the tokens, in MLX operations."""
        y, state = dual_form.in_mlx(*self.arguments(arrays))
        return [y, *state.weights, state.rows]

    def observed_dual_form(self, *arrays: mx.array) -> list[mx.array]:
        """The same, and the losses and the norms of the writes."""
        y, state, signals = observed_dual_form.in_mlx(*self.arguments(arrays))
        return [y, *state.weights, state.rows, signals.loss, signals.write_norm]

    def after(self, weights: Arrays, rows: mx.array) -> State:
        """The state after the tokens."""
        return State(tuple(weights), rows, next_phase(self.phase, self.counts, rows.shape[2]))
