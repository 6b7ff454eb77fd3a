"""A state from which the last tokens can be taken back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from .cache import TTTCache
from .dual import update
from .rule import Learner, Signals, State, Tokens


class RewindableTTTCache(TTTCache):
    """A state from which the last tokens can be taken back, exactly: for speculative decoding.

    It also keeps the mini-batch before the open one as it stood before its last token, and K more inputs of the
    convolutions. That is about twice the memory.

    Attributes:
        reach: how many tokens `trim` can take back, one integer per sequence. It grows by the tokens read, up to K, and
            shrinks by those taken back.
        arrays: as in TTTCache, and
            previous: weights and rows before the token that completed the last mini-batch. They mean nothing where that
            token is out of reach, and are not used there.
    """

    _counts = (*TTTCache._counts, "reach")

    def __init__(self, cache: TTTCache):
        """From a plain cache, whose tokens are out of reach."""
        vars(self).update(vars(cache.copy()))
        K = cache.mini_batch_size
        history = {name: mx.pad(x, [(0, 0), (K, 0), (0, 0)]) for name, x in cache.history.items()}
        self.arrays = {**cache.arrays, "history": history, "previous": _inner_state(cache.arrays)}
        self.reach = [0] * len(self.offset)

    def plain(self) -> TTTCache:
        """The same state without what is kept to rewind it."""
        K = self.mini_batch_size
        cache = TTTCache(self.weights, self.rows)
        history = {name: mx.contiguous(x[:, K:]) for name, x in self.history.items()}
        cache.arrays = {**cache.arrays, "history": history}
        for name in TTTCache._counts:
            setattr(cache, name, list(getattr(self, name)))
        return cache

    def _update(self, tokens: Tokens, learner: Learner) -> tuple[mx.array, Signals | None]:
        K, T, lengths = self.mini_batch_size, tokens.q.shape[1], tokens.counts
        # Tokens of each sequence before the one that completes a mini-batch for the last time; negative: none does.
        before = [(p + n) // K * K - p - 1 for p, n in zip(self.phase, lengths, strict=True)]
        commits = [n >= 0 for n in before]
        if not any(commits):
            y, signals = super()._update(tokens, learner)
        else:
            cut = min(n for n in before if n >= 0)  # where the first of them stands before that token
            y_head, head = super()._update(tokens.part(0, cut, [min(n, cut) for n in lengths]), learner)
            self._remember(tokens.part(cut, T, [max(n - cut, 0) for n in before]), learner, commits)
            y_tail, tail = super()._update(tokens.part(cut, T, [max(n - cut, 0) for n in lengths]), learner)
            y = mx.concatenate([y_head, y_tail], axis=1)
            signals = Signals.joined([head, tail]) if head is not None and tail is not None else None
        self.reach = [min(reach + n, K) for reach, n in zip(self.reach, lengths, strict=True)]
        return y, signals

    def _remember(self, tokens: Tokens, learner: Learner, mask: list[bool]) -> None:
        """Keep the state that follows these tokens, of the sequences in the mask."""
        state = State(self.weights, self.rows, self.phase)
        if any(tokens.counts):
            _, state = update(tokens, learner, state)
        previous = _select(mask, {"weights": state.weights, "rows": state.rows}, self.arrays["previous"])
        self.arrays = {**self.arrays, "previous": previous}
        if not all(mask):
            mx.async_eval(previous)  # or what it is made of would add up until somebody asks for it

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
        state = _select(across, self.arrays["previous"], _inner_state(self.arrays))
        self.offset = [offset - n for offset in self.offset]
        read = mx.arange(self.mini_batch_size) < mx.array(self.phase)[:, None]  # [B, K]
        self.arrays = {
            **self.arrays,
            "weights": state["weights"],
            "rows": mx.where(read[:, None, :, None], state["rows"], 0),
            "history": {name: mx.pad(x, [(0, 0), (n, 0), (0, 0)])[:, : x.shape[1]] for name, x in self.history.items()},
        }
        self.reach = [reach - n for reach in self.reach]
        return n

    def is_trimmable(self) -> bool:
        return True

    @property
    def state(self) -> dict[str, Any]:
        return {**super().state, "reach": list(self.reach)}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        TTTCache.state.fset(self, state)  # type: ignore[attr-defined]
        previous = {"weights": tuple(state["previous"]["weights"]), "rows": state["previous"]["rows"]}
        self.arrays = {**self.arrays, "previous": previous}
        self.reach = list(state["reach"])


def _inner_state(arrays: dict[str, Any]) -> dict[str, Any]:
    """The inner model's part of a state."""
    return {"weights": arrays["weights"], "rows": arrays["rows"]}


def _select(mask: list[bool], new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """`new` for the sequences in the mask, `old` for the others."""
    if all(mask):
        return new
    if not any(mask):
        return old
    return tree_map(lambda a, b: mx.where(mx.array(mask)[:, None, None, None], a, b), new, old)
