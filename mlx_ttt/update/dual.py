"""The update rule in its dual form, in MLX operations: runs on every device and is differentiable.

Within a mini-batch all tokens take their gradient at the same weights, so the weights that token i sees are never
formed: what they would add to its output is a causal sum over the tokens before it (Sun et al. 2024, section 2.5).
With rows (x_j, e_j) the contribution of the mini-batch to x W + b is  -t_i sum_{j<=i} (x_i . x_j + 1) e_j.

All arithmetic is float32 whatever comes in. (On an M5, MLX computes float32 matrix products in TF32 unless
MLX_ENABLE_TF32=0 is set.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

EPS = 1e-6


def ttt_linear(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-Linear, f(x) = x W1 + b1. See :func:`mlx_ttt.update.ttt_linear`."""
    return _read(_linear, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def ttt_mlp(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-MLP, f(x) = gelu(x W1 + b1) W2 + b2. See :func:`mlx_ttt.update.ttt_mlp`."""
    return _read(_mlp, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def _linear(q, k, v, lr, t, gamma, beta, weights, rows):
    """Tokens of one mini-batch, [B, H, n, D], after the open `rows`. Returns the output and the new rows."""
    W1, b1 = weights
    past_k, past_e1 = _unpack(rows, weights)
    e1 = lr * _layer_norm_l2_grad(k @ W1 + b1, v - k, gamma, beta)
    z = q @ W1 + b1 - t * _causal_sum(q, k, e1, past_k, past_e1)
    return q + _layer_norm(z, gamma, beta), (k, e1)


def _mlp(q, k, v, lr, t, gamma, beta, weights, rows):
    W1, b1, W2, b2 = weights
    past_k, past_e1, past_x2, past_e2 = _unpack(rows, weights)
    z1 = k @ W1 + b1  # [B, H, n, 4D]
    x2, dx2 = _gelu_and_grad(z1)
    g2 = _layer_norm_l2_grad(x2 @ W2 + b2, v - k, gamma, beta)
    e1 = lr * (g2 @ W2.swapaxes(-1, -2)) * dx2
    e2 = lr * g2
    z1 = q @ W1 + b1 - t * _causal_sum(q, k, e1, past_k, past_e1)
    q2, _ = _gelu_and_grad(z1)
    z2 = q2 @ W2 + b2 - t * _causal_sum(q2, x2, e2, past_x2, past_e2)
    return q + _layer_norm(z2, gamma, beta), (k, e1, x2, e2)


def _causal_sum(q, k, e, past_k, past_e):
    """sum_{j<=i} (q_i . k_j + 1) e_j over the open rows, all in the past, and the new ones.  [B, H, n, ·]"""
    total = mx.tril(q @ k.swapaxes(-1, -2) + 1) @ e
    if past_k is not None:
        total = total + (q @ past_k.swapaxes(-1, -2) + 1) @ past_e  # rows not yet written have e = 0
    return total


def _commit(weights, rows, t_last):
    """The weights after a whole mini-batch: W - t_{K-1} sum_j x_j^T e_j and b - t_{K-1} sum_j e_j."""
    parts = _unpack(rows, weights)
    updated = []
    for W, b, x, e in zip(weights[::2], weights[1::2], parts[::2], parts[1::2], strict=True):
        e = t_last * e
        updated += [W - x.swapaxes(-1, -2) @ e, b - e.sum(-2, keepdims=True)]
    return tuple(updated)


def _unpack(rows, weights):
    """Rows [B, H, K, R] as (k, e1) or (k, e1, x2, e2); the weights say how wide each is."""
    widths = [d for W in weights[::2] for d in W.shape[-2:]]
    if rows is None:
        return [None] * len(widths)
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    return mx.split(rows, ends, axis=-1)


def _layer_norm(z, gamma, beta):
    return gamma * mx.fast.layer_norm(z, None, None, EPS) + beta


def _layer_norm_l2_grad(z, target, gamma, beta):
    """Gradient of ||LN(z) - target||^2 / 2 with respect to z, in closed form."""
    centred = z - z.mean(-1, keepdims=True)
    inv_std = mx.rsqrt(centred.square().mean(-1, keepdims=True) + EPS)
    z_hat = centred * inv_std
    u = (gamma * z_hat + beta - target) * gamma
    return (u - u.mean(-1, keepdims=True) - z_hat * (u * z_hat).mean(-1, keepdims=True)) * inv_std


def _gelu_and_grad(z):
    """The tanh GELU and its derivative."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    z_sq = z.square()
    tanh = mx.tanh(c * z * (1 + a * z_sq))
    half = 0.5 * (1 + tanh)
    return z * half, half + 0.5 * z * (1 - tanh.square()) * (c * (1 + 3 * a * z_sq))


class _Span(NamedTuple):
    """Tokens start … start + n of a call, which lie within one mini-batch for every live sequence."""

    start: int
    n: int
    phase: list[int]  # of each sequence at `start`
    live: list[bool]  # False where a sequence's length has been reached


def _spans(T: int, K: int, phase: Sequence[int], lengths: Sequence[int]) -> Iterator[_Span]:
    """Cut T tokens wherever a sequence completes a mini-batch or ends."""
    phase, start = list(phase), 0
    while start < T:
        live = [start < length for length in lengths]
        room = [min(K - p, length - start) for p, length, on in zip(phase, lengths, live, strict=True) if on]
        n = min(room, default=T - start)
        yield _Span(start, n, list(phase), live)
        phase = [(p + n) % K if on else p for p, on in zip(phase, live, strict=True)]
        start += n


def _read(mini_batch, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths):
    B, T, _, _ = q.shape
    K, dtype = rows.shape[2], q.dtype
    q, k, v = (x.astype(mx.float32).swapaxes(1, 2) for x in (q, k, v))  # [B, H, T, D]
    lr = lr.astype(mx.float32).swapaxes(1, 2)[..., None]  # [B, H, T, 1]
    gamma, beta = gamma[:, None], beta[:, None]  # [H, 1, D]
    lengths = [T] * B if lengths is None else [min(n, T) for n in lengths]

    outputs = []
    for span in _spans(T, K, phase, lengths):
        if not any(span.live):
            outputs.append(q[:, :, span.start :])
            break
        tokens = (x[:, :, span.start : span.start + span.n] for x in (q, k, v, lr))
        slots = _slots(span)
        past = rows if any(span.phase) else None
        y, new = mini_batch(*tokens, t[slots][..., None], gamma, beta, weights, past)
        outputs.append(y)

        appended = _append(rows, mx.concatenate(new, axis=-1), slots)
        rows = _where(span.live, appended, rows)
        complete = [on and p + span.n == K for p, on in zip(span.phase, span.live, strict=True)]
        if any(complete):
            committed = _commit(weights, rows, t[K - 1])
            weights = tuple(_where(complete, new, old) for new, old in zip(committed, weights, strict=True))
            rows = _where(complete, mx.zeros_like(rows), rows)

    y = mx.concatenate(outputs, axis=2) if outputs else q
    return y.swapaxes(1, 2).astype(dtype), weights, rows


def _slots(span: _Span) -> slice | mx.array:
    """Where in the mini-batch the tokens of a span stand: one slice for all sequences, or indices [B, 1, n]."""
    if len(set(span.phase)) == 1:
        return slice(span.phase[0], span.phase[0] + span.n)
    start = mx.array([p if on else 0 for p, on in zip(span.phase, span.live, strict=True)])
    return start[:, None, None] + mx.arange(span.n)


def _append(rows, new, slots):
    """Rows with `new` [B, H, n, R] written at `slots`."""
    if new.shape == rows.shape:
        return new
    if isinstance(slots, slice):
        return mx.slice_update(rows, new, mx.array(slots.start), (2,))
    return mx.put_along_axis(rows, mx.broadcast_to(slots[..., None], new.shape), new, axis=2)


def _where(mask: list[bool], new, old):
    """`new` for the sequences in the mask, `old` for the others."""
    if all(mask):
        return new
    return mx.where(mx.array(mask)[:, None, None, None], new, old)
