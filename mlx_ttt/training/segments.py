"""Exact gradients of a long text, one segment at a time.

Forwards, the state at the start of each segment is kept; it is as large as a saved state. Backwards, from the last
segment to the first, one segment is computed again from its state. Two cotangents are pulled back through it: that of
its loss, and that of the state it ends with. Nothing is truncated: the result is that of backpropagation through the
whole text. The state before the first token is made of the parameters W1, b1[, W2, b2], so they get their gradients as
all others do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..network.backend import differentiated_once
from ..network.cache import TTTCache
from ..network.model import Model, has_dropout
from ..network.operations import cross_entropy
from ..network.rewind import RewindableTTTCache

SEGMENT = 512  # tokens: fewer are slower, more take more memory

Caches = list[TTTCache]


class _Segment(NamedTuple):
    inputs: mx.array  # [B, n]
    targets: mx.array  # [B, n]
    weights: mx.array  # [B, n], in the mean over the whole text
    start: Caches | None  # the state before it; None where that is made of the parameters
    seed: int | None  # of the dropout in it; None where the model has none


def gradients(
    model: Model,
    ids: mx.array,
    segment: int = SEGMENT,
    *,
    weights: mx.array | None = None,
    cache: Caches | None = None,
) -> tuple[mx.array, dict[str, Any]]:
    """The mean cross entropy of the next token, and its gradients: what `nn.value_and_grad` gives.

    Args:
        ids: token ids, [B, T + 1]. The first T are read, the last T predicted.
        segment: how many tokens are differentiated at a time. The result does not depend on it, memory does.
        weights: of each prediction in the mean, [B, T]; 0 for padding and prompts. By default all count alike.
        cache: a state to start from, which is not differentiated. Afterwards it stands behind the T tokens. One that
            has read nothing yet is made of the parameters, which then get their gradients as without a cache.

    Returns:
        The loss, in nats a token, and the gradients, in the shape of `model.trainable_parameters()`.

    Raises:
        ValueError: a shape does not fit, the segment is not positive, or no prediction counts.
    """
    B, T = ids.shape[0], ids.shape[1] - 1
    if T < 1 or segment < 1:
        raise ValueError(f"ids has shape {ids.shape} and segment is {segment}: expected [B, T + 1] and a positive one")
    weights = mx.ones((B, T)) if weights is None else weights.astype(mx.float32)
    if weights.shape != (B, T):
        raise ValueError(f"weights has shape {weights.shape}, expected {(B, T)}")
    total = weights.sum()
    if not float(total.item()) > 0:  # type: ignore[arg-type]
        raise ValueError("weights sum to zero: no prediction counts")

    parameters = model.trainable_parameters()
    try:
        return _backward(model, _forward(model, ids, weights / total, segment, cache))
    finally:
        model.update(parameters)


def _forward(model: Model, ids: mx.array, weights: mx.array, size: int, cache: Caches | None) -> list[_Segment]:
    """Read the text, and keep the state at the start of each segment."""
    T, segments = ids.shape[1] - 1, []
    seed = int(mx.random.randint(0, 1 << 30).item()) if has_dropout(model) else None  # type: ignore[arg-type]
    running = model.make_cache() if cache is None else cache
    is_fresh = cache is None or all(c.empty() and set(c.lengths(T)) == {T} for c in cache)  # read nothing, no padding
    for a in range(0, T, size):
        b = min(a + size, T)
        start = None if is_fresh and a == 0 else [_plain(c) for c in running]
        segments.append(
            _Segment(ids[:, a:b], ids[:, a + 1 : b + 1], weights[:, a:b], start, None if seed is None else seed + a)
        )
        _drop_as_before(segments[-1])
        if b < T or cache is not None:
            prefill(model, ids[:, a:b], running, size)
    return segments


def prefill(model: Model, ids: mx.array, cache: Caches, segment: int = SEGMENT) -> None:
    """Read tokens [B, T] for the sake of the state only, a segment at a time."""
    for start in range(0, ids.shape[1], segment):
        model.model(ids[:, start : start + segment], cache)
        mx.eval([c.arrays for c in cache])


def _drop_as_before(segment: _Segment) -> None:
    """Have the segment's dropout drop the same values whenever it is computed."""
    if segment.seed is not None:
        mx.random.seed(segment.seed)


def _plain(cache: TTTCache) -> TTTCache:
    return cache.plain() if isinstance(cache, RewindableTTTCache) else cache.copy()


def _backward(model: Model, segments: Sequence[_Segment]) -> tuple[mx.array, dict[str, Any]]:
    """The loss and its gradients, from the last segment to the first."""
    names, parameters = (list(x) for x in zip(*tree_flatten(model.trainable_parameters()), strict=True))
    loss, summed = mx.array(0.0), [mx.zeros(p.shape) for p in parameters]
    pulled: list[mx.array] | None = None  # the cotangent of the state after the segment; the text's last has none
    for segment in reversed(segments):
        state = _leaves(segment.start or [])
        run = _differentiable(model, segment, names, ends=pulled is not None)
        cotangents = [mx.array(1.0), *(pulled or [])]
        _drop_as_before(segment)
        with differentiated_once():
            (part, *_), found = mx.vjp(run, [*parameters, *state], cotangents)
        loss, pulled = loss + part, found[len(names) :]
        summed = [total + g.astype(mx.float32) for total, g in zip(summed, found[: len(names)], strict=True)]
        del found, cotangents  # so that each is gone once it is added: together they are as large as the weights
        mx.eval(loss, summed, pulled)
    summed = [total.astype(p.dtype) for total, p in zip(summed, parameters, strict=True)]
    return loss, tree_unflatten(list(zip(names, summed, strict=True)))


def _leaves(caches: Caches) -> list[mx.array]:
    return [x for c in caches for x in c.leaves]


def _differentiable(model: Model, segment: _Segment, names: list[str], ends: bool) -> Callable[..., list[mx.array]]:
    """A function of the parameters and the state before a segment: its loss and, if it `ends`, the state after it.

    Only the last segment of a text does not end: nothing depends on the state after it.
    """

    def run(*arrays: mx.array) -> list[mx.array]:
        parameters, state = arrays[: len(names)], iter(arrays[len(names) :])
        model.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        if segment.start is None:
            caches = model.make_cache()
        else:
            caches = [c.copy() for c in segment.start]
            for c in caches:
                c.leaves = list(islice(state, len(c.leaves)))
        losses = cross_entropy(model(segment.inputs, caches), segment.targets)
        return [(losses * segment.weights).sum(), *(_leaves(caches) if ends else [])]

    return run
