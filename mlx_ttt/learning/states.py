"""Arithmetic of states: what a model has learned from a text is measured, blended, weakened or undone.

What is learned are the inner weights, of every layer and head. The functions here take a state, as a `TextState` or as
a list of caches, one per layer, with any number of sequences. They return a new one of the same kind, which can be
saved and continued like any other. The state that was given stays as it is; arrays that do not change are shared.

The inner weights of a state are those at the start of its open mini-batch, W, and the open rows, whose gradient
G = sum_j x_j^T e_j is not written yet. Three weights follow (t as in `network/rule.py`):

    W - t_p G        as the next token sees them, at slot p of the mini-batch: `weights`
    W - t_{K-1} G    as they will be written when the mini-batch is complete, if no more is learned: all other functions
    W                what has been written

At the end of a mini-batch all three are the same. Within it the first goes up and down with t_p, whatever is learned.
So states are compared, and given to others, by the second.

Shapes: B sequences, H heads, D head dimension, K mini-batch size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import mlx.core as mx
import numpy as np

from ..errors import StateError
from ..network.cache import TTTCache
from ..network.dual import commit
from ..network.model import Model
from ..network.rewind import RewindableTTTCache
from ..text.state import TextState

Weights = tuple[mx.array, ...]
S = TypeVar("S", TextState, list[TTTCache])


# ---- What has been learned -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """How far the inner weights of two states are from each other, all of a head's together.

    Attributes:
        frobenius: the Frobenius norm of the difference, [layers, B, H].
        start: that of the weights at the start of a text, [layers, 1, H].
    """

    frobenius: mx.array
    start: mx.array

    @property
    def relative(self) -> mx.array:
        """The distance as a part of the norm of the start weights, [layers, B, H]."""
        return self.frobenius / self.start

    def of_layers(self) -> Distance:
        """The same of all heads of a layer together: [layers, B] and [layers, 1]."""
        return Distance(_norm(self.frobenius), _norm(self.start))


def weights(model: Model, state: S, layer: int) -> Weights:
    """The inner weights of a layer as the next token sees them, less what it adds itself.

    Returns:
        W1, b1[, W2, b2] - t_p G with p the slot of the next token, [B, H, ., .], float32.

    Raises:
        StateError: there is no such layer, or the state is that of another model.
    """
    cache = _caches(model, state)[_chosen("layer", [layer], len(model.layers))[0]]
    t = model.layers[layer].seq_modeling_block.token_factors()
    return _learned(model, cache, layer, t[mx.array(cache.phase)])


def drift(model: Model, state: S) -> Distance:
    """How far the inner weights have come from those at the start of the text.

    Open rows count with t_{K-1}, the factor that they will be written with. So the drift of a head is at most the sum
    of the write norms of its tokens, wherever the mini-batch stands.

    Raises:
        StateError: the state is that of another model.
    """
    return _distance(model, _all_learned(model, state), _start(model))


def distance(model: Model, a: S, b: S) -> Distance:
    """How far the inner weights of two states are from each other. Open rows count as for `drift`.

    Raises:
        StateError: a state is that of another model, or the two have different numbers of sequences.
    """
    _check_pair(model, a, b)
    return _distance(model, _all_learned(model, a), _all_learned(model, b))


# ---- New states ------------------------------------------------------------------------------------------------------


def blend(model: Model, a: S, b: S, weight: float, *, extrapolate: bool = False) -> S:
    """The text of `a`, with inner weights between those of `a` and those of `b`.

        W = (1 - weight) W_a + weight (W_b - t_{K-1} G_b),   e = (1 - weight) e_a

    Only inner weights can be blended. A position, a token and the inputs of a convolution belong to one text, and
    blended ones would belong to none. So the new state goes on with the text of `a`: its position, last tokens,
    convolutions and learning scale. Its open rows stay open, and what they will write is weighed like W_a. Those of `b`
    cannot stay beside them, since a mini-batch has one row for each slot: they are written at once, with t_{K-1}. The
    positions may differ, since inner weights know of none.

    Args:
        weight: of `b`. With 0 the new state is `a`, bit for bit; with 1 it is the text of `a` with what was learned
            from that of `b`.
        extrapolate: allow a weight below 0 or above 1.

    Raises:
        StateError: the weight is not a number, or not from 0 to 1; a state is that of another model; or the two have
            different numbers of sequences.
    """
    _check_number("weight", weight)
    if not extrapolate and not 0 <= weight <= 1:
        raise StateError(f"weight is {weight}, expected 0 to 1; extrapolate=True allows others")
    _check_pair(model, a, b)
    return _mixed(model, a, _all_learned(model, b), _shares(a, weight))


def swap(model: Model, a: S, b: S, *, layers: Iterable[int] | None = None, heads: Iterable[int] | None = None) -> S:
    """The text of `a`, with what some layers and heads have learned from the text of `b`: blended with weight 1.

    Args:
        layers, heads: which, counted from 0; all by default.

    Raises:
        StateError: there is no such layer or head; and as for `blend`.
    """
    _check_pair(model, a, b)
    return _mixed(model, a, _all_learned(model, b), _shares(a, 1, layers, heads))


def reset(model: Model, state: S, *, layers: Iterable[int] | None = None, heads: Iterable[int] | None = None) -> S:
    """The text, with nothing learned from it in some layers and heads: their weights are those at the start.

    Position, last tokens and convolutions stay.

    Args:
        layers, heads: which, counted from 0; all by default.

    Raises:
        StateError: there is no such layer or head, or the state is that of another model.
    """
    _caches(model, state)
    return _mixed(model, state, _start(model), _shares(state, 1, layers, heads))


def scale(model: Model, state: S, factor: float) -> S:
    """The text, with its drift times a factor: W = W_start + factor (W - W_start), e = factor e.

    Args:
        factor: 0 resets, 1 changes nothing; more than 1 and less than 0 extrapolate.

    Raises:
        StateError: the factor is not a number, or the state is that of another model.
    """
    _check_number("factor", factor)
    _caches(model, state)
    return _mixed(model, state, _start(model), _shares(state, 1 - factor))


def freeze(model: Model, state: S) -> S:
    """The text, with all that was learned from it written, and nothing learned from what is read next.

    The open rows are written at once, with t_{K-1}, and cleared; the mini-batch stays where it stands. The state's
    learning scale is 0. Set `state.learning = 1` to have it learn again. A list of caches has no such scale: pass it to
    the model, `model(ids, cache, learning=0)`.

    Raises:
        StateError: the state is that of another model.
    """
    caches = _caches(model, state)
    written = [
        _with(cache, learned, mx.zeros_like(cache.rows))
        for cache, learned in zip(caches, _all_learned(model, state), strict=True)
    ]
    return replace(state, cache=written, learning=0.0) if isinstance(state, TextState) else written


# ---- How it is done --------------------------------------------------------------------------------------------------


def _mixed(model: Model, a: S, others: Sequence[Weights], share: np.ndarray) -> S:
    """(1 - share) of a's weights and e, and `share` of other weights, for each layer and head: share [layers, H]."""
    caches = a.cache if isinstance(a, TextState) else a
    if share.any():
        mixed = [_mixed_layer(model, *layer) for layer in zip(caches, others, share, strict=True)]
    else:
        mixed = [c.copy() for c in caches]
    return replace(a, cache=mixed, tokens=list(a.tokens)) if isinstance(a, TextState) else mixed


def _mixed_layer(model: Model, cache: TTTCache, other: Weights, share: np.ndarray) -> TTTCache:
    """A layer with `share` [H] of other weights."""
    if not share.any():
        return _with(cache, cache.weights, cache.rows)
    part = mx.array(share, mx.float32)[:, None, None]

    def mix(x: mx.array, y: mx.array) -> mx.array:  # without a trace of what has no share, even if that is no number
        x = mx.where(part == 0, x, (1 - part) * x + part * y)
        return mx.where(part == 1, y, x)

    kept = _parts(model, cache)
    kept[1::2] = [mix(e, mx.zeros_like(e)) for e in kept[1::2]]
    rows = mx.concatenate(kept, axis=-1)
    rows = mx.where(part == 1, mx.zeros_like(rows), rows)
    return _with(cache, tuple(map(mix, cache.weights, other)), rows)


def _with(cache: TTTCache, weights: Weights, rows: mx.array) -> TTTCache:
    """The cache with another inner state. What was read before is out of reach then: taking it back would undo that."""
    rewindable = isinstance(cache, RewindableTTTCache)
    new = cache.plain() if isinstance(cache, RewindableTTTCache) else cache.copy()
    new.arrays = {**new.arrays, "weights": weights, "rows": rows}
    return RewindableTTTCache(new) if rewindable else new


def _learned(model: Model, cache: TTTCache, layer: int, t: mx.array) -> Weights:
    """W - t G of a cache, t [] or [B]."""
    return tuple(commit(cache.weights, _parts(model, cache), t.reshape(-1, 1, 1, 1)))


def _all_learned(model: Model, state: S) -> list[Weights]:
    """W - t_{K-1} G of all layers."""
    factors = [layer.seq_modeling_block.token_factors()[-1] for layer in model.layers]
    return [_learned(model, c, i, t) for i, (c, t) in enumerate(zip(_caches(model, state), factors, strict=True))]


def _parts(model: Model, cache: TTTCache) -> list[mx.array]:
    """The open rows in parts (k, e1[, x2, e2]), [B, H, K, .]; zero from the phase on."""
    widths = model.args.inner_model.row_widths(model.args.head_dim).values()
    is_open = mx.arange(cache.mini_batch_size) < mx.array(cache.phase)[:, None]  # [B, K]
    rows = mx.where(is_open[:, None, :, None], cache.rows, 0)
    return list(mx.split(rows, list(itertools.accumulate(widths))[:-1], axis=-1))


def _start(model: Model) -> list[Weights]:
    """The weights at the start of a text, of all layers."""
    return [layer.seq_modeling_block.make_cache().weights for layer in model.layers]


def _distance(model: Model, a: Sequence[Weights], b: Sequence[Weights]) -> Distance:
    differences = [[x - y for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]
    return Distance(_norms(differences), _norms(_start(model)))


def _norms(layers: Sequence[Iterable[mx.array]]) -> mx.array:
    """Of all weights [B, H, ., .] of a head together: [layers, B, H]."""
    return mx.stack([_norm(mx.concatenate([w.flatten(2) for w in layer], axis=-1)) for layer in layers])


def _norm(x: mx.array) -> mx.array:
    return mx.linalg.norm(x, axis=-1)


# ---- What is refused -------------------------------------------------------------------------------------------------


def _caches(model: Model, state: S) -> list[TTTCache]:
    """The caches of a state, if they can be this model's."""
    caches = state.cache if isinstance(state, TextState) else list(state)
    expected = [_shapes(c) for c in model.make_cache()]
    if not all(isinstance(c, TTTCache) for c in caches) or [_shapes(c) for c in caches] != expected:
        raise StateError("the state is that of another model: its layers or their shapes are not those of this one")
    return caches


def _shapes(cache: TTTCache) -> list[tuple[int, ...]]:
    """Of one sequence."""
    return [x.shape[1:] for x in (*cache.weights, cache.rows)]


def _check_pair(model: Model, a: S, b: S) -> None:
    counts = [len(_caches(model, state)[0].offset) for state in (a, b)]
    if counts[0] != counts[1]:
        raise StateError(f"the states have {counts[0]} and {counts[1]} sequences: `extract` or `expand` one of them")


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise StateError(f"{name} is {value}, expected a number")


def _shares(
    state: S, share: float, layers: Iterable[int] | None = None, heads: Iterable[int] | None = None
) -> np.ndarray:
    """`share` for the chosen layers and heads, 0 for the others, [layers, H]."""
    caches = state.cache if isinstance(state, TextState) else state
    shares = np.zeros((len(caches), caches[0].rows.shape[1]))
    chosen = _chosen("layer", layers, shares.shape[0]), _chosen("head", heads, shares.shape[1])
    shares[np.ix_(*chosen)] = share
    return shares


def _chosen(what: str, chosen: Iterable[int] | None, count: int) -> list[int]:
    """All of them by default."""
    indices = []
    for index in range(count) if chosen is None else chosen:
        if not 0 <= index < count:
            raise StateError(f"there is no {what} {index}: the model has {what}s 0 to {count - 1}")
        indices.append(index)
    return indices
