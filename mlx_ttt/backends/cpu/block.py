"""A block whose gradient is to be taken: one node of MLX's graph, computed again for its backward.

While MLX traces a function for its gradient, it keeps all that is evaluated: every array that leads to another, and
every cotangent. C evaluates as it goes. So without this all of a network would be in memory at once, forwards and
backwards, even where gradient checkpointing was asked for. Here the inside of a block is computed from copies that MLX
does not trace, and nothing of it is kept but what the block reads and returns.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ...network.backend import differentiated_once
from ...network.cache import LayerState, TTTCache
from ...network.model import Block, has_dropout, through_block
from .calls import at_once, have_values, traced, worthwhile

CHUNK = 512  # tokens, of which MLX may keep everything: that is faster

_CALL = Block.__call__  # `grad_checkpoint` of mlx-lm replaces it


@through_block.register
def block(block: Block, x: mx.array, state: LayerState, scale: mx.array | None = None) -> mx.array:
    T, to_be_small = x.shape[1], type(block).__call__ is not _CALL
    if scale is not None or state.seen is not None:
        return NotImplemented
    if (T <= CHUNK and not to_be_small) or not worthwhile(T) or type(state) is not TTTCache or has_dropout(block):
        return NotImplemented
    if not have_values(x):
        return NotImplemented
    parameters = dict(tree_flatten(block.parameters()))
    learned = {name: p for name, p in parameters.items() if traced(p)}
    before = state.leaves
    if not (learned or traced([x, *before])) or not _in_float32([x, *before, *learned.values()]):
        return NotImplemented
    node = _Node(block, state, list(learned), CHUNK if to_be_small else T)
    arrays = [x, *before, *learned.values()]
    dtypes = [mx.float32] * (1 + len(before))
    y, *state.leaves = at_once(node.compute, node.operations, *arrays, dtypes=dtypes, backward=node.backward)
    state.advance(T)
    return y


class _Node:
    """The block as a function of x, the arrays of the state before it, and the parameters that learn.

    Args:
        size: how many tokens are differentiated at a time. Fewer take less memory.
    """

    def __init__(self, block: Block, state: TTTCache, learned: list[str], size: int):
        self._block, self._learned, self._size = block, learned, size
        self._start, self._leaves = state.copy(), len(state.leaves)
        self._states: list[list[np.ndarray]] = []  # before each part of the tokens

    def operations(self, *arrays: mx.array) -> list[mx.array]:
        """y, and the arrays of the state after it."""
        return self._through(0, *arrays)

    def compute(self, x: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
        """The same at once."""
        state, weights = list(arrays[: self._leaves]), list(map(mx.array, arrays[self._leaves :]))
        outputs, self._states = [], []
        for a in self._parts(x):
            self._states.append(state)
            y, *state = _values(self._through(a, *map(mx.array, [x[:, a : a + self._size], *state]), *weights))
            outputs.append(y)
        return [np.concatenate(outputs, axis=1), *state]

    def backward(self, x: np.ndarray, *both: np.ndarray) -> list[np.ndarray]:
        """The cotangents of all arrays, from the last part of the tokens to the first."""
        n, m = self._leaves, len(self._learned)
        weights, dy, dstate = list(map(mx.array, both[n : n + m])), both[n + m], list(both[n + m + 1 :])
        dx, dweights = np.empty_like(x), [np.zeros(w.shape, np.float32) for w in weights]
        for a, state in reversed(list(zip(self._parts(x), self._states, strict=True))):
            part = slice(a, a + self._size)
            arrays = [*map(mx.array, [x[:, part], *state]), *weights]
            run = partial(self._through, a)
            with differentiated_once():
                found = _values(mx.vjp(run, arrays, list(map(mx.array, [dy[:, part], *dstate])))[1])
            dx[:, part], dstate = found[0], found[1 : 1 + n]
            dweights = [total + dw for total, dw in zip(dweights, found[1 + n :], strict=True)]
        return [dx, *dstate, *dweights]

    def _parts(self, x: np.ndarray) -> range:
        return range(0, x.shape[1], self._size)

    def _through(self, read: int, x: mx.array, *arrays: mx.array) -> list[mx.array]:
        """y of the tokens x behind so many that have been read, and the arrays of the state after them."""
        state, n = self._start.copy(), self._leaves
        state.advance(read)
        state.leaves = arrays[:n]
        own = self._block.parameters()
        self._block.update(tree_unflatten(list(zip(self._learned, arrays[n:], strict=True))))
        try:
            y = through_block.in_mlx(self._block, x, state)
        finally:
            self._block.update(own)
        return [y, *state.leaves]


def _in_float32(arrays: list[mx.array]) -> bool:
    """Whether all are float32. MLX is slow with others on a CPU in any case."""
    return {x.dtype for x in arrays} <= {mx.float32}


def _values(arrays: list[mx.array]) -> list[np.ndarray]:
    mx.eval(arrays)
    return [np.array(x) for x in arrays]
