"""The two forms in which a bundle keeps what it remembers of a text, and how one becomes the other.

`decode` and `prefill` have an array for each layer and part of layout.StateLayout, "W1.0", [1, H, rows, D]: on Linux
that is three times as fast as one array for all. `main` has the three arrays that Apple's runner asks for; each holds
some of the parts, one below the other, for all layers, [layers, H, rows, D]:

    tttWeights   W1, b1 (, W2, b2)                    what has been learned
    tttInputs    k (, x2) (, conv) (, conv_qk)        what the open mini-batch and the convolutions have read
    tttErrors    e1 (, e2)                            how wrong the inner model was on the open mini-batch

Zeros are the state before the first token in both.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..layout import StateLayout

Arrays = Mapping[str, np.ndarray]


def part_name(part: str, layer: int) -> str:
    """The name of a state of `decode` and `prefill`."""
    return f"{part}.{layer}"


def groups(layout: StateLayout) -> dict[str, list[str]]:
    """The parts that each state of `main` holds, in order."""
    inner = layout.args.inner_model
    errors = list(inner.row_names[1::2])
    inputs = [name for name in layout.parts if name not in (*inner.weight_names, *errors)]
    return {"tttWeights": list(inner.weight_names), "tttInputs": inputs, "tttErrors": errors}


def apart_shapes(layout: StateLayout) -> dict[str, tuple[int, ...]]:
    """Of the states of `decode` and `prefill`."""
    layers, H, _, _ = layout.shape
    return {
        part_name(part, layer): (1, H, rows, layout.args.head_dim)
        for layer in range(layers)
        for part, rows in layout.parts.items()
    }


def grouped_shapes(layout: StateLayout) -> dict[str, tuple[int, ...]]:
    """Of the states of `main`."""
    layers, H, _, _ = layout.shape
    return {
        name: (layers, H, sum(layout.parts[part] for part in parts), layout.args.head_dim)
        for name, parts in groups(layout).items()
    }


def apart(layout: StateLayout, grouped: Arrays) -> dict[str, np.ndarray]:
    """The states of `main` as those of `decode` and `prefill`."""
    found: dict[str, np.ndarray] = {}
    for name, parts in groups(layout).items():
        ends = np.cumsum([layout.parts[part] for part in parts])
        for part, x in zip(parts, np.split(np.asarray(grouped[name]), ends[:-1], axis=2), strict=True):
            found |= {part_name(part, layer): x[layer : layer + 1] for layer in range(len(x))}
    return {name: np.ascontiguousarray(found[name]) for name in apart_shapes(layout)}


def together(layout: StateLayout, states: Arrays) -> dict[str, np.ndarray]:
    """The states of `decode` and `prefill` as those of `main`."""

    def of_layer(parts: list[str], layer: int) -> np.ndarray:
        return np.concatenate([states[part_name(part, layer)] for part in parts], axis=2)

    layers = range(layout.shape[0])
    return {
        name: np.concatenate([of_layer(parts, layer) for layer in layers], axis=0)
        for name, parts in groups(layout).items()
    }


def packed(layout: StateLayout, states: Arrays) -> np.ndarray:
    """The states of `decode` and `prefill` in one array, as layout.StateLayout has it, in float32."""
    D = layout.args.head_dim
    layers = [
        np.concatenate([states[part_name(part, layer)] for part in layout.parts], axis=2, dtype=np.float32)
        for layer in range(layout.shape[0])
    ]
    return np.pad(np.concatenate(layers), ((0, 0), (0, 0), (0, 0), (0, layout.width - D)))


def unpacked(layout: StateLayout, state: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of `packed`."""
    D = layout.args.head_dim
    found: dict[str, np.ndarray] = {}
    for part, rows in layout.parts.items():
        first = layout.first_row(part)
        for layer, x in enumerate(state):
            found[part_name(part, layer)] = x[None, :, first : first + rows, :D]
    return {name: np.ascontiguousarray(found[name]) for name in apart_shapes(layout)}
