"""The state of one TTT layer: everything it remembers of the text, constant in size however long the text is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_reduce, tree_unflatten

from .dual import observe, update
from .rule import Learner, Signals, State, Tokens


class LayerState:
    """What a layer reads and writes of its state while tokens go through it.

    Attributes:
        arrays: by name
            weights: of the inner model at the start of the open mini-batch, (W1, b1[, W2, b2]), float32, [B, H, ., .];
            rows: the open mini-batch, [B, H, K, R], float32, zero where not yet written;
            history: the last conv_kernel - 1 inputs of the causal convolutions by name, [B, conv_kernel - 1, C].
        phase: tokens in the open mini-batch, one integer per sequence, or an array [B] that only the device knows.
        seen: what the learner does with the tokens that it reads, one for each call of the update rule. None: nobody
            looks, and it is not computed.
    """

    seen: list[Signals] | None = None

    def __init__(self, phase: Sequence[int] | mx.array, arrays: dict[str, Any]):
        self.phase = phase
        self.arrays = arrays

    @property
    def leaves(self) -> list[mx.array]:
        """All the arrays, in an order of their own: what a transformation differentiates."""
        return list(dict(tree_flatten(self.arrays)).values())

    @leaves.setter
    def leaves(self, leaves: Sequence[mx.array]) -> None:
        tree = tree_unflatten(list(zip(dict(tree_flatten(self.arrays)), leaves, strict=True)))
        self.arrays = {**tree, "weights": tuple(tree["weights"]), "history": tree.get("history", {})}

    def lengths(self, T: int) -> list[int] | None:
        """How many of the next T tokens count, one integer per sequence; None: all."""
        return None

    def with_history(self, name: str, x: mx.array, n: int) -> mx.array:
        """x [B, T, C] behind the n inputs before it, [B, n + T, C]. Remembers the last ones for the next call."""
        if n == 0:
            return x
        B, T, _ = x.shape
        history = self.arrays["history"][name].astype(x.dtype)
        inputs = mx.concatenate([history, x], axis=1)
        kept = _window(inputs, self.lengths(T) or [T] * B, history.shape[1])
        self.arrays = {**self.arrays, "history": {**self.arrays["history"], name: kept}}
        return inputs[:, history.shape[1] - n :]

    def update(self, tokens: Tokens, learner: Learner) -> mx.array:
        """Have the learner read T tokens. Returns y [B, T, H, D]."""
        y, signals = self._update(tokens, learner)
        if self.seen is not None and signals is not None:
            self.seen.append(signals)
        return y

    def _update(self, tokens: Tokens, learner: Learner) -> tuple[mx.array, Signals | None]:
        state, signals = State(self.arrays["weights"], self.arrays["rows"], self.phase), None
        if self.seen is None:
            y, state = update(tokens, learner, state)
        else:
            y, state, signals = observe(tokens, learner, state)
        self.arrays = {**self.arrays, "weights": state.weights, "rows": state.rows}
        return y, signals


class Keeper(Protocol):
    """A backend's own form of a layer's state."""

    def arrays(self) -> dict[str, Any]:
        """The state as `LayerState.arrays`."""


class TTTCache(LayerState):
    """The state of one layer, as an mlx-lm prompt cache.

    Attributes:
        offset: tokens read so far, one integer per sequence. The host knows them, so nothing is read back from the
            device to decide what to run.

    A cache starts with one sequence. Calling the model with a batch of B continues it B ways. Sequences join and leave
    by mlx-lm's batch protocol: `merge`, `extend`, `filter`, `extract`. `prepare` announces padding, which changes
    nothing in the state.
    """

    _counts: tuple[str, ...] = ("offset", "_start", "_stop")  # attributes with a number for each sequence
    _start: list[int]  # how much of the next tokens is padding in front
    _stop: list[float]  # where in the next tokens the text ends
    _arrays: dict[str, Any]
    _keeper: Keeper | None

    def __init__(self, weights: tuple[mx.array, ...], rows: mx.array):
        self.offset = [0] * rows.shape[0]
        self.arrays = {"weights": weights, "rows": rows, "history": {}}
        self.finalize()

    def add_history(self, name: str, n: int, channels: int) -> None:
        """Remember the last n inputs of a convolution, zero before the first token."""
        if n:
            history = {**self.history, name: mx.zeros((len(self.offset), n, channels))}
            self.arrays = {**self.arrays, "history": history}

    # The arrays, which a backend may borrow

    @property
    def arrays(self) -> dict[str, Any]:
        """See :class:`LayerState`. Takes back what a backend keeps."""
        if self._keeper is not None:
            self.arrays = self._keeper.arrays()
        return self._arrays

    @arrays.setter
    def arrays(self, arrays: dict[str, Any]) -> None:
        self._arrays, self._keeper = arrays, None

    def lend(self, keeper: Keeper) -> None:
        """Let a backend keep the state in its own form until somebody asks for the arrays."""
        self._arrays, self._keeper = {}, keeper

    def lent_to(self, keeper: Keeper) -> bool:
        """Whether this backend still has it: nobody has asked for the arrays or replaced them."""
        return self._keeper is keeper

    @property
    def weights(self) -> tuple[mx.array, ...]:
        return self.arrays["weights"]

    @property
    def rows(self) -> mx.array:
        return self.arrays["rows"]

    @property
    def history(self) -> dict[str, mx.array]:
        return self.arrays["history"]

    @property
    def mini_batch_size(self) -> int:
        """K"""
        return self.rows.shape[2]

    @property
    def phase(self) -> list[int]:  # type: ignore[override]
        """Tokens in the open mini-batch, one integer per sequence."""
        return [n % self.mini_batch_size for n in self.offset]

    # Reading

    def update(self, tokens: Tokens, learner: Learner) -> mx.array:
        """Have the learner read T tokens, less the padding among them, which stands behind the tokens that count."""
        T = tokens.q.shape[1]
        y = super().update(replace(tokens, lengths=self.lengths(T)), learner)
        if self.seen:
            self.seen[-1] = Signals(*(turned(x, self.left_padding(T)) for x in self.seen[-1]))
        self._pass(T)
        return y

    def _update(self, tokens: Tokens, learner: Learner) -> tuple[mx.array, Signals | None]:
        y, signals = super()._update(tokens, learner)
        self.offset = [offset + n for offset, n in zip(self.offset, tokens.counts, strict=True)]
        return y, signals

    def _pass(self, T: int) -> None:
        """So many tokens are read, padding or not."""
        self._start = [max(start - T, 0) for start in self._start]
        self._stop = [stop - T for stop in self._stop]

    def advance(self, T: int = 1, signals: Signals | None = None) -> None:
        """The next T tokens have been read by a backend, which says what the learner did if somebody looks."""
        if self.seen is not None and signals is not None:
            self.seen.append(signals)
        self.offset = [offset + n for offset, n in zip(self.offset, self.lengths(T), strict=True)]
        self._pass(T)

    # Padding

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce what is padding among the next tokens, in however many calls they come.

        Args:
            left_padding: how many tokens to pass over first, per sequence.
            lengths: where each sequence ends, counted from the first of the next tokens; what comes after is padding.
            right_padding: how much padding comes after; told by `lengths` already.

        Raises:
            ValueError: there is right padding, but no lengths; or they are for another number of sequences.
        """
        for counts in (left_padding, lengths):
            if counts is not None:
                self.expand(len(counts))
        if left_padding is not None:
            self._start = list(left_padding)
        if lengths is not None:
            self._stop = list(lengths)
        elif right_padding is not None and any(right_padding):
            raise ValueError("right_padding alone does not say where sequences end: give lengths")

    def finalize(self) -> None:
        """There is no more padding."""
        self._start = [0] * len(self.offset)
        self._stop = [math.inf] * len(self.offset)

    def left_padding(self, T: int) -> list[int]:
        """How many of the next T tokens are padding in front, one integer per sequence."""
        return [min(start, T) for start in self._start]

    def lengths(self, T: int) -> list[int]:
        """How many of the next T tokens count, one integer per sequence."""
        return [int(max(min(stop, T) - min(start, T), 0)) for start, stop in zip(self._start, self._stop, strict=True)]

    # Sequences that join and leave

    def expand(self, batch_size: int) -> None:
        """Continue a single sequence `batch_size` ways.

        Raises:
            ValueError: the cache holds another number of sequences.
        """
        if len(self.offset) == batch_size:
            return
        if len(self.offset) != 1:
            raise ValueError(f"the cache holds {len(self.offset)} sequences, the call has {batch_size}")
        self.filter([0] * batch_size)

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Go on with these sequences only, in this order."""
        indices = mx.array(list(batch_indices), mx.int32)
        self.arrays = tree_map(lambda x: x[indices], self.arrays)
        for name in self._counts:
            counts = getattr(self, name)
            setattr(self, name, [counts[i] for i in batch_indices])

    def extract(self, index: int) -> TTTCache:
        """One sequence as a cache of its own."""
        alone = self.copy()
        alone.filter([index])
        mx.async_eval(alone.arrays)  # or it would keep those of all sequences alive until somebody asks for it
        return alone

    @classmethod
    def merge(cls, caches: Sequence[TTTCache]) -> TTTCache:
        """The sequences of all caches in one.

        Raises:
            ValueError: some caches are rewindable and others are not.
        """
        if any(type(c) is not cls for c in caches):
            raise ValueError("rewindable and plain caches do not go together: make all with the same `rewind`")
        merged = caches[0].copy()
        merged.arrays = tree_map(lambda *x: mx.concatenate(list(x)), *(c.arrays for c in caches))
        for name in cls._counts:
            setattr(merged, name, [n for c in caches for n in getattr(c, name)])
        return merged

    def extend(self, other: TTTCache) -> None:
        """Take in the sequences of another cache."""
        vars(self).update(vars(self.merge([self, other])))

    # What mlx-lm asks of every cache

    @property
    def state(self) -> dict[str, Any]:
        return {"offset": list(self.offset), **self.arrays}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.offset = list(state["offset"])
        history = dict(state.get("history", {}))  # an empty dict does not survive a file
        self.arrays = {"weights": tuple(state["weights"]), "rows": state["rows"], "history": history}
        self.finalize()

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TTTCache:
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def copy(self) -> TTTCache:
        """The same state, to be continued on its own. Costs nothing: arrays are shared until written."""
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copy, deepcopy and pickle: the arrays, not what a backend keeps. Lists of counts may be shared.

        Nobody looks at a copy.
        """
        return {**vars(self), "_arrays": dict(self.arrays), "_keeper": None, "seen": None}

    def is_trimmable(self) -> bool:
        return False

    def size(self) -> int:
        return max(self.offset)

    def empty(self) -> bool:
        return not any(self.offset)

    @property
    def nbytes(self) -> int:
        return tree_reduce(lambda total, x: total + x.nbytes, self.arrays, 0)


@contextmanager
def watched(cache: Sequence[LayerState]) -> Iterator[list[list[Signals]]]:
    """Have these layers keep what their learners do, in a list for each, as long as the context lasts."""
    seen: list[list[Signals]] = [[] for _ in cache]
    for c, signals in zip(cache, seen, strict=True):
        c.seen = signals
    try:
        yield seen
    finally:
        for c in cache:
            c.seen = None


def turned(x: mx.array, n: Sequence[int]) -> mx.array:
    """x [B, T, ...] with each sequence b turned by n_b places."""
    if not any(n):
        return x
    T = x.shape[1]
    places = (mx.arange(T) - mx.array(list(n))[:, None]) % T  # [B, T]
    return x[mx.arange(len(n))[:, None], places]


def _window(x: mx.array, start: Sequence[int], n: int) -> mx.array:
    """x[b, start_b : start_b + n] of each sequence b, [B, n, C]. A copy, since a view would keep all of x alive."""
    if len(set(start)) == 1:
        return mx.contiguous(x[:, start[0] : start[0] + n])
    indices = mx.array(list(start))[:, None] + mx.arange(n)  # [B, n]
    return mx.take_along_axis(x, indices[..., None], axis=1)
