"""A checkpoint's tensors against the model's parameters. Names, shapes and dtypes come from the model itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import CheckpointError
from ..model import Model, ModelArgs
from .tensor import Tensor, dtype_name
from .untrusted import quoted

_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Parameters:
    """The parameters of the model that a config describes, known without making the model.

    Only a model of one layer is built, and never evaluated: MLX arrays know their shapes before they have values.
    """

    def __init__(self, args: ModelArgs):
        self.args = args
        self._model = Model(replace(args, num_hidden_layers=1))
        one_layer = {name: value.shape for name, value in tree_flatten(self._model.parameters())}
        self._layer = {n: s for n, s in one_layer.items() if _LAYER.match(n)}
        self._rest = {n: s for n, s in one_layer.items() if n not in self._layer}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name, in the order of the network."""
        layers = {
            name.replace("model.layers.0.", f"model.layers.{layer}."): shape
            for layer in range(self.args.num_hidden_layers)
            for name, shape in self._layer.items()
        }
        return self._rest | layers

    def check(self, tensors: dict[str, Tensor], where: str) -> None:
        """Raises CheckpointError with the first of `problems`, after `where`."""
        if problems := self.problems(tensors):
            more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
            raise CheckpointError(f"{where}: {problems[0]}{more}")

    def problems(self, tensors: dict[str, Tensor]) -> list[str]:
        """Why these tensors are not this model's weights, one line each; empty if they are. Reads no values."""
        found = dict(tensors)
        if self.args.tie_word_embeddings:
            found.pop(HEAD, None)
        layers = 1 + max(map(self._layer_of, found), default=-1)
        if not layers:
            return [self._no_layers(found)]
        if layers != self.args.num_hidden_layers:
            return [f"num_hidden_layers is {self.args.num_hidden_layers}, but the tensors are of {layers} layers"]
        expected = self.shapes()
        problems = []
        if missing := [name for name in expected if name not in found]:
            hint = "; a tied model has none: tie_word_embeddings" if missing == [HEAD] else ""
            problems.append(f"{_some(missing)} missing{hint}")
        if extra := [name for name in found if name not in expected]:
            problems.append(f"{_some(extra)} not in a model of this config")
        for name in sorted(expected.keys() & found.keys(), key=_natural):
            tensor, shape = found[name], self._shape(name, found[name])
            if not mx.issubdtype(tensor.dtype, mx.floating):
                problems.append(f"{name} holds {dtype_name(tensor.dtype)}, not floating-point numbers")
            elif shape != expected[name]:
                problems.append(f"{name} has shape {shape}, the config asks for {expected[name]}")
        return problems

    def _layer_of(self, name: str) -> int:
        """The layer that a parameter of the model belongs to; -1 for the rest and for other names."""
        match = _LAYER.match(name)
        return int(match[1]) if match and name.replace(match[0], "model.layers.0.", 1) in self._layer else -1

    def _no_layers(self, found: Iterable[str]) -> str:
        """What is wrong when no tensor has the name of a layer's parameter: as a rule, all names are others."""
        unknown = sorted((name for name in found if name not in self._rest), key=_natural)
        if not unknown:
            return "the tensors are of 0 layers"
        more = f", nor are {len(unknown) - 1} other names" if len(unknown) > 1 else ""
        return f"{quoted(unknown[0])} is not the name of a TTT model's parameter{more}"

    def as_parameter(
        self, name: str, tensor: Tensor, dtype: mx.Dtype | None, nonfinite: Callable[[str], None]
    ) -> Tensor:
        """A tensor of the checkpoint as it is to be written: in the model's layout and in its final dtype.

        Args:
            dtype: of the parameters that follow the model's dtype; None keeps the tensor's own (float64: float32).
                The inner model's parameters stay float32.
            nonfinite: called when it is read and a value is NaN or infinite, with a sentence that says so.
        """
        own = mx.float32 if tensor.dtype == mx.float64 else tensor.dtype
        target = (dtype or own) if self._model.cast_predicate(name) else mx.float32

        def read() -> mx.array:
            original = tensor.read()
            array = mx.contiguous(self._model.sanitize({name: original})[name].astype(target))
            if bad := _count_nonfinite(array):
                overflow = target == mx.float16 and not _count_nonfinite(original)
                cause = "too large for float16; bfloat16 holds them" if overflow else "NaN or infinite"
                nonfinite(f"{name} has {bad:,} values that are {cause}")
            return array

        return Tensor(self._shape(name, tensor), target, read)

    def _shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """A tensor's shape in the model's layout: PyTorch orders a convolution's axes differently."""
        return self._model.sanitize({name: mx.zeros(tensor.shape)})[name].shape


def _count_nonfinite(array: mx.array) -> int:
    return mx.sum(mx.logical_not(mx.isfinite(array))).item()


def _some(names: Iterable[str]) -> str:
    """`a, b, c and 12 more are`."""
    names = sorted(names, key=_natural)
    shown = ", ".join(map(quoted, names[:3]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key: layer 2 before layer 10."""
    return [(len(part), part) if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", text)]
