"""The layout of a package's state: everything the network remembers of a text, in one float16 array.

[layers, H, R, D]: of each layer and head, R rows of D numbers. They are, in this order (K mini-batch size, `kept` =
conv_kernel - 1):

    part     rows   TTT-MLP   what they hold
    W1       D      4D        learned so far: W1 - W1 at the start of the text.  TTT-MLP: transposed
    b1       1      4         b1 - b1 at the start
    W2       -      4D        TTT-MLP only
    b2       -      1         TTT-MLP only
    k        K      K         rows of the open mini-batch, zero where not yet written
    e1       K      4K
    x2       -      4K        TTT-MLP only
    e2       -      K         TTT-MLP only
    conv     kept   kept      with pre_conv: the last inputs of the convolution, head h holding channels hD … hD + D
    conv_qk  kept   kept      with share_qk: the same of the two convolutions behind q_proj

Zeros are the state before the first token: differences from the learned start, not the weights themselves. A matrix
of width 4D takes four rows of D where it has one (a reshape, no copy). Where D is no multiple of 32, rows are filled
up with zeros to the next one, because Core ML wants the last dimension of a state to be a multiple of 32.

Half precision is enough, nothing carries the rounding residue: over the 38 835 tokens of tests/data/tempest.txt the
trained model's differences drift 0.44 % (relative L2) from those in float32, and bits per byte change by 0.004 %.

Within a head, the D features of q, k, v and of everything made of them stand in the order of `halves_first`: pairs
that RoPE rotates lie half a row apart, not side by side, so that the graph rotates whole halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cache import TTTCache
from ..model import ModelArgs

ALIGNMENT = 32


def halves_first(size: int) -> np.ndarray:
    """The order of features that puts the pairs (2m, 2m + 1) at (m, m + size / 2)."""
    return np.r_[0:size:2, 1:size:2]


@dataclass(frozen=True)
class StateLayout:
    """Where in the state everything is.

    Attributes:
        layers, heads, head_dim: L, H, D.
        parts: number of rows of each part, in order.
    """

    layers: int
    heads: int
    head_dim: int
    parts: dict[str, int]

    @classmethod
    def of(cls, args: ModelArgs) -> StateLayout:
        D, K, kept = args.head_dim, args.mini_batch_size, args.conv_kernel - 1
        if args.ttt_layer_type == "linear":
            parts = {"W1": D, "b1": 1, "k": K, "e1": K}
        else:
            parts = {"W1": 4 * D, "b1": 4, "W2": 4 * D, "b2": 1, "k": K, "e1": 4 * K, "x2": 4 * K, "e2": K}
        if args.pre_conv and kept:
            parts["conv"] = kept
        if args.share_qk and kept:
            parts["conv_qk"] = kept
        return cls(args.num_hidden_layers, args.num_attention_heads, D, parts)

    @property
    def rows(self) -> int:
        return sum(self.parts.values())

    @property
    def width(self) -> int:
        """Of a row with its padding."""
        return -(-self.head_dim // ALIGNMENT) * ALIGNMENT

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.layers, self.heads, self.rows, self.width

    @property
    def nbytes(self) -> int:
        """In float16: what a call reads, and what it writes."""
        return 2 * int(np.prod(self.shape))

    def first_row(self, part: str) -> int:
        names = list(self.parts)
        return sum(self.parts[name] for name in names[: names.index(part)])

    def description(self) -> dict:
        """As the package's metadata and companions say it."""
        return {
            "shape": list(self.shape),
            "dtype": "float16",
            "head_dim": self.head_dim,
            "parts": {name: [self.first_row(name), rows] for name, rows in self.parts.items()},
        }

    def pack(self, cache: Sequence[TTTCache], start: Sequence[TTTCache]) -> np.ndarray:
        """A model's state in this layout, in float32.

        Args:
            cache: of one sequence, one per layer.
            start: what it was before the first token.
        """
        return np.stack([self._pack_layer(now, then) for now, then in zip(cache, start, strict=True)])

    def _pack_layer(self, cache: TTTCache, start: TTTCache) -> np.ndarray:
        D, H = self.head_dim, self.heads
        order = halves_first(D)
        deltas = [np.array(now[0]) - np.array(then[0]) for now, then in zip(cache.weights, start.weights, strict=True)]
        widths = [d for W in cache.weights[::2] for d in W.shape[-2:]]
        rows = np.split(np.array(cache.rows[0]), np.cumsum(widths)[:-1], axis=-1)  # [H, K, D or 4D] each
        found = dict(zip(("W1", "b1", "W2", "b2"), deltas, strict=False))
        found |= dict(zip(("k", "e1", "x2", "e2"), rows, strict=False))

        if "W2" in self.parts:
            found["W1"] = found["W1"].swapaxes(1, 2)  # [H, 4D, D]
            in_order = ("W1", "W2", "b2", "k", "e2")
        else:
            found["W1"] = found["W1"][:, order]
            in_order = ("W1", "b1", "k", "e1")
        for name in in_order:
            found[name] = found[name][..., order]
        for name, x in cache.history.items():  # [1, kept, C]
            by_head = np.array(x[0]).reshape(-1, H, D).swapaxes(0, 1)
            found[name] = by_head[..., order] if name == "conv_qk" else by_head

        packed = np.zeros(self.shape[1:], np.float32)
        for name, rows in self.parts.items():
            if name in found:
                first = self.first_row(name)
                packed[:, first : first + rows, :D] = found[name].reshape(H, rows, D)
        return packed
