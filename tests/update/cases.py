"""Inputs of the update rule, and how to compare its outputs."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

ROW_WIDTH = {"linear": 2, "mlp": 10}  # in head dimensions


def make_case(kind, *, B=1, T, H=2, D=8, K=8, phase, lengths=None, dtype=mx.float32, seed=0) -> dict:
    """Arguments of `ttt_linear` or `ttt_mlp`, in which every term matters: nothing is near zero or one."""
    key = mx.random.split(mx.random.key(seed), 12)

    def normal(i, *shape, scale=1.0):
        return scale * mx.random.normal(shape, key=key[i])

    hidden = D if kind == "linear" else 4 * D
    weights = [normal(0, B, H, D, hidden, scale=1 / math.sqrt(D)), normal(1, B, H, 1, hidden, scale=0.1)]
    if kind == "mlp":
        weights += [normal(2, B, H, hidden, D, scale=1 / math.sqrt(hidden)), normal(3, B, H, 1, D, scale=0.1)]
    written = mx.array([[slot < p for slot in range(K)] for p in phase])[:, None, :, None]
    rows = normal(4, B, H, K, ROW_WIDTH[kind] * D, scale=0.3) * written
    return {
        "q": normal(5, B, T, H, D).astype(dtype),
        "k": normal(6, B, T, H, D).astype(dtype),
        "v": normal(7, B, T, H, D).astype(dtype),
        "lr": (mx.random.uniform(shape=(B, T, H), key=key[8]) / D).astype(dtype),
        "t": mx.maximum(1 / mx.arange(1, K + 1) + normal(9, K, scale=0.1), 0),
        "gamma": 1 + normal(10, H, D, scale=0.2),
        "beta": normal(11, H, D, scale=0.2),
        "weights": tuple(weights),
        "rows": rows,
        "phase": list(phase),
        "lengths": lengths,
    }


def relative_error(found: mx.array, expected: mx.array) -> float:
    """Relative L2 distance; the absolute one where nothing is expected."""
    found, expected = (np.array(x.astype(mx.float64, stream=mx.cpu)) for x in (found, expected))
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1))


def counted(y: mx.array, lengths) -> mx.array:
    """y [B, T, H, D] with the tokens past each sequence's length, whose outputs mean nothing, set to zero."""
    if lengths is None:
        return y
    counts = mx.arange(y.shape[1]) < mx.array(lengths)[:, None]
    return mx.where(counts[..., None, None], y, mx.zeros_like(y), stream=mx.cpu)


def assert_agrees(found, expected, lengths=None, bound=1e-5) -> None:
    """Two results (y, weights, rows) of the update rule agree within `bound`."""
    y, weights, rows = found
    y_expected, weights_expected, rows_expected = expected
    assert relative_error(counted(y, lengths), counted(y_expected, lengths)) <= bound, "y"
    for name, w, w_expected in zip(("W1", "b1", "W2", "b2"), weights, weights_expected, strict=False):
        assert relative_error(w, w_expected) <= bound, name
    assert relative_error(rows, rows_expected) <= bound, "rows"
