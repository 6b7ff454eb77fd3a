"""Matrices in a few bits: which and how, and the way there and back, in MLX's format and with mlx-lm's names.

A matrix `PATH.weight` [out, in] in b bits and groups of g is stored as `PATH.weight` [out, in · b / 32], uint32,
`PATH.scales` [out, in / g], and in the mode "affine" `PATH.biases` [out, in / g].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from ..errors import CheckpointError, QuantizationError
from ..model import Model, ModelArgs
from .tensor import Tensor, dtype_name
from .untrusted import quoted

_PARTS = ("weight", "scales", "biases")
# The bits and the group sizes that MLX has in each mode, its defaults first.
_MODES = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantized, in MLX's terms; what is None becomes MLX's default for the mode.

    Raises:
        QuantizationError: MLX has no such combination.
    """

    group_size: int | None = None
    bits: int | None = None
    mode: str = "affine"

    def __post_init__(self):
        if not isinstance(self.mode, str) or self.mode not in _MODES:
            raise QuantizationError(f"the quantization mode is {quoted(self.mode)}, none of {', '.join(_MODES)}")
        for name, allowed in zip(("bits", "group_size"), _MODES[self.mode], strict=True):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, allowed[0])
            elif type(value) is not int or value not in allowed:
                choice = ", ".join(map(str, sorted(allowed)))
                raise QuantizationError(f"{name} is {quoted(value)}; the quantization mode {self.mode} allows {choice}")

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
        """A matrix [out, in] quantized. Whoever reads its parts once, one after the other, reads the matrix once."""
        layout = self.layout(matrix.shape, matrix.dtype)
        waiting: dict[str, mx.array] = {}  # made when another part was read

        def read(part: str) -> mx.array:
            if part not in waiting:
                arrays = mx.quantize(matrix.read(), **asdict(self))
                mx.eval(arrays)
                waiting.update(zip(layout, arrays, strict=True))
            return waiting.pop(part)

        return {part: Tensor(*kind, lambda part=part: read(part)) for part, kind in layout.items()}

    def matrix(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix [out, in] that these parts hold: in the dtype of its scales, or bfloat16, which holds it exactly.

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

        def read() -> mx.array:
            arrays = {name: part.read() for name, part in parts.items()}
            return mx.dequantize(arrays["weight"], arrays["scales"], arrays.get("biases"), **asdict(self))

        return Tensor(shape, dtype, read)


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
        own = mixed_quant_predicate_builder(recipe, model, scheme.group_size)
        matrices = {path: module for path, module in _matrices(model).items() if scheme.fits(module.weight.shape)}
        return cls(scheme, {path: Scheme(**own(path, module)) for path, module in matrices.items()})

    @classmethod
    def of_config(cls, config: Mapping, where: Path) -> Quantization | None:
        """How the weights of a model directory are quantized; None if they are not.

        Raises:
            CheckpointError: in a way that MLX does not know.
        """
        entry = config.get("quantization")  # mlx-lm writes both and reads this one
        if not entry and not config.get("quantization_config"):
            return None
        try:
            own = {name: Scheme(**value) for name, value in entry.items() if isinstance(value, dict)}
            rest = {name: value for name, value in entry.items() if not isinstance(value, dict | bool)}
            return cls(Scheme(rest.pop("group_size"), rest.pop("bits"), **rest), own)
        except (AttributeError, KeyError, TypeError):  # not an object, or one with other fields
            raise CheckpointError(
                f"{where}: the weights are quantized, but not by MLX; use the original ones"
            ) from None
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
            QuantizationError: that would be every matrix.
        """
        matrices = _matrices(Model(args))
        result, unfit = {}, {}
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

    def dequantized(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The tensors of a quantized model as those of the same model in floating point.

        Raises:
            CheckpointError: a matrix is not quantized in the way that its config says.
        """
        quantized: dict[str, dict[str, Tensor]] = {}
        result = {}
        for name, tensor in tensors.items():
            path, _, part = name.rpartition(".")
            if part in _PARTS and f"{path}.scales" in tensors:
                quantized.setdefault(path, {})[part] = tensor
            else:
                result[name] = tensor
        for path, parts in quantized.items():
            try:
                result[f"{path}.weight"] = self.of_matrix(path).matrix(parts)
            except ValueError as error:
                raise CheckpointError(f"{where}: {quoted(path)} {error}") from None
        return result


def _matrices(model: Model) -> dict[str, nn.Module]:
    """The projections and embeddings of a model, which is not evaluated, by module path."""
    return {path: module for path, module in model.named_modules() if model.quant_predicate(path, module)}
