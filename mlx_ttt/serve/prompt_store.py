"""The states of texts that were read or written before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ..network.cache import TTTCache

_Text = tuple[float, bytes]  # the learning scale, and the tokens as int32


class PromptStore:
    """Finds the longest text with which a prompt begins. The texts used least recently are forgotten.

    What a model has learned depends on the learning scale, so texts read with another one are other texts.
    """

    def __init__(self, texts: int, nbytes: int):
        """
        Args:
            texts, nbytes: how many texts are kept, and how large their states may be together.
        """
        self._texts, self._most_bytes = texts, nbytes
        self._states: OrderedDict[_Text, list[TTTCache]] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def find(self, learning: float, tokens: Sequence[int]) -> tuple[list[TTTCache] | None, int]:
        """A state to go on from, and how many of the tokens it has read; at most all."""
        scale, asked = _text(learning, tokens)
        begins = [key for key in self._states if key[0] == scale and asked.startswith(key[1])]
        if not begins:
            return None, 0
        longest = max(begins, key=lambda key: len(key[1]))
        self._states.move_to_end(longest)
        return [c.copy() for c in self._states[longest]], len(longest[1]) // 4

    def keep(self, learning: float, tokens: Sequence[int], cache: list[TTTCache]) -> None:
        """Keep the state that has read exactly these tokens."""
        key = _text(learning, tokens)
        if not key[1]:
            return
        self._forget(key)
        self._states[key] = [c.copy() for c in cache]
        self.nbytes += _size(cache)
        while self._states and (len(self._states) > self._texts or self.nbytes > self._most_bytes):
            self._forget(next(iter(self._states)))

    def _forget(self, key: _Text) -> None:
        if (cache := self._states.pop(key, None)) is not None:
            self.nbytes -= _size(cache)


def _text(learning: float, tokens: Sequence[int]) -> _Text:
    return learning, np.array(tokens, np.int32).tobytes()


def _size(cache: Sequence[TTTCache]) -> int:
    return sum(c.nbytes for c in cache)
