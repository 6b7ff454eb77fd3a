"""The update rule in its dual form, in MLX operations: runs on every device and is differentiable.

Within a mini-batch all tokens take their gradient at the same weights, so the weights that token i sees are never
formed: what they would add to its output is a causal sum over the tokens before it (Sun et al. 2024, section 2.5).
With rows (x_j, e_j) the contribution of the mini-batch to x W + b is  -t_i sum_{j<=i} (x_i . x_j + 1) e_j.

All arithmetic is float32 whatever comes in. (On an M5, MLX computes float32 matrix products in TF32 unless
MLX_ENABLE_TF32=0 is set.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..activations import gelu, gelu_and_grad

EPS = 1e-6


def ttt_linear(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-Linear, f(x) = x W1 + b1. See :func:`mlx_ttt.update.ttt_linear`."""
    return _read(_linear, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def ttt_mlp(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-MLP, f(x) = gelu(x W1 + b1) W2 + b2. See :func:`mlx_ttt.update.ttt_mlp`."""
    return _read(_mlp, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def ttt_linear_step(q, k, v, lr, t, gamma, beta, weights, rows, phase):
    """See :func:`mlx_ttt.update.ttt_linear_step`."""
    return _step(_linear, q, k, v, lr, t, gamma, beta, weights, rows, phase)


def ttt_mlp_step(q, k, v, lr, t, gamma, beta, weights, rows, phase):
    """See :func:`mlx_ttt.update.ttt_mlp_step`."""
    return _step(_mlp, q, k, v, lr, t, gamma, beta, weights, rows, phase)


class _Run(NamedTuple):
    """`count` stretches of n tokens from `start`, each within one mini-batch for every live sequence."""

    start: int
    count: int
    n: int
    phase: list[int] | mx.array  # of each sequence at `start`; an array, [B], in the step form
    live: list[bool]  # False where a sequence's length has been reached

    @property
    def stop(self) -> int:
        return self.start + self.count * self.n

    def split(self, x: mx.array) -> mx.array:
        """The tokens of the run, from [B, H, T, D] to [B, H, N, n, D]."""
        B, H, _, D = x.shape
        return x[:, :, self.start : self.stop].reshape(B, H, self.count, self.n, D)

    @property
    def slots(self) -> slice | mx.array:
        """Where in the mini-batch the tokens stand: one slice for all sequences, or indices [B, n]."""
        if isinstance(self.phase, mx.array):
            return self.phase[:, None]
        if len(set(self.phase)) == 1:
            return slice(self.phase[0], self.phase[0] + self.n)
        start = mx.array([p if on else 0 for p, on in zip(self.phase, self.live, strict=True)])
        return start[:, None] + mx.arange(self.n)

    def complete(self, K: int) -> list[bool]:
        """Which sequences complete a mini-batch."""
        if isinstance(self.phase, mx.array):
            return [False] * len(self.live)
        return [on and p + self.n == K for p, on in zip(self.phase, self.live, strict=True)]


def _runs(K: int, phase: Sequence[int] | mx.array, lengths: Sequence[int]) -> Iterator[_Run]:
    """Cut the tokens that count wherever a sequence completes a mini-batch or ends; whole mini-batches are one run."""
    if isinstance(phase, mx.array):
        yield _Run(0, 1, 1, phase, [True] * len(lengths))
        return
    phase, start = list(phase), 0
    while start < max(lengths):
        live = [start < length for length in lengths]
        left = [length - start for length in lengths if start < length]
        room = [K - p for p, on in zip(phase, live, strict=True) if on]
        n = min([*left, *room])
        count = min(left) // K if n == K else 1
        run = _Run(start, count, n, list(phase), live)
        yield run
        phase = [(p + n * count) % K if on else p for p, on in zip(phase, live, strict=True)]
        start = run.stop


class _Tokens(NamedTuple):
    """n tokens of one mini-batch, and all that can be said of them before the weights are known."""

    kq: mx.array  # keys, then queries  [B, H, 2n, D]
    lr: mx.array  # [B, H, n, 1]
    bias: mx.array  # gamma (beta - (v - k))  [B, H, n, D]
    gamma_sq: mx.array  # [H, 1, D]
    causal: mx.array  # t_i where row j is at or before token i, else 0  [n, K] or [B, 1, n, K]
    run: _Run


def _linear(tokens, weights, rows):
    """Returns z [B, H, n, D]; the mini-batch's rows with those of the tokens, (k, e1); and the same packed."""
    W1, b1 = weights
    k, q = _halves(tokens.kq)
    z_k, z_q = _halves(mx.addmm(b1, tokens.kq, W1))
    e1 = _error(z_k, tokens)
    (k, e1), rows = _append(rows, (k, e1), tokens.run)
    return _learned(z_q, q, k, e1, tokens), (k, e1), rows


def _mlp(tokens, weights, rows):
    W1, b1, W2, b2 = weights
    k, q = _halves(tokens.kq)
    z1_k, z1_q = _halves(mx.addmm(b1, tokens.kq, W1))  # [B, H, n, 4D]
    x2, dx2 = gelu_and_grad(z1_k)
    e2 = _error(mx.addmm(b2, x2, W2), tokens)
    e1 = (e2 @ W2.swapaxes(-1, -2)) * dx2
    (k, e1, x2, e2), rows = _append(rows, (k, e1, x2, e2), tokens.run)
    q2 = gelu(_learned(z1_q, q, k, e1, tokens))
    z2 = _learned(mx.addmm(b2, q2, W2), q2, x2, e2, tokens)
    return z2, (k, e1, x2, e2), rows


def _halves(x):
    n = x.shape[-2] // 2
    return x[..., :n, :], x[..., n:, :]


def _learned(z, x, past_x, past_e, tokens):
    """z = x W + b with what W and b have learned from the rows: z_i - t_i sum_{j<=i} (x_i . x_j + 1) e_j."""
    return mx.addmm(z, tokens.causal * (x @ past_x.swapaxes(-1, -2) + 1), past_e, alpha=-1)


def _error(z, tokens):
    """lr times the gradient of ||LN(z) - (v - k)||^2 / 2 with respect to z, in closed form."""
    centred = z - z.mean(-1, keepdims=True)
    inv_std = mx.rsqrt(centred.square().mean(-1, keepdims=True) + EPS)
    z_hat = centred * inv_std
    u = tokens.gamma_sq * z_hat + tokens.bias  # gamma (LN(z) - (v - k))
    g = u - u.mean(-1, keepdims=True) - z_hat * (u * z_hat).mean(-1, keepdims=True)
    return g * (inv_std * tokens.lr)


def _append(rows, new, run):
    """The open mini-batch's packed rows with `new` at the slots of a run: in parts [B, H, K, ·], and packed."""
    n, K = new[0].shape[2], rows.shape[2]
    if n == K:
        return new, rows  # which will be cleared
    packed = mx.concatenate(new, axis=-1)
    if isinstance(run.slots, slice):
        packed = mx.slice_update(rows, packed, mx.array(run.phase[0]), (2,))
    else:
        packed = mx.put_along_axis(rows, mx.broadcast_to(run.slots[:, None, :, None], packed.shape), packed, axis=2)
    packed = _where(run.live, packed, rows)
    widths = [x.shape[-1] for x in new]
    return mx.split(packed, [sum(widths[:i]) for i in range(1, len(widths))], axis=-1), packed


def _commit(weights, rows, t_last):
    """The weights after a whole mini-batch: W - t_{K-1} sum_j x_j^T e_j and b - t_{K-1} sum_j e_j."""
    updated = []
    for W, b, x, e in zip(weights[::2], weights[1::2], rows[::2], rows[1::2], strict=True):
        e = t_last * e
        updated += [mx.addmm(W, x.swapaxes(-1, -2), e, alpha=-1), b - e.sum(-2, keepdims=True)]
    return tuple(updated)


def _read(rule, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths):
    B, T, _, _ = q.shape
    K, dtype = rows.shape[2], q.dtype
    q, k, v, lr = (x.astype(mx.float32).swapaxes(1, 2) for x in (q, k, v, lr[..., None]))  # [B, H, T, ·]
    gamma, beta = gamma[:, None], beta[:, None]  # [H, 1, D]
    gamma_sq, bias = gamma.square(), gamma * (beta - (v - k))
    causal = t[:, None] * _triangle(K)  # t_i where j <= i, else 0

    lengths = [T] * B if lengths is None else lengths
    outputs = []
    for run in _runs(K, phase, lengths):
        kq = mx.concatenate([run.split(k), run.split(q)], axis=-2)  # [B, H, N, 2n, D]
        seen = causal[run.slots] if isinstance(run.slots, slice) else causal[run.slots][:, None]
        complete = run.complete(K)
        for i in range(run.count):
            place = slice(run.start + i * run.n, run.start + (i + 1) * run.n)
            tokens = _Tokens(kq[:, :, i], lr[:, :, place], bias[:, :, place], gamma_sq, seen, run)
            z, parts, rows = rule(tokens, weights, rows)
            outputs.append(z)
            if any(complete):
                committed = _commit(weights, parts, t[K - 1])
                weights = tuple(_where(complete, new, old) for new, old in zip(committed, weights, strict=True))
                rows = _where(complete, mx.zeros_like(rows), rows)

    if max(lengths) < T or not outputs:
        outputs.append(mx.zeros_like(q[:, :, max(lengths) :]))
    z = mx.concatenate(outputs, axis=2)
    y = q + gamma * mx.fast.layer_norm(z, None, None, EPS) + beta
    return y.swapaxes(1, 2).astype(dtype), weights, rows


def _step(rule, q, k, v, lr, t, gamma, beta, weights, rows, phase):
    y, _, rows = _read(rule, q, k, v, lr, t, gamma, beta, weights, rows, phase, None)
    return y, mx.take_along_axis(rows, _row_index(rows[:, :, :1], phase), axis=2)


def append_row(rows: mx.array, row: mx.array, phase: Sequence[int] | mx.array) -> mx.array:
    """Rows [B, H, K, R] with `row` [B, H, 1, R] at each sequence's phase.

    MLX does it in place if nobody else holds the rows when it comes to it. The kernel that read them does until it has
    run, so it is well that evaluating y leaves this for the next token.
    """
    if isinstance(phase, mx.array) or len(set(phase)) > 1:
        return mx.put_along_axis(rows, _row_index(row, phase), row, axis=2)
    rows = rows[...]  # an array of our own, to assign to
    rows[:, :, phase[0] : phase[0] + 1] = row
    return rows


def _row_index(row: mx.array, phase: Sequence[int] | mx.array) -> mx.array:
    """Each sequence's phase at every place of `row`, [B, H, 1, R]."""
    return mx.broadcast_to(mx.array(phase)[:, None, None, None], row.shape)


@functools.cache
def _triangle(K: int) -> mx.array:
    """1 where j <= i, else 0, [K, K]."""
    return mx.array(np.tri(K), mx.float32)


def _where(mask: list[bool], new, old):
    """`new` for the sequences in the mask, `old` for the others."""
    if all(mask):
        return new
    return mx.where(mx.array(mask)[:, None, None, None], new, old)
