"""The inner models: the small networks that a TTT layer trains while it reads.

An inner model is a chain of linear maps with the tanh GELU between them (Sun et al. 2024, section 2.7):

    z_l = x_l W_l + b_l,   x_{l+1} = gelu(z_l),   l = 1 ... L;   x_1 is a key or a query, z_L the output.

Everything else in this package asks this page how many maps there are and how wide they are.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InnerModel:
    """A chain of linear maps.

    Attributes:
        name: as `ttt_layer_type` in a config has it.
        title: as the paper has it.
        widths: of x_1, ..., x_L and of the output, in head dimensions.
        base_lr: η_base of the paper, the learning rate of released models (section 2.7). A config has its own.
    """

    name: str
    title: str
    widths: tuple[int, ...]
    base_lr: float

    @property
    def num_maps(self) -> int:
        """L"""
        return len(self.widths) - 1

    @property
    def weight_names(self) -> tuple[str, ...]:
        """(W1, b1, W2, b2, ...)"""
        return tuple(f"{kind}{i}" for i in range(1, self.num_maps + 1) for kind in "Wb")

    @property
    def row_names(self) -> tuple[str, ...]:
        """What a token leaves in the open mini-batch: (k, e1, x2, e2, ...), the input and the scaled error of each map.

        From these follow the gradients of W_l and b_l: x_lᵀ e_l and e_l.
        """
        inputs = ["k", *(f"x{i}" for i in range(2, self.num_maps + 1))]
        return tuple(name for i, x in enumerate(inputs, 1) for name in (x, f"e{i}"))

    def weight_shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        """Of one head, by name: W_l [d_in, d_out], b_l [1, d_out]."""
        d = [width * head_dim for width in self.widths]
        return {
            name: (d[i // 2], d[i // 2 + 1]) if i % 2 == 0 else (1, d[i // 2 + 1])
            for i, name in enumerate(self.weight_names)
        }

    def row_widths(self, head_dim: int) -> dict[str, int]:
        """Of the parts of a row, by name, in the order in which they are packed."""
        pairs = zip(self.widths[:-1], self.widths[1:], strict=True)
        return dict(zip(self.row_names, (d * head_dim for pair in pairs for d in pair), strict=True))

    def row_width(self, head_dim: int) -> int:
        """R, of a packed row: 2 D for TTT-Linear, 10 D for TTT-MLP."""
        return sum(self.row_widths(head_dim).values())


TTT_LINEAR = InnerModel("linear", "TTT-Linear", (1, 1), base_lr=1.0)
TTT_MLP = InnerModel("mlp", "TTT-MLP", (1, 4, 1), base_lr=0.1)
INNER_MODELS = {inner.name: inner for inner in (TTT_LINEAR, TTT_MLP)}
