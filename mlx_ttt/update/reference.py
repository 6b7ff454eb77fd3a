"""The update rule by its definition: the primal form, token by token, in float64.

The inner model f is trained on every token it reads. Its loss on a token is the squared error of reconstructing
v - k from k, through a LayerNorm (Sun et al. 2024, arXiv 2407.04620, section 2); its gradients come from automatic
differentiation, never from a formula. Everything else in this package is tested against this page, and nothing
but tests should call it: it is slow, and runs on the CPU only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx

EPS = 1e-6


def ttt_linear(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-Linear, f(x) = x W1 + b1. The signature is that of :func:`mlx_ttt.update.ttt_linear`; float64 comes back."""
    return _read(_linear, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def ttt_mlp(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-MLP, f(x) = gelu(x W1 + b1) W2 + b2. The signature is that of :func:`mlx_ttt.update.ttt_mlp`."""
    return _read(_mlp, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


# An inner model maps (weights, x) to its output and the inputs of its linear maps, in order.
InnerModel = Callable[[list[mx.array], mx.array], tuple[mx.array, list[mx.array]]]


def _linear(weights, x):
    W1, b1 = weights
    return x @ W1 + b1, [x]


def _mlp(weights, x):
    W1, b1, W2, b2 = weights
    x2 = _gelu(x @ W1 + b1)
    return x2 @ W2 + b2, [x, x2]


def _gelu(z):
    return 0.5 * z * (1 + mx.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _layer_norm(z, gamma, beta):
    mean = z.mean(-1, keepdims=True)
    var = ((z - mean) ** 2).mean(-1, keepdims=True)
    return gamma * (z - mean) / mx.sqrt(var + EPS) + beta


def _read(f: InnerModel, q, k, v, lr, t, gamma, beta, weights, rows, phase: Sequence[int], lengths):
    B, T, _, _ = q.shape
    lengths = [T] * B if lengths is None else lengths
    with mx.stream(mx.cpu):
        inputs = [x.astype(mx.float64) for x in (q, k, v, lr)]
        t, gamma, beta, rows, *weights = (x.astype(mx.float64) for x in (t, gamma, beta, rows, *weights))
        gamma, beta = gamma[:, None], beta[:, None]  # [H, 1, D]
        sequences = []
        for b in range(B):
            tokens = [[x[b, i][:, None] for x in inputs[:3]] + [inputs[3][b, i][:, None, None]] for i in range(T)]
            sequences.append(
                _read_sequence(f, tokens, t, gamma, beta, [w[b] for w in weights], rows[b], phase[b], lengths[b])
            )
        y, weights, rows = zip(*sequences, strict=True)
        return mx.stack(y), tuple(mx.stack(w) for w in zip(*weights, strict=True)), mx.stack(rows)


def _read_sequence(f, tokens, t, gamma, beta, weights, rows, phase, length):
    """Read one sequence. tokens: a list of (q [H, 1, D], k, v, lr [H, 1, 1]); returns y [T, H, D], weights, rows."""

    def loss(weights, k, v):
        z, _ = f(weights, k)
        return 0.5 * ((_layer_norm(z, gamma, beta) - (v - k)) ** 2).sum()  # a sum over heads: each has its own weights

    K = rows.shape[1]
    gradient = _gradient_of_rows(f, weights, rows)  # sum over the open mini-batch of lr_j dloss_j/dweights
    y = []
    for i, (q, k, v, lr) in enumerate(tokens):
        if i >= length:
            y.append(mx.zeros_like(q[:, 0]))
            continue
        step = [lr * g for g in mx.grad(loss)(weights, k, v)]
        gradient = [total + g for total, g in zip(gradient, step, strict=True)]
        updated = [w - t[phase] * g for w, g in zip(weights, gradient, strict=True)]
        z, _ = f(updated, q)
        y.append((q + _layer_norm(z, gamma, beta))[:, 0])
        rows = mx.concatenate([rows[:, :phase], _pack(f, weights, k, step), rows[:, phase + 1 :]], axis=1)
        phase += 1
        if phase == K:
            phase, weights, rows = 0, updated, mx.zeros_like(rows)
            gradient = [mx.zeros_like(g) for g in gradient]
    return mx.stack(y) if y else mx.zeros((0, rows.shape[0], gamma.shape[-1])), weights, rows


def _pack(f, weights, k, step):
    """The row of one token: (k | e1) or (k | e1 | x2 | e2). The gradient of a bias is that of the map's output."""
    _, xs = f(weights, k)
    return mx.concatenate([part for x, e in zip(xs, step[1::2], strict=True) for part in (x, e)], axis=-1)


def _gradient_of_rows(f, weights, rows):
    """The accumulated gradient that packed rows stand for: x^T e for a matrix, the sum of e for its bias."""
    gradient, start = [], 0
    for W in weights[::2]:
        d_in, d_out = W.shape[-2:]
        x, e = rows[..., start : start + d_in], rows[..., start + d_in : start + d_in + d_out]
        gradient += [x.swapaxes(-1, -2) @ e, e.sum(-2, keepdims=True)]
        start += d_in + d_out
    return gradient
