"""Reading a text through the functions of an exported model, as an app does, whatever runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .functions import IDS, LEARNING, LOGITS, SIGNALS


class Functions(Protocol):
    """`decode` and `prefill` together with the state of one text.

    Attributes:
        state: [layers, H, R, D]; may be set.
    """

    state: np.ndarray

    def predict(self, function: str, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The outputs of one call by name; the state goes on."""


class Session:
    """One text. Whole blocks and the tail of a prompt go through `prefill`, single tokens through `decode`.

    Args:
        functions: with the state before the first token.
        mini_batch_size: K.
        block: how many tokens `prefill` reads.
        learning: the learning scale, [layers, H], if the functions take one.

    Attributes:
        offset: tokens read so far.
        learning: the learning scale of the tokens to come; None: the functions take none.
        signals: of the tokens of the last call, [layers, H, n] each, if the functions give them.
    """

    def __init__(self, functions: Functions, mini_batch_size: int, block: int, learning: np.ndarray | None = None):
        self._functions, self.mini_batch_size, self.block, self.offset = functions, mini_batch_size, block, 0
        self.learning = learning
        self.signals: dict[str, np.ndarray] = {}

    def feed(self, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Read tokens.

        Yields:
            For each call the number of tokens read after it and its logits, [1, V] or, if the functions give those of
            all tokens, [n, V].
        """
        rest = np.asarray(ids, np.int32)
        while len(rest):
            phase = self.offset % self.mini_batch_size
            n = min(self.block, len(rest)) if phase == 0 and len(rest) > 1 else 1
            if n == 1:
                outputs = self._call("decode", rest[None, :1], position=phase)
            else:
                outputs = self._call("prefill", np.pad(rest[:n], (0, self.block - n))[None], length=n)
            self.signals = {name: np.asarray(outputs[name])[..., :n] for name in SIGNALS if name in outputs}
            self.offset += n
            rest = rest[n:]
            yield self.offset, np.asarray(outputs[LOGITS], np.float32)[0, :n]

    def _call(self, function: str, ids: np.ndarray, **place: int) -> Mapping[str, np.ndarray]:
        inputs = {IDS: ids} | {name: np.array([n], np.int32) for name, n in place.items()}
        if self.learning is not None:
            inputs[LEARNING] = self.learning.astype(np.float32)
        return self._functions.predict(function, inputs)

    @property
    def state(self) -> np.ndarray:
        """[layers, H, R, D], a copy in float32."""
        return np.array(self._functions.state, np.float32)

    def restore(self, state: np.ndarray, offset: int) -> None:
        """Go on from a state that was saved after `offset` tokens."""
        self._functions.state, self.offset = state.astype(np.float16), offset


@dataclass(frozen=True)
class Runner:
    """Something that can run a package.

    Attributes:
        name: what it is.
        open_session: starts a text; an exception says that it refuses the package.
        devices: the number of operations by the device that runs them, by function; empty where that is not known.
        is_second: whether it is another opinion, which alone does not make a package good.
    """

    name: str
    open_session: Callable[[], Session]
    devices: Callable[[], dict[str, dict[str, int]]]
    is_second: bool = False
