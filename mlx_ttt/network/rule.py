"""The update rule's three arguments: the tokens to read, the learner that reads them, and the state it is in; and what
the learner shows of its work.

The rule itself is :func:`mlx_ttt.network.dual.update`. Shapes: B batch, T tokens, H heads, D head dimension, K
mini-batch size, R row width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from .inner import InnerModel


@dataclass(frozen=True)
class Tokens:
    """What the tokens bring.

    Attributes:
        q, k, v: their views after RoPE, [B, T, H, D], any float dtype.
        lr: inner learning rates, ttt_base_lr / D times the gate, [B, T, H].
        lengths: how many of the T tokens count, per sequence; the others change nothing. None: all.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    lr: mx.array
    lengths: Sequence[int] | None = None

    def part(self, start: int, stop: int, lengths: Sequence[int]) -> Tokens:
        """The tokens from `start` to before `stop`, of which `lengths` count."""
        q, k, v, lr = (x[:, start:stop] for x in (self.q, self.k, self.v, self.lr))
        return Tokens(q, k, v, lr, lengths)

    @property
    def counts(self) -> list[int]:
        """`lengths` in full."""
        B, T = self.q.shape[:2]
        return [T] * B if self.lengths is None else list(self.lengths)

    def where_counted(self, x: mx.array) -> mx.array:
        """x [B, T, H], zero for the tokens that do not count. float32."""
        x = x.astype(mx.float32)
        if self.lengths is None:
            return x
        return mx.where((mx.arange(x.shape[1]) < mx.array(self.counts)[:, None])[..., None], x, 0)


@dataclass(frozen=True)
class Learner:
    """What learns: an inner model and the constants of its training.

    Attributes:
        inner: TTT-Linear or TTT-MLP.
        t: token factors max(1 / (i + 1) + learnable_token_idx_i, 0), [K], float32.
        gamma, beta: of the LayerNorm behind the inner model, [H, D], float32.
    """

    inner: InnerModel
    t: mx.array
    gamma: mx.array
    beta: mx.array

    @property
    def mini_batch_size(self) -> int:
        """K"""
        return len(self.t)


@dataclass(frozen=True)
class State:
    """What has been learned so far.

    Attributes:
        weights: of the inner model at the start of the open mini-batch, (W1, b1[, W2, b2]), [B, H, ., .], float32.
        rows: the tokens of the open mini-batch, (k, e1[, x2, e2]) side by side, [B, H, K, R], float32; zero where none
        is yet.
        phase: how many tokens the open mini-batch of each sequence holds, 0 ... K - 1. Integers that the host knows;
            or an array, [B], int32, which may be known to the device alone. Then T must be 1, all tokens count, and no
            sequence completes its mini-batch. Such an array is not checked.
    """

    weights: tuple[mx.array, ...]
    rows: mx.array
    phase: Sequence[int] | mx.array


class Signals(NamedTuple):
    """What the learner does with each token. Zero for tokens that do not count.

    Attributes:
        loss: ||LN(f(k)) - (v - k)||^2 / 2 at the weights of the start of the mini-batch, [B, T, H], float32.
        lr: the token's learning rate, [B, T, H], float32.
        write_norm: the Frobenius norm of what the token adds to all weights of the inner model when its mini-batch is
            committed, t_{K-1} sqrt(sum over the maps of (||x||^2 + 1) ||e||^2), [B, T, H], float32.
    """

    loss: mx.array
    lr: mx.array
    write_norm: mx.array

    @classmethod
    def joined(cls, parts: Sequence[Signals]) -> Signals:
        """Those of texts that follow one another."""
        return (
            parts[0] if len(parts) == 1 else cls(*(mx.concatenate(list(x), axis=1) for x in zip(*parts, strict=True)))
        )


def state_shapes(inner: InnerModel, B: int, H: int, D: int, K: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a state's weights and rows, by name."""
    weights: dict[str, tuple[int, ...]] = {name: (B, H, *shape) for name, shape in inner.weight_shapes(D).items()}
    return weights | {"rows": (B, H, K, inner.row_width(D))}


def check(tokens: Tokens, learner: Learner, state: State) -> None:
    """Check all shapes, dtypes and counts of a call of the update rule.

    Raises:
        ValueError: one is wrong; says which, and what is expected.
    """
    if tokens.q.ndim != 4:
        raise ValueError(f"q has shape {tokens.q.shape}, expected [B, T, H, D]")
    if learner.t.ndim != 1 or not len(learner.t):
        raise ValueError(f"t has shape {learner.t.shape}, expected [K] with K > 0")
    (B, T, H, D), K = tokens.q.shape, learner.mini_batch_size
    names = learner.inner.weight_names
    if len(state.weights) != len(names):
        raise ValueError(f"weights has {len(state.weights)} arrays, expected ({', '.join(names)})")
    of_tokens = {"k": tokens.q.shape, "v": tokens.q.shape, "lr": (B, T, H)}
    in_float32 = {"t": (K,), "gamma": (H, D), "beta": (H, D)} | state_shapes(learner.inner, B, H, D, K)
    arrays = vars(tokens) | vars(learner) | vars(state) | dict(zip(names, state.weights, strict=True))
    for name, shape in (of_tokens | in_float32).items():
        array = arrays[name]
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
        if name in in_float32 and array.dtype != mx.float32:
            raise ValueError(f"{name} is {array.dtype}, expected float32")
    _check_counts(tokens, state.phase, K)


def _check_counts(tokens: Tokens, phase: Sequence[int] | mx.array, K: int) -> None:
    (B, T), lengths = tokens.q.shape[:2], tokens.lengths
    if isinstance(phase, mx.array):
        if T != 1 or lengths is not None:
            raise ValueError(f"q has {T} tokens and lengths is {lengths}; with an array as phase: 1, and None")
        if phase.shape != (B,) or phase.dtype != mx.int32:
            raise ValueError(f"phase has shape {phase.shape} and dtype {phase.dtype}, expected ({B},) and int32")
    elif len(phase) != B or not all(0 <= p < K for p in phase):
        raise ValueError(f"phase is {list(phase)}, expected {B} integers from 0 to {K - 1}")
    if lengths is not None and (len(lengths) != B or not all(0 <= n <= T for n in lengths)):
        raise ValueError(f"lengths is {list(lengths)}, expected {B} integers from 0 to {T}")
