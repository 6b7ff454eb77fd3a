"""The update rule's backward in NumPy, float64: the formulas that C computes, for one head of one sequence at a time.

Names are those of the dual form. A mini-batch's rows (x_l, e_l) of map l come in two parts: those that were there when
the call began, which are inputs, and those that its n tokens make. A d in front of a name is its cotangent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ...network.cases import Case

EPS = 1e-6
SLOPE, CUBIC = math.sqrt(2 / math.pi), 0.044715


def rule_backward(case: Case, dy: mx.array, dstate: Sequence[mx.array]) -> list[np.ndarray]:
    """The cotangents of `case.arrays`, given those of y and of (rows, *weights) after the tokens."""
    q, k, v, lr, t, gamma, beta, rows, *weights = (_float64(x) for x in case.arrays)
    dy, drows, *dweights = (_float64(x) for x in (dy, *dstate))
    dq, dk, dv, dlr, dt, dgamma, dbeta = (np.zeros_like(x) for x in (q, k, v, lr, t, gamma, beta))
    for b, (phase, length) in enumerate(zip(case.state.phase, case.tokens.counts, strict=True)):
        for h in range(q.shape[2] if length else 0):
            at = (b, slice(length), h)
            head = _Head(case.learner.inner.widths, t, gamma[h], beta[h])
            d = head.backward(
                _Tokens(q[at], k[at], v[at], lr[at], dy[at]),
                [w[b, h] for w in weights],
                rows[b, h],
                phase,
                ([w[b, h] for w in dweights], drows[b, h]),
            )
            dq[at], dk[at], dv[at], dlr[at] = d.q, d.k, d.v, d.lr
            dt, dgamma[h], dbeta[h] = dt + head.dt, dgamma[h] + head.dgamma, dbeta[h] + head.dbeta
    return [dq, dk, dv, dlr, dt, dgamma, dbeta, drows, *dweights]


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float64, stream=mx.cpu))


class _Tokens(NamedTuple):
    """Of one head: what its tokens bring, and the cotangents of their y."""

    q: np.ndarray  # [n, D]
    k: np.ndarray
    v: np.ndarray
    lr: np.ndarray  # [n]
    dy: np.ndarray  # [n, D]

    def part(self, start: int, stop: int) -> _Tokens:
        return _Tokens(*(x[start:stop] for x in self))


class _Cotangents(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    lr: np.ndarray


class _Learned(NamedTuple):
    """A mini-batch with what its tokens make at the weights that it starts with."""

    weights: list[np.ndarray]  # W_1, b_1, ...
    tokens: _Tokens
    p: int  # rows that were there
    x: list[np.ndarray]  # [p + n, .]
    e: list[np.ndarray]
    z: list[np.ndarray]  # of the new rows [n, .]
    back: list[np.ndarray]  # e_{l+1} W_{l+1}^T of the new rows, for all maps but the last
    z_hat: np.ndarray
    sigma: np.ndarray


class _Head:
    def __init__(self, widths: Sequence[int], t: np.ndarray, gamma: np.ndarray, beta: np.ndarray):
        self.widths, self.t, self.gamma, self.beta = widths, t, gamma, beta
        self.dt, self.dgamma, self.dbeta = np.zeros_like(t), np.zeros_like(gamma), np.zeros_like(beta)

    def backward(self, tokens, weights, rows, phase, cotangents) -> _Cotangents:
        """The cotangents of the tokens; those of the weights and rows are written in the place of the later ones."""
        dweights, drows = cotangents
        K, T = len(self.t), len(tokens.q)
        starts = [0, *range(K - phase, T, K)]
        learned = []
        for start, stop in zip(starts, [*starts[1:], T], strict=True):
            p = phase if start == 0 else 0
            learned.append(self._learn(tokens.part(start, stop), weights, rows, p))
            x, e = learned[-1].x, learned[-1].e
            if len(x[0]) == K:
                change = [g for x, e in zip(x, e, strict=True) for g in (x.T @ e, e.sum(0, keepdims=True))]
                weights = [w - self.t[-1] * g for w, g in zip(weights, change, strict=True)]
        after = self._parts(drows.copy())
        # Slots that the tokens filled were overwritten; all are, if a mini-batch was completed.
        drows[phase : phase + T if phase + T < K else K] = 0
        made = []
        for mini_batch in reversed(learned):
            m = len(mini_batch.x[0])
            d, dpast = self._backward(mini_batch, dweights, None if m == K else [part[:m] for part in after])
            made.insert(0, d)
        drows[:phase] = dpast
        return _Cotangents(*(np.concatenate(x) for x in zip(*made, strict=True)))

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """x_1, e_1, x_2, e_2, ... of packed rows."""
        D = len(self.gamma)
        widths = [w * D for pair in zip(self.widths[:-1], self.widths[1:], strict=True) for w in pair]
        return np.split(rows, np.cumsum(widths)[:-1], axis=-1)

    def _learn(self, tokens: _Tokens, weights: list[np.ndarray], rows: np.ndarray, p: int) -> _Learned:
        Ws, bs, past = weights[::2], weights[1::2], self._parts(rows[:p])
        x, z = [tokens.k], [tokens.k @ Ws[0] + bs[0]]
        for W, b in zip(Ws[1:], bs[1:], strict=True):
            x.append(_gelu(z[-1])[0])
            z.append(x[-1] @ W + b)
        z_hat, sigma = _normalized(z[-1])
        u = (self.gamma * z_hat + self.beta - (tokens.v - tokens.k)) * self.gamma
        e = [tokens.lr[:, None] * (u - _mean(u) - z_hat * _mean(u * z_hat)) / sigma]
        back = []
        for W, z_l in zip(Ws[:0:-1], z[-2::-1], strict=True):
            back.insert(0, e[0] @ W.T)
            e.insert(0, back[0] * _gelu(z_l)[1])
        x = [np.concatenate([old, new]) for old, new in zip(past[::2], x, strict=True)]
        e = [np.concatenate([old, new]) for old, new in zip(past[1::2], e, strict=True)]
        return _Learned(weights, tokens, p, x, e, z, back, z_hat, sigma)

    def _backward(
        self, learned: _Learned, dweights: list[np.ndarray], drows: list[np.ndarray] | None
    ) -> tuple[_Cotangents, np.ndarray]:
        """Cotangents of the tokens and of the rows that were there. drows: of all its rows, if it stays open."""
        Ws, bs, q, dy = learned.weights[::2], learned.weights[1::2], learned.tokens.q, learned.tokens.dy
        L, p, m, n = len(Ws), learned.p, len(learned.x[0]), len(q)
        t, gamma = self.t[p:m, None], self.gamma
        triangle = np.tri(n, m, p)

        x_bar, z_bar, scores = [q], [], []
        for i in range(L):
            scores.append(triangle * (x_bar[i] @ learned.x[i].T + 1))
            z_bar.append(x_bar[i] @ Ws[i] + bs[i] - t * (scores[i] @ learned.e[i]))
            x_bar.append(_gelu(z_bar[i])[0])
        z_hat, sigma = _normalized(z_bar[-1])
        self.dgamma += (dy * z_hat).sum(0)
        self.dbeta += dy.sum(0)
        dz_bar = _normalized_backward(gamma * dy, z_hat, sigma)

        # What was read with the learned weights, and what they commit.
        dx, de = [np.zeros_like(x) for x in learned.x], [np.zeros_like(e) for e in learned.e]
        if drows is not None:
            dx, de = [x.copy() for x in drows[::2]], [e.copy() for e in drows[1::2]]
        for i in reversed(range(L)):
            x, e, dW, db = learned.x[i], learned.e[i], dweights[2 * i], dweights[2 * i + 1]
            if drows is None:
                committed = x @ dW + db
                de[i] -= self.t[-1] * committed
                dx[i] -= self.t[-1] * (e @ dW.T)
                self.dt[-1] -= (e * committed).sum()
            products = triangle * (dz_bar @ e.T)
            self.dt[p:m] -= (scores[i] * products).sum(1)
            de[i] -= scores[i].T @ (t * dz_bar)
            dx_bar = dz_bar @ Ws[i].T - (t * products) @ x
            dx[i] -= (t * products).T @ x_bar[i]
            dW += x_bar[i].T @ dz_bar
            db += dz_bar.sum(0)
            if i:
                dz_bar = dx_bar * _gelu(z_bar[i - 1])[1]
        dpast = np.concatenate([part[:p] for pair in zip(dx, de, strict=True) for part in pair], axis=-1)
        dx, de = [x[p:] for x in dx], [e[p:] for e in de]

        # How the errors were made: e_l = (e_{i+1} W_{i+1}^T) gelu'(z_l), the last from the loss.
        dz = []
        for i in range(L - 1):
            _, slope, bend = _gelu(learned.z[i])
            h = de[i] * slope
            dz.append(de[i] * learned.back[i] * bend)
            de[i + 1] = de[i + 1] + h @ Ws[i + 1]
            dweights[2 * i + 2] += h.T @ learned.e[i + 1][p:]
        dz_last, dlr, dv = self._error_backward(learned, de[-1])
        dz.append(dz_last)

        # How the keys went forward.
        for i in reversed(range(L)):
            dx[i] = dx[i] + dz[i] @ Ws[i].T
            dweights[2 * i] += learned.x[i][p:].T @ dz[i]
            dweights[2 * i + 1] += dz[i].sum(0)
            if i:
                dz[i - 1] += dx[i] * _gelu(learned.z[i - 1])[1]
        return _Cotangents(dx_bar + dy, dx[0] - dv, dv, dlr), dpast

    def _error_backward(self, learned: _Learned, de: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cotangents of z, lr and v, given those of e = lr g, g = (u - mean u - z_hat mean(u z_hat)) / sigma."""
        (_, k, v, lr, _), z_hat, sigma = learned.tokens, learned.z_hat, learned.sigma
        residual = self.gamma * z_hat + self.beta - (v - k)
        u = residual * self.gamma
        m = _mean(u * z_hat)
        g = (u - _mean(u) - z_hat * m) / sigma
        dg = lr[:, None] * de
        s = _mean(dg / sigma * z_hat)
        du = dg / sigma - _mean(dg / sigma) - z_hat * s
        dz_hat = -dg / sigma * m - s * u + self.gamma**2 * du
        self.dgamma += (du * (residual + self.gamma * z_hat)).sum(0)
        self.dbeta += (du * self.gamma).sum(0)
        dsigma = -(g * dg).sum(-1, keepdims=True) / sigma
        dz = _normalized_backward(dz_hat, z_hat, sigma) + dsigma * z_hat / len(self.gamma)
        return dz, (g * de).sum(-1), -du * self.gamma


def _mean(x: np.ndarray) -> np.ndarray:
    return x.mean(-1, keepdims=True)


def _normalized(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sigma = np.sqrt(_mean((z - _mean(z)) ** 2) + EPS)
    return (z - _mean(z)) / sigma, sigma


def _normalized_backward(dz_hat: np.ndarray, z_hat: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    return (dz_hat - _mean(dz_hat) - z_hat * _mean(dz_hat * z_hat)) / sigma


def _gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """gelu(x), its derivative and its second derivative."""
    h, ds, dds = np.tanh(SLOPE * (x + CUBIC * x**3)), SLOPE * (1 + 3 * CUBIC * x**2), SLOPE * 6 * CUBIC * x
    slope = 0.5 * (1 + h) + 0.5 * x * (1 - h**2) * ds
    bend = (1 - h**2) * (ds + 0.5 * x * (dds - 2 * h * ds**2))
    return 0.5 * x * (1 + h), slope, bend
