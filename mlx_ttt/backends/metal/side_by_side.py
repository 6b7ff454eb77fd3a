"""Matrices that multiply the same input, side by side in memory, so that one product does for all of them.

The projections of a model keep their names and values. Their weights become views of the rows of one array, so nothing
is kept twice. Only plain projections are joined: linear, or quantized all in the same way, without a bias. Where one
has an adapter, or was quantized in another way, each is multiplied by itself.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ...network.backend import Kept
from ...network.model import Block, Model, TTTModel, prepare
from . import rule
from .layer import Part

_CALLS: dict[type, Callable] = {
    kind: kind.__call__ for kind in (nn.Linear, nn.QuantizedLinear)
}  # somebody may patch them later

Arrays = dict[str, mx.array]  # of the joined matrices, as a projection names them


@prepare.register
def lay_side_by_side(model: Model) -> None:
    """Join the projections of a model that read the same input. Takes the memory of one layer's meanwhile."""
    if not rule.available():
        return NotImplemented
    SideBySide.of(model.model).join(model.model)
    return None


def _groups(block: Block) -> list[tuple[nn.Module, list[str]]]:
    """Modules, and the names of those projections in them that read the same input: of a TTT layer, and of SwiGLU."""
    layer, names = block.seq_modeling_block, ("q_proj", "k_proj", "v_proj", "g_proj")
    return [(layer, [name for name in names if name in layer]), (block.mlp, ["gate_proj", "up_proj"])]


def products(x: mx.array, block: Block, group: int, joined: Arrays) -> dict[str, Part]:
    """x [B, 1, C] through the projections of a group, 0 or 1, by name; `joined`, their arrays side by side, or none."""
    container, names = _groups(block)[group]
    if not joined:
        apart = {name: container[name](x).astype(x.dtype) for name in names}
        return {name: Part(product, 0, product.shape[-1]) for name, product in apart.items()}
    first = container[names[0]]
    if isinstance(first, nn.QuantizedLinear):
        scheme = {"group_size": first.group_size, "bits": first.bits, "mode": first.mode}
        product = mx.quantized_matmul(
            x, joined["weight"], scales=joined["scales"], biases=joined.get("biases"), transpose=True, **scheme
        )
    else:
        product = x @ joined["weight"].T
    product = product.astype(x.dtype)
    bounds = itertools.pairwise([0, *itertools.accumulate(len(container[name]["weight"]) for name in names)])
    return {name: Part(product, *place) for name, place in zip(names, bounds, strict=True)}


class _Places:
    """Where modules and arrays are expected: in which containers, under which keys, and at which addresses."""

    def __init__(self, places: Sequence[tuple[nn.Module, str, nn.Module | mx.array]]):
        self.places = list(places)
        self._containers = [container for container, _, _ in places]
        self._keys = [key for _, key, _ in places]
        self._parts = [part for _, _, part in places]
        self._arrays = [x for x in self._parts if isinstance(x, mx.array)]
        self._addresses = self._found()

    def same(self) -> bool:
        """Whether all is in its place, and no array was changed in place: that has other memory."""
        return self.unmoved() and self._found() == self._addresses

    def unmoved(self) -> bool:
        """Whether all is in its place, changed or not."""
        try:
            return all(map(operator.is_, map(operator.getitem, self._containers, self._keys), self._parts))
        except LookupError:
            return False

    def _found(self) -> list[int]:
        return list(map(ctypes.addressof, map(ctypes.c_char.from_buffer, self._arrays)))  # type: ignore[arg-type]


class _Group(NamedTuple):
    arrays: Arrays
    places: _Places  # of the projections and their arrays

    def renewed(self) -> _Group:
        return _Group(self.arrays, _Places([(where, key, where[key]) for where, key, _ in self.places.places]))


class SideBySide(Kept):
    """What lies side by side in a model."""

    _groups: Sequence[Sequence[_Group | None]] = ()  # of each block's TTT layer, and of SwiGLU
    _places: _Places = _Places([])  # of all groups

    def join(self, model: TTTModel) -> None:
        """Join what can be joined and is not yet."""
        self._put(
            [
                [group or _joined(container, names) for group, (container, names) in zip(current, found, strict=True)]
                for current, found in zip(self._current(model), map(_groups, model.layers), strict=True)
            ]
        )

    def arrays(self, model: TTTModel) -> list[list[Arrays]]:
        """What `products` takes, for each block and group: nothing where the projections are not what they were.

        Such a group is forgotten, since its arrays would only take memory.
        """
        if len(self._groups) != len(model.layers) or not self._places.same():
            self._put(self._current(model))
        return [[group.arrays if group else {} for group in block] for block in self._groups]

    def renew(self) -> None:
        """Expect the objects that are there now. To be called behind a compiled function that `arrays` was asked for.

        While MLX traces, it has other arrays in a model. It puts the same arrays back, but as new objects.
        """
        if not self._places.unmoved():
            self._put([[group and group.renewed() for group in block] for block in self._groups])

    def _current(self, model: TTTModel) -> list[list[_Group | None]]:
        """The groups that still are what they were."""
        if len(self._groups) != len(model.layers):
            return [[None, None] for _ in model.layers]
        return [[group if group and group.places.same() else None for group in block] for block in self._groups]

    def _put(self, groups: list[list[_Group | None]]) -> None:
        self._groups = groups
        self._places = _Places([place for block in groups for group in block if group for place in group.places.places])


def _joined(container: nn.Module, names: Sequence[str]) -> _Group | None:
    """The projections' arrays side by side, which the projections see parts of from now on."""
    projections = [container[name] for name in names]
    if not _alike(projections):
        return None
    arrays = {
        name: mx.concatenate([projection[name] for projection in projections])
        for name in ("weight", "scales", "biases")
        if name in projections[0]
    }
    mx.eval(arrays)
    places: list[tuple] = [(container, name, container[name]) for name in names]
    start = 0
    for projection in projections:
        stop = start + len(projection["weight"])
        for name, array in arrays.items():
            projection[name] = array[start:stop]
            mx.eval(projection[name])
            places.append((projection, name, projection[name]))
        start = stop
    return _Group(arrays, _Places(places))


def _alike(projections: Sequence[nn.Module]) -> bool:
    """Whether one product can do for all."""
    first = projections[0]
    if _CALLS.get(type(first)) is not type(first).__call__:
        return False

    def kind(projection: nn.Module) -> tuple:
        arrays = [(name, x.dtype, x.shape[1:]) for name, x in sorted(projection.items()) if isinstance(x, mx.array)]
        return type(projection), arrays, [getattr(projection, name, None) for name in ("group_size", "bits", "mode")]

    return all("bias" not in p and kind(p) == kind(first) for p in projections)
