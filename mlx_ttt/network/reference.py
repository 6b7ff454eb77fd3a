"""The update rule by its definition: the primal form, token by token, in float64.

The inner model f is trained on every token it reads. Its loss on a token is the squared error of reconstructing v - k
from k, through a LayerNorm (Sun et al. 2024, arXiv 2407.04620, section 2). Its gradients come from automatic
differentiation, never from a formula. Everything else in this package is tested against this page. Only tests should
call it: it is slow, and runs on the CPU.
"""

from __future__ import annotations

import math

import mlx.core as mx

from .rule import Learner, Signals, State, Tokens

EPS = 1e-6


def update(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State]:
    """Read T tokens from any phase of the open mini-batch. Takes what `dual.update` takes; float64 comes back."""
    y, state, _ = observe(tokens, learner, state)
    return y, state


def observe(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State, Signals]:
    """The same, and what the learner does with each token."""
    with mx.stream(mx.cpu):
        q, k, v, lr = (x.astype(mx.float64) for x in (tokens.q, tokens.k, tokens.v, tokens.lr[..., None]))
        t, gamma, beta = (x.astype(mx.float64) for x in (learner.t, learner.gamma, learner.beta))
        rows, *weights = (x.astype(mx.float64) for x in (state.rows, *state.weights))
        T, sequences = q.shape[1], []
        for b, length in enumerate(tokens.counts):
            text = [tuple(x[b, i][:, None] for x in (q, k, v, lr)) for i in range(length)]
            before = [w[b] for w in weights], rows[b], int(state.phase[b])
            of_tokens, *after = _update_sequence(text, Learner(learner.inner, t, gamma, beta), *before)
            nothing = [mx.zeros(q.shape[2:], mx.float64), *[mx.zeros(q.shape[2:3], mx.float64)] * 3]
            of_tokens += [nothing] * (T - length + 1)  # one more than T, so that there is always one
            sequences.append((*(mx.stack(list(x))[:T] for x in zip(*of_tokens, strict=True)), *after))
        y, *signals, learned, open_rows, phases = (list(x) for x in zip(*sequences, strict=True))
        weights = [mx.stack(list(w)) for w in zip(*learned, strict=True)]
        return mx.stack(y), State(tuple(weights), mx.stack(open_rows), phases), Signals(*map(mx.stack, signals))


def _inner_model(weights: list[mx.array], x: mx.array) -> tuple[mx.array, list[mx.array]]:
    """f(x), and the inputs of its linear maps, in order."""
    inputs = [x]
    z = x @ weights[0] + weights[1]
    for W, b in zip(weights[2::2], weights[3::2], strict=True):
        inputs.append(_gelu(z))
        z = inputs[-1] @ W + b
    return z, inputs


def _gelu(z: mx.array) -> mx.array:
    return 0.5 * z * (1 + mx.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _layer_norm(z: mx.array, learner: Learner) -> mx.array:
    """Of z [H, 1, D]."""
    mean = z.mean(-1, keepdims=True)
    var = ((z - mean) ** 2).mean(-1, keepdims=True)
    return learner.gamma[:, None] * (z - mean) / mx.sqrt(var + EPS) + learner.beta[:, None]


def _update_sequence(
    text: list[tuple[mx.array, ...]], learner: Learner, weights: list[mx.array], rows: mx.array, phase: int
) -> tuple[list[list[mx.array]], list[mx.array], mx.array, int]:
    """Read one sequence.

    Args:
        text: q, k, v [H, 1, D] and lr [H, 1, 1] of each token.
        weights, rows, phase: the state before them: [H, ., .] each, and [H, K, R].

    Returns:
        y [H, D], loss [H], learning rate [H] and norm of the write [H] of each token; the weights, the rows and the
        phase after them.
    """

    def losses(weights: list[mx.array], k: mx.array, v: mx.array) -> mx.array:
        """Of each head, [H]."""
        z, _ = _inner_model(weights, k)
        return 0.5 * ((_layer_norm(z, learner) - (v - k)) ** 2).sum((-2, -1))

    def loss(weights: list[mx.array], k: mx.array, v: mx.array) -> mx.array:
        return losses(weights, k, v).sum()  # over heads: each has its own weights

    K = rows.shape[1]
    gradient = _gradient_of_rows(weights, rows)  # sum over the open mini-batch of lr_j dloss_j / dweights
    of_tokens = []
    for q, k, v, lr in text:
        step = [lr * g for g in mx.grad(loss)(weights, k, v)]
        gradient = [total + g for total, g in zip(gradient, step, strict=True)]
        updated = [w - learner.t[phase] * g for w, g in zip(weights, gradient, strict=True)]
        z, _ = _inner_model(updated, q)
        write = [learner.t[K - 1] * g for g in step]  # when the mini-batch is committed
        write_norm = mx.sqrt(sum((w**2).sum((-2, -1)) for w in write))
        of_tokens.append([(q + _layer_norm(z, learner))[:, 0], losses(weights, k, v), lr[:, 0, 0], write_norm])
        rows = mx.concatenate([rows[:, :phase], _row(weights, k, step), rows[:, phase + 1 :]], axis=1)
        phase += 1
        if phase == K:
            phase, weights, rows = 0, updated, mx.zeros_like(rows)
            gradient = [mx.zeros_like(g) for g in gradient]
    return of_tokens, weights, rows, phase


def _row(weights: list[mx.array], k: mx.array, step: list[mx.array]) -> mx.array:
    """The row of one token: (k | e1) or (k | e1 | x2 | e2). e is the scaled gradient of a map's bias."""
    _, inputs = _inner_model(weights, k)
    return mx.concatenate([part for x, e in zip(inputs, step[1::2], strict=True) for part in (x, e)], axis=-1)


def _gradient_of_rows(weights: list[mx.array], rows: mx.array) -> list[mx.array]:
    """The accumulated gradient that packed rows stand for: x^T e for a matrix, the sum of e for its bias."""
    gradient, start = [], 0
    for W in weights[::2]:
        d_in, d_out = W.shape[-2:]
        x, e = rows[..., start : start + d_in], rows[..., start + d_in : start + d_in + d_out]
        gradient += [x.swapaxes(-1, -2) @ e, e.sum(-2, keepdims=True)]
        start += d_in + d_out
    return gradient
