"""The update rule in its dual form, in MLX operations: it runs on every device and is differentiable.

Within a mini-batch all tokens take their gradient at the same weights. So the weights that token i sees are never
formed: what they would add to its output is a causal sum over the tokens before it (Sun et al. 2024, section 2.5).
With rows (x_j, e_j) the mini-batch adds to x W + b

    -t_i sum_{j <= i} (x_i . x_j + 1) e_j.

All arithmetic is float32, whatever comes in. (On an M5, MLX computes float32 matrix products in TF32 unless
MLX_ENABLE_TF32=0 is set.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .backend import replaceable
from .operations import gelu, gelu_and_grad
from .rule import Learner, Signals, State, Tokens, check

EPS = 1e-6  # of the LayerNorm behind the inner model


def update(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State]:
    """Read T tokens from any phase of the open mini-batch.

    Returns:
        y = q + LN(f(q)), [B, T, H, D] in the dtype of q, where f is the inner model as each token sees it (of no
        meaning for tokens that do not count); and the state after the tokens.

    Raises:
        ValueError: an argument has the wrong shape or dtype, or a phase or length is out of range.
    """
    check(tokens, learner, state)
    return dual_form(tokens, learner, state)


def observe(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State, Signals]:
    """The same y and state as `update` bit for bit, and what the learner does with each token.

    Raises:
        ValueError: as `update`.
    """
    check(tokens, learner, state)
    return observed_dual_form(tokens, learner, state)


@replaceable
def dual_form(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State]:
    """`update`, of arguments that are checked already."""
    y, state, _ = _read(tokens, learner, state)
    return y, state


@replaceable
def observed_dual_form(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State, Signals]:
    """`observe`, of arguments that are checked already."""
    y, state, traces = _read(tokens, learner, state)
    return y, state, _signals(tokens, learner, traces)


def _read(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State, list[_Trace]]:
    """y, the state after the tokens, and what each mini-batch leaves of its training."""
    K, dtype = learner.mini_batch_size, tokens.q.dtype
    arrays = (tokens.q, tokens.k, tokens.v, tokens.lr[..., None])
    q, k, v, lr = (x.astype(mx.float32).swapaxes(1, 2) for x in arrays)  # [B, H, T, .]
    gamma, beta = learner.gamma[:, None], learner.beta[:, None]  # [H, 1, D]
    gamma_sq, bias = gamma.square(), gamma * (beta - (v - k))
    causal = learner.t[:, None] * _triangle(K)  # [K, K]
    weights, rows, phase = state.weights, state.rows, state.phase

    outputs, traces = [], []
    runs = list(_runs(K, phase, tokens.counts))
    for run, *views in zip(runs, *(_by_run(x, runs) for x in (k, q, lr, bias)), strict=True):
        seen = causal[run.slots] if isinstance(run.slots, slice) else causal[run.slots][:, None]
        complete = run.complete(K)
        k_run, q_run, lr_run, bias_run = (run.split(x) for x in views)
        kq_run = mx.concatenate([k_run, q_run], axis=-2)  # [B, H, N, 2n, D]
        for kq, rate, shift in zip(*(_by_mini_batch(x) for x in (kq_run, lr_run, bias_run)), strict=True):
            z, parts, rows, trace = _learn(_MiniBatch(kq, rate, shift, gamma_sq, seen, run), weights, rows)
            outputs.append(z)
            traces.append(trace)
            if any(complete):
                committed = commit(weights, parts, learner.t[K - 1])
                weights = tuple(_where(complete, new, old) for new, old in zip(committed, weights, strict=True))
                rows = _where(complete, mx.zeros_like(rows), rows)

    longest = max(tokens.counts)
    if longest < q.shape[2] or not outputs:
        outputs.append(mx.zeros_like(q[:, :, longest:]))
    z = mx.concatenate(outputs, axis=2)
    y = q + gamma * mx.fast.layer_norm(z, None, None, EPS) + beta
    return y.swapaxes(1, 2).astype(dtype), State(weights, rows, next_phase(phase, tokens.counts, K)), traces


def next_phase(phase: Sequence[int] | mx.array, counts: Sequence[int], K: int) -> list[int] | mx.array:
    """The phase after so many tokens of each sequence."""
    if isinstance(phase, mx.array):
        return phase + 1
    return [(p + n) % K for p, n in zip(phase, counts, strict=True)]


# ---- Which tokens go together ----------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """`repeats` stretches of n tokens from `start`, each within one mini-batch for every live sequence."""

    start: int
    repeats: int
    n: int
    phase: list[int] | mx.array  # of each sequence at `start`
    live: list[bool]  # False where a sequence's length has been reached

    @property
    def stop(self) -> int:
        return self.start + self.repeats * self.n

    def split(self, x: mx.array) -> mx.array:
        """The tokens of the run, from [B, H, N n, D] to [B, H, N, n, D]."""
        B, H, _, D = x.shape
        return x.reshape(B, H, self.repeats, self.n, D)

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
    """Cut the tokens that count wherever a sequence completes a mini-batch or ends. Whole mini-batches are one run."""
    if isinstance(phase, mx.array):
        yield _Run(0, 1, 1, phase, [True] * len(lengths))
        return
    phase, start = list(phase), 0
    while start < max(lengths):
        live = [start < length for length in lengths]
        left = [length - start for length in lengths if start < length]
        room = [K - p for p, on in zip(phase, live, strict=True) if on]
        n = min([*left, *room])
        repeats = min(left) // K if n == K else 1
        run = _Run(start, repeats, n, list(phase), live)
        yield run
        phase = [(p + n * repeats) % K if on else p for p, on in zip(phase, live, strict=True)]
        start = run.stop


def _by_run(x: mx.array, runs: list[_Run]) -> list[mx.array]:
    """The tokens of each run, out of x [B, H, T, D].

    A split, since the gradient of a slice is an array as large as x: with a slice for each mini-batch, the time of the
    gradient would grow with the square of T.
    """
    return list(mx.split(x, [run.stop for run in runs], axis=2))[: len(runs)]


def _by_mini_batch(x: mx.array) -> list[mx.array]:
    """[B, H, N, n, D] as N arrays [B, H, n, D]."""
    return [part.squeeze(2) for part in mx.split(x, x.shape[2], axis=2)]


# ---- One mini-batch --------------------------------------------------------------------------------------------------


class _MiniBatch(NamedTuple):
    """n tokens of one mini-batch, and all that is known of them before the weights are."""

    kq: mx.array  # keys, then queries  [B, H, 2n, D]
    lr: mx.array  # [B, H, n, 1]
    bias: mx.array  # gamma (beta - (v - k))  [B, H, n, D]
    gamma_sq: mx.array  # [H, 1, D]
    causal: mx.array  # -t_i where row j is at or before token i, else 0  [n, K] or [B, 1, n, K]
    run: _Run


class _Trace(NamedTuple):
    """What n tokens of a mini-batch leave of the training on them."""

    z: mx.array  # f(k)  [B, H, n, D]
    rows: list[mx.array]  # (k, e1[, x2, e2]), [B, H, n, .] each


def _learn(
    tokens: _MiniBatch, weights: tuple[mx.array, ...], rows: mx.array
) -> tuple[mx.array, list[mx.array], mx.array, _Trace]:
    """Train the inner model on the keys, and apply it to the queries.

    Returns:
        z [B, H, n, D]; the mini-batch's rows with those of the tokens in parts (k, e1[, x2, e2]), [B, H, K, .] each;
        the same packed, [B, H, K, R]; and what the tokens leave.
    """
    maps = list(zip(weights[::2], weights[1::2], strict=True))
    W1, b1 = maps[0]
    k, q = _halves(tokens.kq)
    z_k, z_q = _halves(mx.addmm(b1, tokens.kq, W1))

    inputs, slopes = [k], []
    for W, b in maps[1:]:
        x, slope = gelu_and_grad(z_k)
        z_k = mx.addmm(b, x, W)
        inputs.append(x)
        slopes.append(slope)
    errors = [_error(z_k, tokens)]
    for (W, _), slope in zip(maps[:0:-1], reversed(slopes), strict=True):
        errors.insert(0, (errors[0] @ W.swapaxes(-1, -2)) * slope)

    new = [part for pair in zip(inputs, errors, strict=True) for part in pair]
    parts, rows = _append(rows, new, tokens.run)
    z = _learned(z_q, q, parts[:2], tokens)
    for i, (W, b) in enumerate(maps[1:], 1):
        x = gelu(z)
        z = _learned(mx.addmm(b, x, W), x, parts[2 * i : 2 * i + 2], tokens)
    return z, parts, rows, _Trace(z_k, new)


def _halves(x: mx.array) -> tuple[mx.array, mx.array]:
    n = x.shape[-2] // 2
    return x[..., :n, :], x[..., n:, :]


def _learned(z: mx.array, x: mx.array, rows: Sequence[mx.array], tokens: _MiniBatch) -> mx.array:
    """z = x W + b with what W and b have learned from the rows: z_i - t_i sum_{j <= i} (x_i . x_j + 1) e_j."""
    past_x, past_e = rows
    return mx.addmm(z, tokens.causal * (x @ past_x.swapaxes(-1, -2) + 1), past_e)


def _error(z: mx.array, tokens: _MiniBatch) -> mx.array:
    """e = lr times the gradient of ||LN(z) - (v - k)||^2 / 2 with respect to z, in closed form."""
    centred = z - z.mean(-1, keepdims=True)
    inv_std = mx.rsqrt(centred.square().mean(-1, keepdims=True) + EPS)
    z_hat = centred * inv_std
    u = tokens.gamma_sq * z_hat + tokens.bias  # gamma (LN(z) - (v - k))
    g = u - u.mean(-1, keepdims=True) - z_hat * (u * z_hat).mean(-1, keepdims=True)
    return g * (inv_std * tokens.lr)


def commit(weights: Sequence[mx.array], rows: Sequence[mx.array], t: mx.array) -> list[mx.array]:
    """W - t sum_j x_j^T e_j and b - t sum_j e_j: with t_{K-1}, the weights after a whole mini-batch.

    Args:
        weights: (W1, b1[, W2, b2]), [B, H, ., .].
        rows: in parts (k, e1[, x2, e2]), [B, H, K, .]; zero where none is yet.
        t: a number, or [B, 1, 1, 1].
    """
    updated, minus_t = [], -t  # not `alpha=-1`: MLX 0.32's forward mode of `addmm` leaves it out
    for W, b, x, e in zip(weights[::2], weights[1::2], rows[::2], rows[1::2], strict=True):
        e = minus_t * e
        updated += [mx.addmm(W, x.swapaxes(-1, -2), e), b + e.sum(-2, keepdims=True)]
    return updated


# ---- What the learner shows ------------------------------------------------------------------------------------------


def _signals(tokens: Tokens, learner: Learner, traces: list[_Trace]) -> Signals:
    if not traces:
        return Signals(*[mx.zeros(tokens.lr.shape)] * 3)
    z = mx.concatenate([trace.z for trace in traces], axis=2)  # [B, H, T, D], less what no sequence counts
    target = (tokens.v.astype(mx.float32) - tokens.k.astype(mx.float32)).swapaxes(1, 2)[:, :, : z.shape[2]]
    reconstruction = learner.gamma[:, None] * mx.fast.layer_norm(z, None, None, EPS) + learner.beta[:, None]
    losses = 0.5 * _squares(reconstruction - target)
    rows = [mx.concatenate(list(x), axis=2) for x in zip(*(trace.rows for trace in traces), strict=True)]
    writes = [(_squares(x) + 1) * _squares(e) for x, e in zip(rows[::2], rows[1::2], strict=True)]  # of each map
    write_norms = learner.t[-1] * mx.sqrt(functools.reduce(mx.add, writes))
    padding = [(0, 0), (0, tokens.lr.shape[1] - z.shape[2]), (0, 0)]
    loss, write_norm = (tokens.where_counted(mx.pad(x.swapaxes(1, 2), padding)) for x in (losses, write_norms))
    return Signals(loss, tokens.where_counted(tokens.lr), write_norm)


def _squares(x: mx.array) -> mx.array:
    """||x||^2 of each token, [B, H, T]."""
    return x.square().sum(-1)


# ---- Rows ------------------------------------------------------------------------------------------------------------


def _append(rows: mx.array, new: list[mx.array], run: _Run) -> tuple[list[mx.array], mx.array]:
    """The open mini-batch's packed rows with `new` at the slots of a run: in parts [B, H, K, .], and packed."""
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
    return list(mx.split(packed, [sum(widths[:i]) for i in range(1, len(widths))], axis=-1)), packed


@functools.cache
def _triangle(K: int) -> mx.array:
    """-1 where j <= i, else 0, [K, K]."""
    return mx.array(-np.tri(K), mx.float32)


def _where(mask: list[bool], new: mx.array, old: mx.array) -> mx.array:
    """`new` for the sequences in the mask, `old` for the others."""
    if all(mask):
        return new
    return mx.where(mx.array(mask)[:, None, None, None], new, old)
