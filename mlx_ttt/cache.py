"""The state of one TTT layer: everything it remembers of the text, constant in size however long the text is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx.utils import tree_map, tree_reduce

_DEFERRED = ("weights", "rows", "history")

UpdateRule = Callable[..., tuple[mx.array, tuple[mx.array, ...], mx.array]]  # see update/__init__.py


class LayerState:
    """What the layers remember of a text beside the inner model's weights and rows: the convolutions' inputs.

    Attributes:
        history: the last conv_kernel - 1 inputs of the causal convolutions by name, [B, conv_kernel - 1, C].
    """

    history: dict[str, mx.array]

    def lengths(self, T: int) -> list[int]:
        """How many of the next T tokens count, one integer per sequence."""
        raise NotImplementedError

    def with_history(self, name: str, x: mx.array, n: int) -> mx.array:
        """x [B, T, C] behind the n inputs before it, [B, n + T, C]; remembers the last ones for the next call."""
        if n == 0:
            return x
        history = self.history[name].astype(x.dtype)
        inputs = mx.concatenate([history, x], axis=1)
        self.history[name] = _window(inputs, self.lengths(x.shape[1]), history.shape[1])
        return inputs[:, history.shape[1] - n :]


class TTTCache(LayerState):
    """The state of one layer, as an mlx-lm prompt cache.

    Attributes:
        offset: tokens read so far, one integer per sequence. Known to the host, so that nothing is read back from
            the device to decide what to run.
        weights: of the inner model at the start of the open mini-batch, (W1, b1[, W2, b2]), float32, [B, H, ·, ·].
        rows: the open mini-batch, [B, H, K, R], float32; zero where not yet written.
        history: see :class:`LayerState`.

    A cache starts with one sequence. Calling the model with a batch of B continues it B ways. Sequences join and
    leave by mlx-lm's batch protocol: `merge`, `extend`, `filter`, `extract`. `prepare` announces padding, which changes
    nothing in the state.
    """

    _make: Callable[[], dict] | None = None

    def __init__(self, weights: tuple[mx.array, ...], rows: mx.array):
        self.offset = [0] * rows.shape[0]
        self.weights = weights
        self.rows = rows
        self.history: dict[str, mx.array] = {}
        self.finalize()

    def add_history(self, name: str, n: int, channels: int) -> None:
        """Remember the last n inputs of a convolution, zero before the first token."""
        if n:
            self.history[name] = mx.zeros((len(self.offset), n, channels))

    @property
    def mini_batch_size(self) -> int:
        return self.rows.shape[2]

    @property
    def phase(self) -> list[int]:
        """Tokens in the open mini-batch, one integer per sequence."""
        return [n % self.mini_batch_size for n in self.offset]

    # Reading

    def update(self, rule: UpdateRule, tokens: tuple[mx.array, ...], constants: tuple[mx.array, ...]) -> mx.array:
        """Read T tokens, less the padding among them.

        Args:
            rule: `ttt_linear` or `ttt_mlp`.
            tokens: q, k, v [B, T, H, D] and lr [B, T, H], padding behind the tokens that count.
            constants: t, gamma, beta.

        Returns:
            y [B, T, H, D].
        """
        T = tokens[0].shape[1]
        y = self._read(rule, tokens, constants, self.lengths(T))
        self._pass(T)
        return y

    def _read(self, rule, tokens, constants, lengths: list[int]) -> mx.array:
        """Read so many of the tokens of each sequence."""
        y, self.weights, self.rows = rule(*tokens, *constants, self.weights, self.rows, self.phase, lengths)
        self.offset = [offset + n for offset, n in zip(self.offset, lengths, strict=True)]
        return y

    def _pass(self, T: int) -> None:
        """So many tokens are read, padding or not."""
        self._start = [max(start - T, 0) for start in self._start]
        self._stop = [stop - T for stop in self._stop]

    def advance(self) -> None:
        """One token of each sequence has been read, by other means than `update`."""
        self.offset = [offset + 1 for offset in self.offset]
        self._pass(1)

    def defer(self, make: Callable[[], dict]) -> None:
        """Let the weights, rows and history be what `make` returns by these names, when one of them is asked for."""
        for name in _DEFERRED:
            vars(self).pop(name, None)
        self._make = make

    def defers(self, make: Callable[[], dict]) -> bool:
        """Whether they still are: none has been asked for, or replaced."""
        return self._make == make and vars(self).keys().isdisjoint(_DEFERRED)

    def __getattr__(self, name: str):
        if name not in _DEFERRED or (make := vars(self).get("_make")) is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        vars(self).update(make() | vars(self))
        self._make = None
        return vars(self)[name]

    def __getstate__(self) -> dict:
        """For pickle and deepcopy."""
        return {**vars(self), **self._arrays, "_make": None}

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
        self._start: list[int] = [0] * len(self.offset)
        self._stop: list[float] = [math.inf] * len(self.offset)

    def left_padding(self, T: int) -> list[int]:
        """How many of the next T tokens are padding in front, one integer per sequence."""
        return [min(start, T) for start in self._start]

    def lengths(self, T: int) -> list[int]:
        """How many of the next T tokens count, one integer per sequence."""
        return [max(min(stop, T) - min(start, T), 0) for start, stop in zip(self._start, self._stop, strict=True)]

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
        indices = mx.array(batch_indices, mx.int32)
        self._arrays = tree_map(lambda x: x[indices], self._arrays)
        for name in self._counts:
            counts = getattr(self, name)
            setattr(self, name, [counts[i] for i in batch_indices])

    def extract(self, index: int) -> TTTCache:
        """One sequence as a cache of its own."""
        alone = self.copy()
        alone.filter([index])
        mx.async_eval(alone._arrays)  # or it would keep those of all sequences alive until it is asked for
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
        merged._arrays = tree_map(lambda *x: mx.concatenate(x), *(c._arrays for c in caches))
        for name in cls._counts:
            setattr(merged, name, [n for c in caches for n in getattr(c, name)])
        return merged

    def extend(self, other: TTTCache) -> None:
        """Take in the sequences of another cache."""
        vars(self).update(vars(self.merge([self, other])))

    _counts: tuple[str, ...] = ("offset", "_start", "_stop")  # attributes with a number for each sequence

    def _take_counts(self, other: TTTCache) -> None:
        for name in TTTCache._counts:
            setattr(self, name, list(getattr(other, name)))

    @property
    def _arrays(self) -> dict:
        """What has a first axis of sequences."""
        return {"weights": self.weights, "rows": self.rows, "history": self.history}

    @_arrays.setter
    def _arrays(self, arrays: dict) -> None:
        self.weights, self.rows, self.history = arrays["weights"], arrays["rows"], arrays["history"]

    # What mlx-lm asks of every cache

    @property
    def state(self) -> dict:
        return {
            "offset": list(self.offset),
            "weights": list(self.weights),
            "rows": self.rows,
            "history": dict(self.history),
        }

    @state.setter
    def state(self, state: dict) -> None:
        self.offset = list(state["offset"])
        self.weights = tuple(state["weights"])
        self.rows = state["rows"]
        self.history = dict(state.get("history", {}))  # an empty dict does not survive a file
        self.finalize()

    @classmethod
    def from_state(cls, state: dict) -> TTTCache:
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def copy(self) -> TTTCache:
        """The same state, to be continued on its own. Costs nothing: arrays are shared until written."""
        return copy.copy(self)

    def __copy__(self) -> TTTCache:
        history = dict(self.history)  # the one attribute that is changed rather than replaced
        other = type(self).__new__(type(self))
        vars(other).update(vars(self), history=history)
        return other

    def is_trimmable(self) -> bool:
        return False

    def size(self) -> int:
        return max(self.offset)

    def empty(self) -> bool:
        return not any(self.offset)

    @property
    def nbytes(self) -> int:
        return tree_reduce(lambda total, x: total + x.nbytes, self._arrays, 0)


def _window(x: mx.array, start: Sequence[int], n: int) -> mx.array:
    """x[b, start_b : start_b + n] of each sequence b, [B, n, C]; a copy, since a view would keep all of x alive."""
    if len(set(start)) == 1:
        return mx.contiguous(x[:, start[0] : start[0] + n])
    indices = mx.array(start)[:, None] + mx.arange(n)  # [B, n]
    return mx.take_along_axis(x, indices[..., None], axis=1)


class RewindableTTTCache(TTTCache):
    """A state from which the last tokens can be taken back, exactly: for speculative decoding.

    It also keeps the mini-batch before the open one as it stood before its last token, and K more inputs of the
    convolutions: about twice the memory.

    Attributes:
        reach: how many tokens `trim` can take back, one integer per sequence. It grows by the tokens read, up to K, and
            shrinks by those taken back.
        previous: weights and rows before the token that completed the last mini-batch; of no use, but never asked for,
            where that token is out of reach.
    """

    _counts = (*TTTCache._counts, "reach")

    def __init__(self, cache: TTTCache):
        """From a plain cache, whose tokens are out of reach."""
        super().__init__(cache.weights, cache.rows)
        self._take_counts(cache)
        K = cache.mini_batch_size
        self.history = {name: mx.pad(x, ((0, 0), (K, 0), (0, 0))) for name, x in cache.history.items()}
        self.previous = {"weights": self.weights, "rows": self.rows}
        self.reach = [0] * len(self.offset)

    def plain(self) -> TTTCache:
        """The same state without what is kept to rewind it."""
        K = self.mini_batch_size
        cache = TTTCache(self.weights, self.rows)
        cache.history = {name: mx.contiguous(x[:, K:]) for name, x in self.history.items()}
        cache._take_counts(self)
        return cache

    def _read(self, rule, tokens, constants, lengths):
        K = self.mini_batch_size
        # Tokens of each sequence before the one that completes a mini-batch for the last time.
        before = [(p + n) // K * K - p - 1 for p, n in zip(self.phase, lengths, strict=True)]
        commits = [n >= 0 for n in before]
        if not any(commits):
            y = super()._read(rule, tokens, constants, lengths)
        else:
            cut = min(n for n in before if n >= 0)  # where the first of them stands before that token
            head, tail = ([x[:, part] for x in tokens] for part in (slice(cut), slice(cut, None)))
            y_head = super()._read(rule, head, constants, [min(n, cut) for n in lengths])
            self._remember(rule, tail, constants, [max(n - cut, 0) for n in before], commits)
            y_tail = super()._read(rule, tail, constants, [max(n - cut, 0) for n in lengths])
            y = mx.concatenate([y_head, y_tail], axis=1)
        self.reach = [min(reach + n, K) for reach, n in zip(self.reach, lengths, strict=True)]
        return y

    def _remember(self, rule, tokens, constants, lengths, mask) -> None:
        """Keep the state that follows so many more tokens, of the sequences in the mask."""
        weights, rows = self.weights, self.rows
        if any(lengths):
            _, weights, rows = rule(*tokens, *constants, weights, rows, self.phase, lengths)
        self.previous = _select(mask, {"weights": weights, "rows": rows}, self.previous)
        if not all(mask):
            mx.async_eval(self.previous)  # or what it is made of would add up until it is asked for

    def trim(self, n: int) -> int:
        """Take back the last n tokens of every sequence, exactly. Not while padding is announced.

        Returns:
            n.

        Raises:
            ValueError: n is out of reach; nothing has been taken back then.
        """
        if not 0 <= n <= min(self.reach):
            raise ValueError(f"cannot take back {n} tokens: within reach are {min(self.reach)}")
        across = [n > p for p in self.phase]  # into the mini-batch before
        state = _select(across, self.previous, {"weights": self.weights, "rows": self.rows})
        self.offset = [offset - n for offset in self.offset]
        read = mx.arange(self.mini_batch_size) < mx.array(self.phase)[:, None]  # [B, K]
        self.weights = state["weights"]
        self.rows = mx.where(read[:, None, :, None], state["rows"], 0)
        self.history = {name: mx.pad(x, ((0, 0), (n, 0), (0, 0)))[:, : x.shape[1]] for name, x in self.history.items()}
        self.reach = [reach - n for reach in self.reach]
        return n

    def is_trimmable(self) -> bool:
        return True

    @property
    def _arrays(self) -> dict:
        return {**super()._arrays, "previous": self.previous}

    @_arrays.setter
    def _arrays(self, arrays: dict) -> None:
        TTTCache._arrays.fset(self, arrays)
        self.previous = arrays["previous"]

    @property
    def state(self) -> dict:
        return {**super().state, "previous": self.previous, "reach": list(self.reach)}

    @state.setter
    def state(self, state: dict) -> None:
        TTTCache.state.fset(self, state)
        self.previous = {"weights": tuple(state["previous"]["weights"]), "rows": state["previous"]["rows"]}
        self.reach = list(state["reach"])


def _select(mask: list[bool], new: dict, old: dict) -> dict:
    """`new` for the sequences in the mask, `old` for the others."""
    if all(mask):
        return new
    if not any(mask):
        return old
    return tree_map(lambda a, b: mx.where(mx.array(mask)[:, None, None, None], a, b), new, old)
