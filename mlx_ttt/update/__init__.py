"""The update rule of a TTT layer: pure functions of arrays.

    reference.py   the definition, token by token, for tests
    dual.py        the dual form in MLX operations, for every device
    metal.py       the same calls bound to metal/*.metal
    native.py      the same calls bound to mlx_ttt/native/*.c, for long inputs on a Linux CPU

Shapes below: B batch, T tokens, H heads, D head dimension, K mini-batch size, R row width.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import dual, metal, native

Weights = tuple[mx.array, ...]


def ttt_linear(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    lr: mx.array,
    t: mx.array,
    gamma: mx.array,
    beta: mx.array,
    weights: Weights,
    rows: mx.array,
    phase: Sequence[int],
    lengths: Sequence[int] | None = None,
) -> tuple[mx.array, Weights, mx.array]:
    """Read T tokens with TTT-Linear, from any phase of the open mini-batch.

    Args:
        q, k, v: the views of the tokens after RoPE, [B, T, H, D], any float dtype.
        lr: inner learning rates, ttt_base_lr / D times the gate, [B, T, H].
        t: token factors max(1 / (i + 1) + learnable_token_idx_i, 0), [K], float32.
        gamma, beta: of the inner LayerNorm, [H, D], float32.
        weights: at the start of the open mini-batch, (W1 [B, H, D, D], b1 [B, H, 1, D]), float32.
        rows: the open mini-batch, k and e1 side by side, [B, H, K, 2D], float32; zero where not yet written.
        phase: tokens in the open mini-batch of each sequence, 0 … K - 1.
        lengths: how many of the T tokens count, per sequence; the others change nothing. All, by default.

    Returns:
        y = q + LN(z) [B, T, H, D] in the dtype of q, and the weights and rows after the tokens.

    Raises:
        ValueError: an argument has the wrong shape or a phase or length is out of range.
    """
    B, T, K = _check(2, q, k, v, lr, t, gamma, beta, weights, rows)
    _check_counts(B, T, K, phase, lengths)
    return _backend(q, K).ttt_linear(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def ttt_mlp(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    lr: mx.array,
    t: mx.array,
    gamma: mx.array,
    beta: mx.array,
    weights: Weights,
    rows: mx.array,
    phase: Sequence[int],
    lengths: Sequence[int] | None = None,
) -> tuple[mx.array, Weights, mx.array]:
    """Read T tokens with TTT-MLP. As :func:`ttt_linear`, but

    weights: (W1 [B, H, D, 4D], b1 [B, H, 1, 4D], W2 [B, H, 4D, D], b2 [B, H, 1, D]);
    rows: k, e1, x2 and e2 side by side, [B, H, K, 10D].
    """
    B, T, K = _check(10, q, k, v, lr, t, gamma, beta, weights, rows)
    _check_counts(B, T, K, phase, lengths)
    return _backend(q, K).ttt_mlp(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def ttt_linear_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    lr: mx.array,
    t: mx.array,
    gamma: mx.array,
    beta: mx.array,
    weights: Weights,
    rows: mx.array,
    phase: mx.array,
) -> tuple[mx.array, mx.array]:
    """Read one token of each sequence that completes no mini-batch, at a phase that only the device need know.

    Args:
        q, k, v, lr, t, gamma, beta, weights, rows: as in :func:`ttt_linear`, with T = 1.
        phase: tokens in the open mini-batch of each sequence, [B], int32, 0 … K - 2: not checked.

    Returns:
        y [B, 1, H, D], and the token's row [B, H, 1, R], which belongs at the phase.

    Raises:
        ValueError: an argument has the wrong shape or dtype.
    """
    _check_one(*_check(2, q, k, v, lr, t, gamma, beta, weights, rows), phase)
    return _step_backend().ttt_linear_step(q, k, v, lr, t, gamma, beta, weights, rows, phase)


def ttt_mlp_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    lr: mx.array,
    t: mx.array,
    gamma: mx.array,
    beta: mx.array,
    weights: Weights,
    rows: mx.array,
    phase: mx.array,
) -> tuple[mx.array, mx.array]:
    """Read one token of each sequence with TTT-MLP. As :func:`ttt_linear_step`."""
    _check_one(*_check(10, q, k, v, lr, t, gamma, beta, weights, rows), phase)
    return _step_backend().ttt_mlp_step(q, k, v, lr, t, gamma, beta, weights, rows, phase)


def state_shapes(row_parts: int, B: int, H: int, D: int, K: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights and rows by name.

    Args:
        row_parts: R / D, how many vectors of a head a row has room for: 2 for TTT-Linear, 10 for TTT-MLP.
    """
    hidden = D if row_parts == 2 else 4 * D
    shapes = {"W1": (B, H, D, hidden), "b1": (B, H, 1, hidden)}
    if row_parts == 10:
        shapes |= {"W2": (B, H, hidden, D), "b2": (B, H, 1, D)}
    return shapes | {"rows": (B, H, K, row_parts * D)}


def _backend(q: mx.array, K: int):
    if metal.available():
        return metal
    return native if native.supports(q, K) else dual


def _step_backend():
    return metal if metal.available() else dual


def _check(row_parts, q, k, v, lr, t, gamma, beta, weights, rows) -> tuple[int, int, int]:
    """Returns B, T and K."""
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}, expected [B, T, H, D]")
    B, T, H, D = q.shape
    (K,) = t.shape if t.ndim == 1 else (0,)
    if K == 0:
        raise ValueError(f"t has shape {t.shape}, expected [K] with K > 0")
    state = state_shapes(row_parts, B, H, D, K)
    rows_shape, matrices = state.pop("rows"), list(state)
    if len(weights) != len(matrices):
        raise ValueError(f"weights has {len(weights)} arrays, expected ({', '.join(matrices)})")
    expected = {"k": (k, (B, T, H, D)), "v": (v, (B, T, H, D)), "lr": (lr, (B, T, H))}
    expected |= {"gamma": (gamma, (H, D)), "beta": (beta, (H, D)), "rows": (rows, rows_shape)}
    expected |= {name: (w, shape) for (name, shape), w in zip(state.items(), weights, strict=True)}
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    for name in ("t", "gamma", "beta", "rows", *matrices):
        array = t if name == "t" else expected[name][0]
        if array.dtype != mx.float32:
            raise ValueError(f"{name} is {array.dtype}, expected float32")
    return B, T, K


def _check_counts(B, T, K, phase, lengths):
    if len(phase) != B or not all(0 <= p < K for p in phase):
        raise ValueError(f"phase is {list(phase)}, expected {B} integers from 0 to {K - 1}")
    if lengths is not None and (len(lengths) != B or not all(0 <= n <= T for n in lengths)):
        raise ValueError(f"lengths is {list(lengths)}, expected {B} integers from 0 to {T}")


def _check_one(B, T, K, phase):
    if T != 1:
        raise ValueError(f"q has {T} tokens, expected 1")
    if phase.shape != (B,) or phase.dtype != mx.int32:
        raise ValueError(f"phase has shape {phase.shape} and dtype {phase.dtype}, expected ({B},) and int32")
