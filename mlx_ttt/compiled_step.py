"""One token through the network on a GPU, as one compiled function: the blocks of layers.py, traced once.

Nothing in the trace depends on where the mini-batches stand: the phase is an input. A token that completes a
mini-batch of some sequence, and texts with padding, are read without it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .cache import LayerState, TTTCache
from .update import ttt_linear, ttt_linear_step, ttt_mlp, ttt_mlp_step
from .update.dual import append_row

_STEP = {ttt_linear: ttt_linear_step, ttt_mlp: ttt_mlp_step}


def wanted() -> bool:
    """Whether this device is one that waits for the host to launch its operations."""
    return mx.default_device() == mx.gpu


class CompiledStep:
    """Reads one token of each sequence, by a function that is compiled again where the model has changed."""

    def __init__(self):
        self._forget()

    def _forget(self) -> None:
        self._traced: list = []
        self._function = None

    def __reduce__(self):
        return CompiledStep, ()  # a copy of the model is traced by itself

    def read(self, model, ids: mx.array, cache: Sequence[TTTCache] | None) -> mx.array | None:
        """What a TTTModel does with token ids [B, T] after those that the caches have read: hidden states [B, T, C].

        None if it must do it itself.
        """
        if not wanted():
            return None
        parts = _parts(model)
        same = len(parts) == len(self._traced) and all(map(operator.is_, parts, self._traced))
        if not same:
            self._forget()  # whatever is read: what was replaced need not stay in memory
        B, T = ids.shape
        if T != 1 or not cache or not _same_step(cache, B):
            return None
        if not same:
            self._traced = parts
            self._function = mx.compile(functools.partial(_step, model), inputs=[model])
        states = [{"weights": c.weights, "rows": c.rows, "history": c.history} for c in cache]
        x, states = self._function(ids, mx.array(cache[0].phase, mx.int32), states)
        for c, state in zip(cache, states, strict=True):
            c.rows, c.history = state["rows"], state["history"]
            c.advance()
        return x


def _same_step(cache: Sequence[TTTCache], B: int) -> bool:
    """Whether one token of each of B sequences is the same step in all layers, and completes no mini-batch."""
    first = cache[0]
    return all(type(c) is TTTCache and c.lengths(1) == [1] * B and c.offset == first.offset for c in cache) and all(
        phase + 1 < first.mini_batch_size for phase in first.phase
    )


def _parts(model) -> list:
    """What a trace depends on beside the shapes of the parameters: modules, their settings, and what they do."""
    trees = [model]
    for tree in trees:  # which grows meanwhile
        children = tree.values() if isinstance(tree, dict) else tree
        trees += [x for x in children if isinstance(x, dict | list | tuple)]
    modules = [tree for tree in trees if isinstance(tree, nn.Module)]
    return trees + [x for m in modules for x in (type(m), vars(type(m)).get("__call__"), *vars(m).values())]


def _step(model, ids: mx.array, phase: mx.array, states: list[dict]) -> tuple[mx.array, list[dict]]:
    """Hidden states [B, 1, C] of token ids [B, 1], and the states of all layers after them, less the weights."""
    layers = [_OpenMiniBatch(phase, **state) for state in states]
    x = model.through_blocks(ids, layers)
    return x, [{"rows": layer.rows, "history": layer.history} for layer in layers]


class _OpenMiniBatch(LayerState):
    """The state of one layer while it reads one token of each sequence, which leaves all mini-batches open.

    Attributes:
        phase: [B], int32.
        weights, rows: as in TTTCache.
    """

    def __init__(self, phase: mx.array, weights: Sequence[mx.array], rows: mx.array, history: dict[str, mx.array]):
        self.phase = phase
        self.weights = tuple(weights)
        self.rows = rows
        self.history = dict(history)

    def lengths(self, T: int) -> list[int]:
        return [T] * len(self.rows)

    def update(self, rule, tokens: tuple[mx.array, ...], constants: tuple[mx.array, ...]) -> mx.array:
        y, row = _STEP[rule](*tokens, *constants, self.weights, self.rows, self.phase)
        self.rows = append_row(self.rows, row, self.phase)
        return y
