"""RMSNorm and LayerNorm of MLX, and in C for the tokens of a prompt on a Linux CPU."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import native


class RMSNorm(nn.RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        """x [..., C]; in C where it is [B, T, C]."""
        return native.either(_is_for_c(x, self.weight), self._in_c, self._by_operation, x, self.weight)

    def _by_operation(self, x, weight):
        return mx.fast.rms_norm(x, weight, self.eps)

    def _in_c(self, x, weight):
        y = np.empty_like(x)
        native.call("mlx_ttt_rms_norm", x, weight, y, x.size // x.shape[-1], x.shape[-1], float(self.eps))
        return y


class LayerNorm(nn.LayerNorm):
    def __call__(self, x: mx.array) -> mx.array:
        """x [..., C]; in C where it is [B, T, C]."""
        weight, bias = self.get("weight"), self.get("bias")
        return native.either(_is_for_c(x, weight, bias), self._in_c, self._by_operation, x, weight, bias)

    def _by_operation(self, x, weight, bias):
        return mx.fast.layer_norm(x, weight, bias, self.eps)

    def _in_c(self, x, weight, bias):
        y = np.empty_like(x)
        native.call("mlx_ttt_layer_norm", x, weight, bias, y, x.size // x.shape[-1], x.shape[-1], float(self.eps))
        return y


def _is_for_c(x: mx.array, *parameters: mx.array | None) -> bool:
    fit = all(p is not None and p.shape == x.shape[2:] for p in parameters)
    return fit and native.worthwhile(x.shape[1])
