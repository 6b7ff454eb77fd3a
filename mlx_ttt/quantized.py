"""Quantized layers on a CPU, where MLX's product of many rows and a quantized matrix takes 20 times as long as BLAS's.

So for more than a few rows a matrix is dequantized, multiplied by and forgotten. The model stays as small as it is.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

_FEW = 4  # rows: as many products as dequantizing costs


def _times(x: mx.array, layer: nn.Module) -> mx.array:
    """x [..., in] times the quantized weight [out, in] transposed, [..., out], in float32."""
    weight = mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, mode=layer.mode, dtype=mx.float32
    )
    return x @ weight.T


class CPULinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if x.size <= _FEW * x.shape[-1] else _times(x, self)


class CPUEmbedding(nn.QuantizedEmbedding):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return super().as_linear(x) if x.size <= _FEW * x.shape[-1] else _times(x, self)


def for_cpu(model: nn.Module) -> None:
    """Make a model's quantized layers the ones above; their arrays stay what they are."""
    classes = {nn.QuantizedLinear: CPULinear, nn.QuantizedEmbedding: CPUEmbedding}
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
