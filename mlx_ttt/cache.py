"""The state of one TTT layer: everything it remembers of the text, constant in size however long the text is."""

from __future__ import annotations

import mlx.core as mx


class TTTCache:
    """The state of one layer, as an mlx-lm prompt cache.

    Attributes:
        offset: tokens read so far, one integer per sequence. Known to the host, so that nothing is read back from
            the device to decide what to run.
        weights: of the inner model at the start of the open mini-batch, (W1, b1[, W2, b2]), float32, [B, H, ·, ·].
        rows: the open mini-batch, [B, H, K, R], float32; zero where not yet written.
        history: the last conv_kernel - 1 inputs of the causal convolutions by name, [B, conv_kernel - 1, C]; none
            before the first token.

    A cache starts with one sequence. Calling the model with a batch of B continues it B ways.
    """

    def __init__(self, weights: tuple[mx.array, ...], rows: mx.array):
        self.offset = [0] * rows.shape[0]
        self.weights = weights
        self.rows = rows
        self.history: dict[str, mx.array] = {}

    @property
    def mini_batch_size(self) -> int:
        return self.rows.shape[2]

    @property
    def phase(self) -> list[int]:
        """Tokens in the open mini-batch, one integer per sequence."""
        return [n % self.mini_batch_size for n in self.offset]

    def expand(self, batch_size: int) -> None:
        """Continue a single sequence `batch_size` ways.

        Raises:
            ValueError: the cache holds another number of sequences.
        """
        if len(self.offset) == batch_size:
            return
        if len(self.offset) != 1:
            raise ValueError(f"the cache holds {len(self.offset)} sequences, the call has {batch_size}")
        self.offset = self.offset * batch_size

        def repeat(x):
            return mx.repeat(x, batch_size, axis=0)

        self.weights = tuple(repeat(w) for w in self.weights)
        self.rows = repeat(self.rows)
        self.history = {name: repeat(x) for name, x in self.history.items()}

    def advance(self, n: int) -> None:
        """Count n more tokens as read, in every sequence."""
        self.offset = [offset + n for offset in self.offset]

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

    @classmethod
    def from_state(cls, state: dict) -> TTTCache:
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def copy(self) -> TTTCache:
        """The same state, to be continued on its own. Costs nothing: arrays are shared until written."""
        return TTTCache.from_state(self.state)

    def is_trimmable(self) -> bool:
        return False

    def size(self) -> int:
        return max(self.offset)

    def empty(self) -> bool:
        return not any(self.offset)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.weights, self.rows, *self.history.values()))
