"""What differs between `decode` and `prefill`: how many tokens a call reads, where they stand, which of them count.

Where an index would depend on an input, a mask made of it does: a table's row is chosen by a product with a one-hot
vector, and what may not happen yet is multiplied by zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var

from ..model import Model, ModelArgs
from .ops import split, total

if TYPE_CHECKING:
    from .network import Network


class Call(ABC):
    """How many tokens a call reads, where in the mini-batch they stand, and which of them count.

    Attributes:
        tokens: T.
        cos, sin: of each token's position, [1, 1, T, D]; sin of the first half negated.
    """

    tokens: int
    cos: Var
    sin: Var

    @abstractmethod
    def by_head(self, x: Var, head_dim: int) -> Var:
        """[1, T, h·D] as [1, h, T, D]."""

    @abstractmethod
    def flat(self, x: Var) -> Var:
        """[1, H, T, D] as [1, T, C]."""

    @abstractmethod
    def mini_batches(self, x: Var) -> list[Var]:
        """[1, H, T, ·] cut into mini-batches."""

    @abstractmethod
    def rows(self, new: Var, open_rows: Var) -> Var:
        """The rows of a mini-batch, [1, H, K, ·], once its `new` ones are known; `open_rows` as the state has them."""

    @abstractmethod
    def factors(self, layer: int) -> Var:
        """-t_i where row j is not after token i, 0 elsewhere, [1, 1, tokens of a mini-batch, K]."""

    @abstractmethod
    def committed(self, mini_batch: int) -> Var:
        """1 if the mini-batch is complete after this call, else 0, [1, 1, 1, 1]."""

    @abstractmethod
    def kept(self, rows: Sequence[Var]) -> Var:
        """The open rows after this call, [1, H, K, ·], of those of each mini-batch; zero where there is none."""

    @abstractmethod
    def history(self, padded: Var, kept: int) -> Var:
        """Of a convolution's inputs [1, H, kept + T, D] the last `kept` that count."""

    @abstractmethod
    def last(self, x: Var) -> Var:
        """Of x [1, T, C] the last token that counts, [1, 1, C]."""


class Decode(Call):
    """One token at `position`, the phase of the open mini-batch."""

    def __init__(self, network: Network, model: Model, T: int, position: Var):
        args, c = model.args, network.inner_const
        K = args.mini_batch_size
        self.network, self.mini_batch_size = network, K
        self.tokens = 1
        self.here_across = network.mask(mb.equal(x=_int32(np.arange(K).reshape(1, 1, 1, K)), y=position))
        self.here_down = network.mask(mb.equal(x=_int32(np.arange(K).reshape(1, 1, K, 1)), y=position))
        self.complete = network.mask(mb.equal(x=_int32(np.full((1, 1, 1, 1), K - 1)), y=position))
        self.incomplete = mb.sub(x=c(1), y=self.complete)
        rotation = mb.matmul(x=self.here_across, y=c(np.concatenate(rope(args), axis=-1)))  # [1, 1, 1, 2D]
        self.cos, self.sin = split(rotation, [args.head_dim] * 2, axis=-1)
        tables = np.concatenate([token_factors(block) for block in model.layers], axis=1)  # [1, layers, K, K]
        chosen = mb.matmul(x=self.here_across, y=c(tables))  # [1, layers, 1, K]
        self._factors = split(chosen, [1] * len(model.layers), axis=1)

    def by_head(self, x, head_dim):
        return mb.reshape(x=x, shape=[1, x.shape[2] // head_dim, 1, head_dim])

    def flat(self, x):
        return mb.reshape(x=x, shape=[1, 1, x.shape[1] * x.shape[3]])

    def mini_batches(self, x):
        return [x]

    def rows(self, new, open_rows):
        _, H, _, width = new.shape
        open_rows = self.network.widen(open_rows, (1, H, self.mini_batch_size, width))
        return mb.add(x=open_rows, y=mb.mul(x=self.here_down, y=new))

    def factors(self, layer):
        return self._factors[layer]

    def committed(self, mini_batch):
        return self.complete

    def kept(self, rows):
        return mb.mul(x=rows[0], y=self.incomplete)

    def history(self, padded, kept):
        _, H, _, D = padded.shape
        return mb.slice_by_size(x=padded, begin=[0, 0, 1, 0], size=[1, H, kept, D])

    def last(self, x):
        return x


class Prefill(Call):
    """A block of whole mini-batches from phase 0, of which the first `length` tokens count."""

    def __init__(self, network: Network, model: Model, T: int, length: Var):
        args, c = model.args, network.inner_const
        self.tokens, self.mini_batch_size, self.network = T, args.mini_batch_size, network
        self.length = length
        counts = network.mask(mb.less(x=_int32(np.arange(T).reshape(1, 1, T, 1)), y=length))
        counts = self.mini_batches(counts)  # [1, 1, K, 1] each
        last = self.mini_batch_size - 1
        self._committed = [mb.slice_by_size(x=x, begin=[0, 0, last, 0], size=[1, 1, 1, 1]) for x in counts]
        self._kept = [mb.sub(x=x, y=y) for x, y in zip(counts, self._committed, strict=True)]
        self.cos, self.sin = (c(np.tile(x, (1, 1, T // self.mini_batch_size, 1))) for x in rope(args))
        self._factors = [c(token_factors(block)) for block in model.layers]
        self._histories: dict[int, Var] = {}

    def by_head(self, x, head_dim):
        x = mb.reshape(x=x, shape=[1, self.tokens, x.shape[2] // head_dim, head_dim])
        return mb.transpose(x=x, perm=[0, 2, 1, 3])

    def flat(self, x):
        _, H, T, D = x.shape
        return mb.reshape(x=mb.transpose(x=x, perm=[0, 2, 1, 3]), shape=[1, T, H * D])

    def mini_batches(self, x):
        return split(x, [self.mini_batch_size] * (self.tokens // self.mini_batch_size), axis=2)

    def rows(self, new, open_rows):
        return new

    def factors(self, layer):
        return self._factors[layer]

    def committed(self, mini_batch):
        return self._committed[mini_batch]

    def kept(self, rows):
        return total([mb.mul(x=x, y=kept) for x, kept in zip(rows, self._kept, strict=True)])

    def history(self, padded, kept):
        if kept not in self._histories:
            # Row i is one at length + i, where the i-th of the last inputs stands in `padded`.
            start = np.arange(kept + self.tokens) - np.arange(kept)[:, None]
            chosen = mb.equal(x=_int32(start[None, None]), y=self.length)
            self._histories[kept] = self.network.mask(chosen, self.network.dtype)
        return mb.matmul(x=self._histories[kept], y=padded)

    def last(self, x):
        chosen = mb.equal(x=_int32(np.arange(1, self.tokens + 1).reshape(1, 1, -1)), y=self.length)
        return mb.matmul(x=self.network.mask(chosen, self.network.dtype), y=x)


def _int32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int32)


def rope(args: ModelArgs) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin by position and feature, [1, 1, K, D]; the first half takes -sin times the second."""
    frequency = args.rope_theta ** (-np.arange(0, args.head_dim, 2) / args.head_dim)
    angle = np.arange(args.mini_batch_size)[:, None] * frequency  # [K, D/2]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([cos, cos], -1)[None, None], np.concatenate([-sin, sin], -1)[None, None]


def token_factors(block) -> np.ndarray:
    """-t_i for j <= i, 0 elsewhere, [1, 1, K, K]."""
    t = np.array(block.seq_modeling_block.token_factors())
    return -np.tril(np.ones((len(t), len(t))) * t[:, None])[None, None]
