"""What differs between `decode` and `prefill`: how many tokens a call reads, where they stand, which of them count.

An input never serves as an index, because devices handle that badly. A mask is made of it instead: a product with a
one-hot row picks a row of a table, and a product with zero stops what must not happen yet.

Shapes: T tokens of a call, K mini-batch size, H heads, D head dimension, C = H·D. An array [1, T, C] is flat, an array
[1, H, T, D] by head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..network.args import ModelArgs
from ..network.model import Block, Model
from .numbers import Numbers
from .operations import NumberType, Value


@dataclass(frozen=True)
class Signals:
    """What one layer's learner does with each token: [1, H, T, 1], float32, zero for tokens that do not count.

    network/rule.py says what loss, lr and write_norm are.
    """

    loss: Value
    lr: Value
    write_norm: Value


class Call(ABC):
    """The tokens of one call.

    Args:
        numbers: operations and number types.
        tokens: T, one or a multiple of K.
        mini_batch_size: K.

    Attributes:
        cos, sin: RoPE's factors for each token, [1, 1, T, D]; sin of the first half of a row is negated.
        factors: by layer -t_i where j <= i, else 0, for each token i of a mini-batch in this call and row j:
            [1, 1, n, K].
        committed: by mini-batch 1 if it is complete after this call, else 0: [1, 1, 1, 1].
        open: by mini-batch 1 for each row that stays open after this call, else 0: [1, 1, K, 1] or [1, 1, 1, 1].
        phase: how many tokens the open mini-batch holds before this call, [1], int32.
        length: how many tokens of this call count, [1], int32.
        scales: by layer what the learning rates are multiplied by, [1, H, 1, 1]; None: nothing.
        seen: where each layer leaves its signals; None: it computes none.
    """

    cos: Value
    sin: Value
    factors: Sequence[Value]
    committed: Sequence[Value]
    open: Sequence[Value]
    phase: Value
    length: Value
    scales: Sequence[Value] | None = None
    seen: list[Signals] | None = None

    def __init__(self, numbers: Numbers, tokens: int, mini_batch_size: int):
        self.numbers, self.ops, self.tokens, self.mini_batch_size = numbers, numbers.ops, tokens, mini_batch_size

    def scale_learning(self, learning: Value) -> None:
        """Multiply the learning rates of each layer and head by these numbers, [layers, H], float32."""
        layers, H = self.ops.shape(learning)
        scales = self.ops.reshape(self.ops.cast(learning, self.numbers.inner), [layers, H, 1, 1])
        self.scales = self.ops.split(scales, [1] * layers, axis=0)

    def by_head(self, x: Value, head_dim: int) -> Value:
        """Flat to by head: [1, T, h·D] -> [1, h, T, D]."""
        heads = self.ops.shape(x)[2] // head_dim
        if self.tokens == 1:
            return self.ops.reshape(x, [1, heads, 1, head_dim])
        return self.ops.transpose(self.ops.reshape(x, [1, self.tokens, heads, head_dim]), [0, 2, 1, 3])

    def flat(self, x: Value) -> Value:
        """By head to flat: [1, H, T, D] -> [1, T, C]."""
        _, H, T, D = self.ops.shape(x)
        if T > 1:
            x = self.ops.transpose(x, [0, 2, 1, 3])
        return self.ops.reshape(x, [1, T, H * D])

    def mini_batches(self, x: Value) -> list[Value]:
        """x [1, H, T, ·] cut into the call's mini-batches, or the one mini-batch that it reads a part of."""
        n = min(self.tokens, self.mini_batch_size)
        return self.ops.split(x, [n] * (self.tokens // n), axis=2)

    def kept(self, rows: Sequence[Value]) -> Value:
        """The open rows after this call, zero where there are none.

        Args:
            rows: one part of the rows of each mini-batch, [1, H, K, d].

        Returns:
            [1, H, K, d]
        """
        return self.ops.total([self.ops.mul(x, is_open) for x, is_open in zip(rows, self.open, strict=True)])

    def _mask(self, relation: Callable, n: np.ndarray, place: Value, number_type: NumberType) -> Value:
        """1 where n stands in this relation to an input, else 0."""
        return self.ops.cast(relation(n.astype(np.int32), place), number_type)

    @abstractmethod
    def rows(self, new: Value, open_rows: Value) -> Value:
        """One part of all rows of a mini-batch, [1, H, K, d].

        Args:
            new: the part in the rows of this call's tokens, [1, H, n, d].
            open_rows: the part in the rows of the tokens before, as the state has it.
        """

    @abstractmethod
    def where_counted(self, x: Value) -> Value:
        """x [1, H, T, 1], zero for tokens that do not count."""

    @abstractmethod
    def history(self, padded: Value) -> Value:
        """The last inputs of a convolution that count, as many as stand before the call: [1, H, kept, D].

        Args:
            padded: the inputs before the call and those of its tokens, [1, H, kept + T, D].
        """

    @abstractmethod
    def last(self, x: Value) -> Value:
        """The last token that counts: [1, T, C] -> [1, 1, C]."""


class Decode(Call):
    """One token.

    Args:
        numbers: operations and number types.
        model: gives token factors and sizes.
        position: the phase of the open mini-batch, [1].
    """

    def __init__(self, numbers: Numbers, model: Model, position: Value):
        args, const, ops, K = model.args, numbers.inner_const, numbers.ops, model.args.mini_batch_size
        super().__init__(numbers, 1, K)
        self.phase, self.length = position, np.ones(1, np.int32)
        here_across = self._mask(ops.equal, np.arange(K).reshape(1, 1, 1, K), position, numbers.inner)
        self._here_down = self._mask(ops.equal, np.arange(K).reshape(1, 1, K, 1), position, numbers.inner)
        self.committed = [self._mask(ops.equal, np.full((1, 1, 1, 1), K - 1), position, numbers.inner)]
        self.open = [ops.sub(const(1), self.committed[0])]
        rotation = ops.matmul(here_across, const(np.concatenate(rope(args), axis=-1)))  # [1, 1, 1, 2D]
        self.cos, self.sin = ops.split(rotation, [args.head_dim] * 2, axis=-1)
        tables = np.concatenate([token_factors(block) for block in model.layers], axis=1)  # [1, layers, K, K]
        chosen = ops.matmul(here_across, const(tables))  # [1, layers, 1, K]
        self.factors = ops.split(chosen, [1] * len(model.layers), axis=1)

    def rows(self, new: Value, open_rows: Value) -> Value:
        _, H, _, width = self.ops.shape(new)
        before = self.ops.reshape(self.ops.cast(open_rows, self.numbers.inner), (1, H, self.mini_batch_size, width))
        return self.ops.add(before, self.ops.mul(self._here_down, new))

    def where_counted(self, x: Value) -> Value:
        return x

    def history(self, padded: Value) -> Value:
        _, H, length, D = self.ops.shape(padded)
        return self.ops.slice(padded, begin=[0, 0, 1, 0], size=[1, H, length - 1, D])

    def last(self, x: Value) -> Value:
        return x


class Prefill(Call):
    """A block of whole mini-batches, of which only the first tokens may count. The open mini-batch is empty before.

    Args:
        numbers: operations and number types.
        model: gives token factors and sizes.
        tokens: T, a multiple of K.
        length: how many of them count, [1].
    """

    def __init__(self, numbers: Numbers, model: Model, tokens: int, length: Value):
        args, const, ops, K = model.args, numbers.inner_const, numbers.ops, model.args.mini_batch_size
        super().__init__(numbers, tokens, K)
        self.phase, self.length = np.zeros(1, np.int32), length
        self._kept = args.conv_kernel - 1
        self._counts = counts = self._mask(ops.less, np.arange(tokens).reshape(1, 1, tokens, 1), length, numbers.inner)
        by_mini_batch = self.mini_batches(counts)  # [1, 1, K, 1] each
        self.committed = [ops.slice(x, begin=[0, 0, K - 1, 0], size=[1, 1, 1, 1]) for x in by_mini_batch]
        # A row stays open if its token counts and the last token of its mini-batch does not.
        self.open = [ops.sub(x, y) for x, y in zip(by_mini_batch, self.committed, strict=True)]
        self.cos, self.sin = (const(np.tile(x, (1, 1, tokens // K, 1))) for x in rope(args))
        self.factors = [const(token_factors(block)) for block in model.layers]

    def rows(self, new: Value, open_rows: Value) -> Value:
        return new

    def where_counted(self, x: Value) -> Value:
        return self.ops.mul(x, self.ops.cast(self._counts, self.ops.number_type(x)))

    def history(self, padded: Value) -> Value:
        return self.ops.matmul(self._history_mask, padded)

    @cached_property
    def _history_mask(self) -> Value:
        """The i-th input to keep stands at length + i: row i is one there, [1, 1, kept, kept + T]."""
        start = np.arange(self._kept + self.tokens) - np.arange(self._kept)[:, None]
        return self._mask(self.ops.equal, start[None, None], self.length, self.numbers.network)

    def last(self, x: Value) -> Value:
        end = np.arange(1, self.tokens + 1).reshape(1, 1, -1)
        return self.ops.matmul(self._mask(self.ops.equal, end, self.length, self.numbers.network), x)


def rope(args: ModelArgs) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin by position and feature, [1, 1, K, D], for rows in the order of `halves_first`.

    x cos + (x with its halves swapped) sin turns each pair; so sin is negated in the first half.
    """
    frequency = args.rope_theta ** (-np.arange(0, args.head_dim, 2) / args.head_dim)
    angle = np.arange(args.mini_batch_size)[:, None] * frequency  # [K, D/2]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([cos, cos], -1)[None, None], np.concatenate([-sin, sin], -1)[None, None]


def token_factors(block: Block) -> np.ndarray:
    """-t_i for j <= i, 0 elsewhere, [1, 1, K, K]."""
    t = np.array(block.seq_modeling_block.token_factors())
    return -np.tril(np.ones((len(t), len(t))) * t[:, None])[None, None]
