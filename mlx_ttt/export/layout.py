"""The layout of an exported model's state: everything the network remembers of a text, in one float16 array.

The array is [layers, H, R, D]: for each layer and head, R rows of D numbers. They are, in this order (K mini-batch
size, `kept` = conv_kernel - 1):

    part     rows of TTT-Linear   of TTT-MLP   what they hold
    W1       D                    4D           W1 less W1 at the start of the text; of TTT-MLP transposed
    b1       1                    4            b1 less b1 at the start
    W2       -                    4D           W2 less W2 at the start
    b2       -                    1            b2 less b2 at the start
    k        K                    K            rows of the open mini-batch, zero where not yet written
    e1       K                    4K
    x2       -                    4K
    e2       -                    K
    conv     kept                 kept         with pre_conv: the last inputs of the convolution, by head
    conv_qk  kept                 kept         with share_qk: the last inputs of the two convolutions behind q_proj

Zeros are the state before the first token, because the weights are kept as differences from the learned start. A part
that is 4D wide takes four rows of D for each of its own (a reshape, no copy). Head h of a convolution's inputs holds
channels hD to (h + 1) D - 1. Core ML wants the last dimension of a state to be a multiple of 32: where D is none, zeros
fill each row up.

Half precision is enough, and nothing carries the rounding residue: over the 38 835 tokens of tests/data/tempest.txt the
bundled model's differences drift by 0.48 % (relative L2) from those in float32; bits per byte change by 0.0004 %.

Within a head, the D features of q, k, v and of all that is made of them stand in the order of `halves_first`: the pairs
that RoPE rotates lie half a row apart, not side by side, so that the network rotates whole halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..network.args import ModelArgs
from ..network.cache import TTTCache
from ..network.inner import INNER_MODELS, InnerModel

ALIGNMENT = 32


def halves_first(size: int) -> np.ndarray:
    """The order of features that puts the pairs (2m, 2m + 1) at (m, m + size / 2)."""
    return np.r_[0:size:2, 1:size:2]


def stored_transposed(inner: InnerModel, name: str) -> bool:
    """Whether this weight of the inner model is stored transposed: a matrix is if it widens, like TTT-MLP's W1.

    So the rows of the state hold the features of a head, in the order of `halves_first`.
    """
    rows, columns = _widths(inner)[name]
    return 0 < rows < columns


def stored(inner: InnerModel, name: str, x: np.ndarray) -> np.ndarray:
    """A weight or a part of the rows, [..., d1, d2], as the state and the exported network have it.

    Axes that are one head wide are put in the order of `halves_first`; then the last two axes of some weights swap.
    """
    for axis, width in zip((-2, -1), _widths(inner)[name], strict=True):
        if width == 1:
            x = np.take(x, halves_first(x.shape[axis]), axis)
    return x.swapaxes(-1, -2) if stored_transposed(inner, name) else x


def _widths(inner: InnerModel) -> dict[str, tuple[int, int]]:
    """How many heads wide the last two axes of each weight and part of the rows are; 0 for an axis without features."""
    shapes = inner.weight_shapes(1).items()
    weights = {name: (0 if name.startswith("b") else rows, columns) for name, (rows, columns) in shapes}
    return weights | {name: (0, width) for name, width in inner.row_widths(1).items()}


@dataclass(frozen=True)
class StateLayout:
    """Where in the state everything is.

    Attributes:
        args: the model's configuration.
        parts: the number of rows of each part, in order.
    """

    args: ModelArgs
    parts: dict[str, int]

    @classmethod
    def of(cls, args: ModelArgs) -> StateLayout:
        """That of a model with this configuration."""
        inner, D, K = INNER_MODELS[args.ttt_layer_type], args.head_dim, args.mini_batch_size
        parts = {name: rows * columns // D for name, (rows, columns) in inner.weight_shapes(D).items()}
        parts |= {name: K * width // D for name, width in inner.row_widths(D).items()}
        kept = args.conv_kernel - 1
        histories = {"conv": args.pre_conv, "conv_qk": args.share_qk}
        parts |= {name: kept for name, used in histories.items() if used and kept}
        return cls(args, parts)

    @property
    def rows(self) -> int:
        """R"""
        return sum(self.parts.values())

    @property
    def width(self) -> int:
        """The length of a row, D or what it is filled up to."""
        return -(-self.args.head_dim // ALIGNMENT) * ALIGNMENT

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the state."""
        return self.args.num_hidden_layers, self.args.num_attention_heads, self.rows, self.width

    @property
    def nbytes(self) -> int:
        """The size of the state in float16. Each call reads and writes it whole."""
        return 2 * int(np.prod(self.shape))

    def first_row(self, part: str) -> int:
        """Where a part begins."""
        names = list(self.parts)
        return sum(self.parts[name] for name in names[: names.index(part)])

    def description(self) -> dict:
        """For the metadata of a package and its companions."""
        return {
            "shape": list(self.shape),
            "dtype": "float16",
            "head_dim": self.args.head_dim,
            "parts": {name: [self.first_row(name), rows] for name, rows in self.parts.items()},
        }

    def pack(self, cache: Sequence[TTTCache], start: Sequence[TTTCache]) -> np.ndarray:
        """A model's state in this layout, in float32.

        Args:
            cache: of one sequence, one per layer.
            start: the same before the first token.
        """
        return np.stack([self._pack_layer(now, then) for now, then in zip(cache, start, strict=True)])

    def _pack_layer(self, cache: TTTCache, start: TTTCache) -> np.ndarray:
        D, H, inner = self.args.head_dim, self.args.num_attention_heads, INNER_MODELS[self.args.ttt_layer_type]
        deltas = [np.array(now[0]) - np.array(then[0]) for now, then in zip(cache.weights, start.weights, strict=True)]
        ends = np.cumsum(list(inner.row_widths(D).values()))
        rows = np.split(np.array(cache.rows[0]), ends[:-1], axis=-1)  # [H, K, D or 4D] each
        named = zip((*inner.weight_names, *inner.row_names), (*deltas, *rows), strict=True)
        found = {name: stored(inner, name, x) for name, x in named}
        for name, x in cache.history.items():  # [1, kept, C]
            by_head = np.array(x[0]).reshape(-1, H, D).swapaxes(0, 1)
            found[name] = by_head[..., halves_first(D)] if name == "conv_qk" else by_head

        parts = [found.get(name, np.zeros(H * n * D)).reshape(H, n, D) for name, n in self.parts.items()]
        return np.pad(np.concatenate(parts, axis=1, dtype=np.float32), ((0, 0), (0, 0), (0, self.width - D)))
