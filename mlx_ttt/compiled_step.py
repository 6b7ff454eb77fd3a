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
    """Reads one token of each sequence, by a function that is compiled again where a model's modules have changed."""

    def __init__(self):
        self._traced: list = []
        self._function = None

    def __reduce__(self):
        return CompiledStep, ()  # a copy of the model is traced by itself

    def read(self, model, ids: mx.array, cache: Sequence[TTTCache]) -> mx.array | None:
        """What a TTTModel does with token ids [B, 1] after those that the caches have read: hidden states [B, 1, C].

        None if it must do it itself.
        """
        if not wanted() or not _same_step(cache, ids.shape[0]):
            return None
        modules = _modules(model)  # of a replaced one the arrays may look the same
        if len(modules) != len(self._traced) or not all(map(operator.is_, modules, self._traced)):
            self._traced = modules
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


def _modules(model) -> list:
    """All modules in a model, and whether each is being trained: with the shapes, what a trace depends on."""
    found = [model]
    for tree in found:  # which grows meanwhile
        children = tree.values() if isinstance(tree, dict) else tree
        found += [x for x in children if isinstance(x, dict | list | tuple)]
    return found + [tree.training for tree in found if isinstance(tree, nn.Module)]


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
