"""The update rule in C, and its backward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ...network.dual import dual_form, observed_dual_form
from ...network.inner import TTT_LINEAR, TTT_MLP, InnerModel
from ...network.rule import Learner, Signals, State, Tokens
from ..differentiable import Signature
from .calls import LANES, LARGEST_MINI_BATCH, at_once, call, worthwhile

LARGEST_BACKWARD = 1 << 10  # tokens of a mini-batch: the backward keeps the products of each with each other


@dual_form.register
def update(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State]:
    if not _supports(tokens, learner):
        return NotImplemented
    signature, sizes = Signature(tokens, learner, state), _Sizes.of(tokens, learner)
    arrays, (axes, axes_after) = signature.arrays(tokens, learner, state), _axes(learner.inner)

    def compute(*arrays: np.ndarray) -> list[np.ndarray]:
        return _fitted(_compute(signature, sizes, _fitted(arrays, axes, sizes)), axes_after, sizes, back=True)

    def backward(*both: np.ndarray) -> list[np.ndarray]:
        before, after = _fitted(both[: len(axes)], axes, sizes), _fitted(both[len(axes) :], axes_after, sizes)
        return _fitted(_backward(signature, sizes, before, after), axes, sizes, back=True)

    y, *weights, rows = at_once(
        compute,
        signature.dual_form,
        *arrays,
        dtypes=[tokens.q.dtype, *[x.dtype for x in arrays[7:]]],
        backward=backward if sizes.K <= LARGEST_BACKWARD else None,
    )
    return y, signature.after(weights, rows)


@observed_dual_form.register
def observe(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State, Signals]:
    """Without a backward of its own: MLX differentiates the operations."""
    if not _supports(tokens, learner):
        return NotImplemented
    signature, sizes = Signature(tokens, learner, state), _Sizes.of(tokens, learner)
    arrays, (axes, axes_after) = signature.arrays(tokens, learner, state), _axes(learner.inner)

    def compute(*arrays: np.ndarray) -> list[np.ndarray]:
        signals = [np.zeros_like(arrays[3]) for _ in range(2)]
        found = _compute(signature, sizes, _fitted(arrays, axes, sizes), signals)
        return [*_fitted(found, axes_after, sizes, back=True), *signals]

    dtypes = [tokens.q.dtype, *[x.dtype for x in arrays[7:]], mx.float32, mx.float32]
    y, *weights, rows, loss, write_norm = at_once(compute, signature.observed_dual_form, *arrays, dtypes=dtypes)
    return y, signature.after(weights, rows), Signals(loss, tokens.where_counted(tokens.lr), write_norm)


def _supports(tokens: Tokens, learner: Learner) -> bool:
    known, T = learner.inner in (TTT_LINEAR, TTT_MLP), tokens.q.shape[1]
    return known and worthwhile(T) and learner.mini_batch_size <= LARGEST_MINI_BATCH


class _Sizes(NamedTuple):
    T: int
    H: int
    D: int  # filled up to a multiple of LANES
    K: int
    head_dim: int

    @classmethod
    def of(cls, tokens: Tokens, learner: Learner) -> _Sizes:
        _, T, H, D = tokens.q.shape
        return cls(T, H, -(-D // LANES) * LANES, learner.mini_batch_size, D)


def _axes(inner: InnerModel) -> tuple[list[int], list[int]]:
    """How many of the last axes hold one or several times head_dim numbers.

    Those of `Signature.arrays`, and those of y, the weights and the rows after the tokens.
    """
    state = [*(1 if name.startswith("b") else 2 for name in inner.weight_names), 1]
    return [1, 1, 1, 0, 0, 1, 1, *state], [1, *state]


def _fitted(arrays: Sequence[np.ndarray], axes: Sequence[int], sizes: _Sizes, back: bool = False) -> list[np.ndarray]:
    """The arrays with head_dim filled up to D by zeros, or back again.

    Args:
        axes: how many of each array's last axes hold one or several times head_dim numbers.
    """
    wide, narrow = sizes.D, sizes.head_dim
    if wide == narrow:
        return list(arrays)
    fitted = []
    for x, n in zip(arrays, axes, strict=True):
        for axis in range(x.ndim - n, x.ndim):
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            x = x.reshape(*before, -1, wide if back else narrow, *after)
            if back:
                x = x.take(range(narrow), axis + 1)
            else:
                x = np.pad(x, [(0, wide - narrow if i == axis + 1 else 0) for i in range(x.ndim)])
            x = x.reshape(*before, -1, *after)
        fitted.append(np.ascontiguousarray(x))
    return fitted


def _compute(
    signature: Signature,
    sizes: _Sizes,
    arrays: Sequence[np.ndarray],
    signals: Sequence[np.ndarray | None] = (None, None),
) -> list[np.ndarray]:
    """y, and the weights and rows after the tokens, of `Signature.arrays`. `signals` get losses and norms of writes."""
    inputs, (*weights, rows) = arrays[:7], (x.copy() for x in arrays[7:])
    y = np.zeros_like(inputs[0])
    counts = _counts(signature)
    arguments = _call(signature, sizes, [*inputs, *counts, y, *_four(weights), rows, *signals])
    call("mlx_ttt_update", ctypes.byref(arguments), len(signature.counts))
    return [y, *weights, rows]


def _backward(
    signature: Signature, sizes: _Sizes, arrays: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The cotangents of `Signature.arrays`, given those of y, the weights and the rows after the tokens."""
    B, (_, H, D, K, _) = len(signature.counts), sizes
    dy, (*dweights, drows) = cotangents[0], (x.copy() for x in cotangents[1:])
    tokens = [np.zeros_like(x) for x in arrays[:4]]
    constants = [np.zeros((B, H, n), np.float32) for n in (K, D, D)]
    counts, (*weights, rows) = _counts(signature), arrays[7:]
    given = _call(signature, sizes, [*arrays[:7], *counts, None, *_four(weights), rows, None, None])
    pointers = _addresses([dy, *_four(dweights), drows, *tokens, *constants])
    call("mlx_ttt_update_backward", ctypes.byref(_Backward(given, *pointers)), B)
    dt, dgamma, dbeta = (x.sum(0) for x in constants)
    return [*tokens, dt.sum(0), dgamma, dbeta, *dweights, drows]


def _counts(signature: Signature) -> list[np.ndarray]:
    """Phase and length of each sequence."""
    return [np.array(signature.phase, np.int32), np.array(signature.counts, np.int32)]


def _four(weights: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    """W1, b1, W2, b2, of which the last are missing from TTT-Linear."""
    return [*weights, *[None] * (4 - len(weights))]


def _addresses(arrays: Sequence[np.ndarray | None]) -> list[int | None]:
    return [None if x is None else x.ctypes.data for x in arrays]


def _call(signature: Signature, sizes: _Sizes, arrays: Sequence[np.ndarray | None]) -> _Call:
    """What C is called with. The arrays must outlive it."""
    return _Call(signature.inner is TTT_MLP, *sizes, *_addresses(arrays))


class _Call(ctypes.Structure):
    """struct call of c/rule.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("mlp", "T", "H", "D", "K", "head_dim")] + [
        (name, ctypes.c_void_p)
        for name in (
            *("q", "k", "v", "lr", "t", "gamma", "beta", "phase", "length", "y", "W1", "b1", "W2", "b2", "rows"),
            *("loss", "write_norm"),
        )
    ]


class _Backward(ctypes.Structure):
    """struct backward of c/rule.h."""

    _fields_ = [("call", _Call)] + [
        (name, ctypes.c_void_p)
        for name in ("dy", "dW1", "db1", "dW2", "db2", "drows", "dq", "dk", "dv", "dlr", "dt", "dgamma", "dbeta")
    ]
