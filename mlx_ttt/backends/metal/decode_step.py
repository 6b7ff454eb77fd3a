"""One token of each sequence through the network on a GPU, as one compiled function.

A GPU waits for the host to launch its operations. So the blocks of network/model.py are traced once, and MLX fuses and
replays them. Nothing in the trace depends on where the mini-batches stand: the phase is an input. Tokens that complete
some sequence's mini-batch have a trace of their own. If there are kernels for a block, block.py makes it a dozen
launches. Texts with padding go through the network as they are. So do tokens that complete a mini-batch, if kernels
are off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ...network.backend import Kept, Watch
from ...network.cache import LayerState, TTTCache, watched
from ...network.model import TTTModel, hidden_states
from ...network.rule import Signals
from . import rule
from .block import TokenState
from .side_by_side import Arrays, SideBySide


def wanted() -> bool:
    """Whether this device is one that waits for the host to launch its operations."""
    return mx.default_device() == mx.gpu


@hidden_states.register
def decode_step(
    model: TTTModel, ids: mx.array, cache: list[TTTCache] | None, scales: mx.array | None = None
) -> mx.array:
    if not wanted():
        return NotImplemented
    return DecodeStep.of(model)(model, ids, cache, scales)


class DecodeStep(Kept):
    """A model's decode step, compiled. Made again when the model has changed."""

    _watch: Watch | None = None
    _function: Callable | None = None

    def __call__(
        self, model: TTTModel, ids: mx.array, cache: Sequence[TTTCache] | None, scales: mx.array | None
    ) -> mx.array:
        if self._watch is not None and not self._watch.same():
            self.forget()  # even if this call is not a decode step: modules that were replaced need not stay in memory
        B, T = ids.shape
        if T != 1 or not cache or not _is_one_step(cache, B):
            return NotImplemented
        if _completes(cache) and not rule.available():
            return NotImplemented
        joined = SideBySide.of(model).arrays(model) if rule.available() else []
        return self._step(model, ids, cache, [] if scales is None else [scales], joined)

    def _step(
        self,
        model: TTTModel,
        ids: mx.array,
        cache: Sequence[TTTCache],
        scales: list[mx.array],
        joined: list[list[Arrays]],
    ) -> mx.array:
        """`joined` is empty where there are no kernels."""
        if self._function is None:
            self._watch = Watch(model, arrays=False)  # parameters are inputs of the trace
            self._function = mx.compile(functools.partial(_decode_step, model), inputs=[model])
        # Each has a trace of its own: with scales or not, watched or not, completing a mini-batch or not.
        is_watched, completes = all(c.seen is not None for c in cache), _completes(cache)
        phase = mx.array(cache[0].phase + [0] * (rule.SMALL - len(ids)), mx.int32)
        arrays = [c.arrays for c in cache]
        x, states, signals = self._function(ids, phase, arrays, scales, joined, is_watched, completes)
        if joined:
            SideBySide.of(model).renew()
        for i, (c, state) in enumerate(zip(cache, states, strict=True)):
            c.arrays = {**c.arrays, **state}
            c.advance(signals=Signals(*signals[i]) if is_watched else None)
        return x


def _is_one_step(cache: Sequence[TTTCache], B: int) -> bool:
    """Whether one token of each of B sequences is the same step in all layers."""
    return all(type(c) is TTTCache and c.lengths(1) == [1] * B and c.offset == cache[0].offset for c in cache)


def _completes(cache: Sequence[TTTCache]) -> bool:
    """Whether the next token completes some sequence's mini-batch."""
    return any(phase + 1 == cache[0].mini_batch_size for phase in cache[0].phase)


def _decode_step(
    model: TTTModel,
    ids: mx.array,
    phase: mx.array,
    states: list[dict[str, Any]],
    scales: list[mx.array],
    joined: list[list[Arrays]],
    *flags: bool,
) -> tuple[mx.array, list[dict[str, Any]], list[Signals]]:
    """Hidden states [B, 1, C] of token ids [B, 1], the states of all layers after them, and what the layers' learners
    did if somebody looks. The states are without the weights unless a mini-batch may be completed."""
    is_watched, completes = flags
    layers: list[LayerState] = [
        TokenState(phase, len(ids), arrays, completes, joined[i]) if joined else LayerState(phase[: len(ids)], arrays)
        for i, arrays in enumerate(states)
    ]
    with watched(layers if is_watched else []) as seen:
        x = model.through_blocks(ids, layers, *scales)
    names = ("weights", "rows", "history") if completes else ("rows", "history")
    after = [{name: layer.arrays[name] for name in names} for layer in layers]
    return x, after, [signals for (signals,) in seen]
