"""Compares a checkpoint's tensors with the parameters of the model that its config describes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import CheckpointError
from ..network.args import ModelArgs
from ..network.model import Model
from .names import unknown_names
from .tensor import Tensor, dtype_name
from .untrusted import quoted

_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Parameters:
    """Names, shapes and dtypes of a model's parameters.

    They come from a model with one layer that is built but never evaluated: MLX arrays know their shapes before they
    have values. So the size of the model does not matter.
    """

    def __init__(self, args: ModelArgs):
        self.args = args
        self._model = Model(replace(args, num_hidden_layers=1))
        one_layer = {name: value.shape for name, value in dict(tree_flatten(self._model.parameters())).items()}
        self._layer = {n: s for n, s in one_layer.items() if _LAYER.match(n)}
        self._rest = {n: s for n, s in one_layer.items() if n not in self._layer}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by name, in the order of the network."""
        layers = {
            name.replace("model.layers.0.", f"model.layers.{layer}."): shape
            for layer in range(self.args.num_hidden_layers)
            for name, shape in self._layer.items()
        }
        return self._rest | layers

    def check(self, tensors: dict[str, Tensor], where: str) -> None:
        """Raise CheckpointError if there are `problems`; it names `where` and the first of them."""
        if problems := self.problems(tensors):
            more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
            raise CheckpointError(f"{where}: {problems[0]}{more}")

    def problems(self, tensors: dict[str, Tensor]) -> list[str]:
        """Why these tensors are not this model's weights, one line each; empty if they are. No values are loaded."""
        found = dict(tensors)
        if self.args.tie_word_embeddings:
            found.pop(HEAD, None)
        layers = 1 + max(map(self._layer_of, found), default=-1)
        if not layers:
            # Usually all names are wrong.
            unknown = sorted((name for name in found if name not in self._rest), key=_natural)
            return [unknown_names(unknown) if unknown else "the tensors are of 0 layers"]
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

    def as_parameter(
        self, name: str, tensor: Tensor, dtype: mx.Dtype | None, nonfinite: Callable[[str], None]
    ) -> Tensor:
        """A tensor of the checkpoint as a parameter of the model: in the model's layout and final dtype.

        Args:
            name: of the parameter.
            dtype: of the parameters that have the model's dtype; None keeps the tensor's own (float64 becomes
                float32). The inner model's parameters are float32 in any case.
            nonfinite: called when the tensor is loaded and has values that are NaN or infinite, with a sentence that
                says so.
        """
        own = mx.float32 if tensor.dtype == mx.float64 else tensor.dtype
        target = (dtype or own) if self._model.cast_predicate(name) else mx.float32

        def load() -> mx.array:
            original = tensor.load()
            array = mx.contiguous(self._model.sanitize({name: original})[name].astype(target))
            if bad := _count_nonfinite(array):
                overflow = target == mx.float16 and not _count_nonfinite(original)
                cause = "too large for float16; bfloat16 holds them" if overflow else "NaN or infinite"
                nonfinite(f"{name} has {bad:,} values that are {cause}")
            return array

        return Tensor(self._shape(name, tensor), target, load)

    def _shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """A tensor's shape in the model's layout, which orders the axes of convolutions otherwise than PyTorch."""
        return self._model.sanitize({name: mx.zeros(tensor.shape)})[name].shape


def _count_nonfinite(array: mx.array) -> int:
    return mx.sum(mx.logical_not(mx.isfinite(array))).item()  # type: ignore[return-value]  # an int


def _some(names: Iterable[str]) -> str:
    """`a, b, c and 12 more are`."""
    names = sorted(names, key=_natural)
    shown = ", ".join(map(quoted, names[:3]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def _natural(text: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(len(part), part) if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", text)]
