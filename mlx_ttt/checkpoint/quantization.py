"""Quantized matrices, in MLX's format and with mlx-lm's names: how they are stored, and how to quantize and dequantize.

A matrix `PATH.weight` [out, in] in b bits and groups of g is stored as `PATH.weight` [out, in · b / 32], uint32,
`PATH.scales` [out, in / g], and in the mode "affine" `PATH.biases` [out, in / g].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from ..errors import CheckpointError, QuantizationError
from ..network.args import ModelArgs
from ..network.model import Model
from .source import Source
from .tensor import Tensor, dtype_name
from .untrusted import quoted

_PARTS = ("biases", "scales", "weight")
# The bits and the group sizes that MLX has in each mode, its defaults first.
_MODES = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True, init=False)
class Scheme:
    """How a matrix is quantized, in MLX's terms."""

    group_size: int
    bits: int
    mode: str

    def __init__(self, group_size: int | None = None, bits: int | None = None, mode: str = "affine") -> None:
        """None stands for MLX's default in this mode.

        Raises:
            QuantizationError: MLX has no such combination.
        """
        if not isinstance(mode, str) or mode not in _MODES:
            raise QuantizationError(f"the quantization mode is {quoted(mode)}, none of {', '.join(_MODES)}")
        all_bits, group_sizes = _MODES[mode]
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "bits", _one_of(all_bits, bits, "bits", mode))
        object.__setattr__(self, "group_size", _one_of(group_sizes, group_size, "group_size", mode))

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}, {self.mode}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the rows of a matrix divide into groups."""
        return shape[-1] % self.group_size == 0

    def layout(self, shape: tuple[int, ...], dtype: mx.Dtype) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Shape and dtype of each part of a matrix [out, in]."""
        out, columns = shape
        groups = (out, columns // self.group_size)
        packed = (out, columns * self.bits // 32)
        if self.mode == "affine":
            return {"weight": (packed, mx.uint32), "scales": (groups, dtype), "biases": (groups, dtype)}
        return {"weight": (packed, mx.uint32), "scales": (groups, mx.uint8)}

    def parts(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parts of a matrix [out, in], quantized. Loading each part once loads and quantizes the matrix once."""
        layout = self.layout(matrix.shape, matrix.dtype)
        waiting: dict[str, mx.array] = {}  # parts that were computed together with another one

        def load(part: str) -> mx.array:
            if part not in waiting:
                arrays = mx.quantize(matrix.load(), **asdict(self))
                mx.eval(arrays)
                waiting.update(zip(layout, arrays, strict=True))
            return waiting.pop(part)

        return {part: Tensor(shape, dtype, partial(load, part)) for part, (shape, dtype) in layout.items()}

    def matrix(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix [out, in] of these parts, dequantized.

        Its dtype is that of the scales in the mode "affine", else bfloat16, which holds all values of those modes.

        Raises:
            ValueError: they are not the parts of one matrix in this scheme.
        """
        scales = parts["scales"]
        if len(scales.shape) != 2:
            raise ValueError(f"has scales of shape {scales.shape}, which are not those of a matrix")
        shape = scales.shape[0], scales.shape[1] * self.group_size
        dtype = scales.dtype if self.mode == "affine" else mx.bfloat16
        found = {name: (part.shape, part.dtype) for name, part in parts.items()}
        if found != self.layout(shape, dtype):
            shown = ", ".join(f"{name} {shape} {dtype_name(dtype)}" for name, (shape, dtype) in found.items())
            raise ValueError(f"has {shown}: not a matrix of {self}, as the config says")

        def load() -> mx.array:
            arrays = {name: part.load() for name, part in parts.items()}
            return mx.dequantize(arrays["weight"], arrays["scales"], arrays.get("biases"), **asdict(self))

        return Tensor(shape, dtype, load)


def _one_of(allowed: tuple[int, ...], value: int | None, name: str, mode: str) -> int:
    """A value if MLX allows it in this mode; the mode's default for None."""
    if value is None:
        return allowed[0]
    if type(value) is not int or value not in allowed:
        choice = ", ".join(map(str, sorted(allowed)))
        raise QuantizationError(f"{name} is {quoted(value)}; the quantization mode {mode} allows {choice}")
    return value


@dataclass(frozen=True)
class Quantization:
    """How a model's matrices are quantized: in one scheme, and some in schemes of their own, by module path."""

    scheme: Scheme
    own: Mapping[str, Scheme] = field(default_factory=dict)

    @classmethod
    def mixed(cls, recipe: str, scheme: Scheme, args: ModelArgs) -> Quantization:
        """One of mlx-lm's recipes, which give more bits to the matrices that need them.

        Raises:
            QuantizationError: there is no such recipe, or none in this mode.
        """
        if recipe not in QUANT_RECIPES:
            raise QuantizationError(f"the recipe {quoted(recipe)} is none of {', '.join(QUANT_RECIPES)}")
        if scheme.mode != "affine":
            raise QuantizationError(f"the recipe {recipe} is for the quantization mode affine, not {scheme.mode}")
        model = Model(args)
        own: Callable[..., Any] = mixed_quant_predicate_builder(recipe, model, scheme.group_size)
        matrices = {path: module for path, module in _matrices(model).items() if scheme.fits(module.weight.shape)}
        return cls(scheme, {path: Scheme(**own(path, module)) for path, module in matrices.items()})

    @classmethod
    def of_config(cls, config: Mapping, where: Path | None) -> Quantization | None:
        """What a config says of the quantization; None if the weights are not quantized.

        Args:
            where: the config file, for the error message.

        Raises:
            CheckpointError: they are quantized in a way that MLX does not know.
        """
        entry = config.get("quantization")  # mlx-lm writes this and a copy, quantization_config, and reads this one
        if not entry and not config.get("quantization_config"):
            return None
        unknown = CheckpointError(f"{where}: the weights are quantized, but not by MLX; use the original ones")
        if not isinstance(entry, dict):
            raise unknown
        try:
            own = {name: Scheme(**value) for name, value in entry.items() if isinstance(value, dict)}
            rest = {name: value for name, value in entry.items() if not isinstance(value, dict | bool)}
            return cls(Scheme(rest.pop("group_size"), rest.pop("bits"), **rest), own)
        except (KeyError, TypeError):  # it has other fields
            raise unknown from None
        except QuantizationError as error:
            raise CheckpointError(f"{where}: {error}") from None

    def config(self) -> dict:
        """The entries of config.json, as mlx-lm writes them."""
        entry = asdict(self.scheme) | {path: asdict(scheme) for path, scheme in self.own.items()}
        return {"quantization": entry, "quantization_config": entry}

    def __str__(self) -> str:
        schemes = sorted({str(scheme) for scheme in self.own.values()})
        return " and ".join(schemes) if schemes else str(self.scheme)

    def of_matrix(self, path: str) -> Scheme:
        return self.own.get(path, self.scheme)

    def quantized(self, tensors: Mapping[str, Tensor], args: ModelArgs) -> tuple[dict[str, Tensor], list[str]]:
        """A model's tensors with its projections and embeddings quantized, and warnings.

        As in mlx-lm, a matrix whose rows do not divide into groups stays as it is; a warning says so.

        Raises:
            QuantizationError: no matrix can be quantized.
        """
        matrices = _matrices(Model(args))
        result: dict[str, Tensor] = {}
        unfit: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            path = name.removesuffix(".weight")
            if path not in matrices:
                result[name] = tensor
            elif not self.of_matrix(path).fits(tensor.shape):
                result[name] = unfit[path] = tensor
            else:
                parts = self.of_matrix(path).parts(tensor)
                result |= {f"{path}.{part}": array for part, array in parts.items()}
        if not unfit:
            return result, []
        path, matrix = next(iter(unfit.items()))
        why = f"rows of {matrix.shape[-1]} do not divide into groups of {self.scheme.group_size}"
        if len(unfit) == len(matrices):
            raise QuantizationError(f"no matrix can be quantized: {why}; choose another group size")
        return result, [f"{len(unfit)} of {len(matrices)} matrices are not quantized: {path}: {why}"]


def in_floating_point(checkpoint: Source, quantization: Quantization | None) -> Source:
    """A checkpoint whose quantized matrices are dequantized when they are loaded.

    They are in it under the names that the unquantized model has.

    Args:
        quantization: what the checkpoint's config says; None for one that is not quantized, which stays as it is.

    Raises:
        CheckpointError: a matrix is not quantized as the config says.
    """
    if quantization is None:
        return checkpoint
    tensors = dict(checkpoint.tensors)
    for path in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        parts = {part: tensors.pop(f"{path}.{part}") for part in _PARTS if f"{path}.{part}" in checkpoint.tensors}
        try:
            tensors[f"{path}.weight"] = quantization.of_matrix(path).matrix(parts)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {quoted(path)} {error}") from None
    return replace(checkpoint, tensors=tensors)


def _matrices(model: Model) -> dict[str, nn.Module]:
    """The projections and embeddings of a model, which is not evaluated, by module path."""
    return {path: module for path, module in model.named_modules() if model.quant_predicate(path, module)}
