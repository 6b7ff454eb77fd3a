"""What surrounds the update rule, up to a whole block: projections, convolutions, RoPE, the learning-rate gate.

Parameter names are the official ones (Sun et al. 2024, arXiv 2407.04620, and its PyTorch implementation), so that
checkpoints load as they are. Shapes: B batch, T tokens, H heads, D head dimension, C = H·D, K mini-batch size.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import native
from .activations import gelu_times, sigmoid, silu_times
from .cache import TTTCache
from .norms import LayerNorm, RMSNorm
from .update import ttt_linear, ttt_mlp


class CausalConv1d(nn.Module):
    """Depthwise convolution over time. weight [C, kernel, 1], bias [C]."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        scale = 1 / math.sqrt(kernel_size)
        self.weight = mx.random.uniform(-scale, scale, (channels, kernel_size, 1))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """x: the inputs with the kernel - 1 before them, [B, kernel - 1 + T, C]; returns [B, T, C]."""
        kernel, C = self.weight.shape[1], x.shape[2]
        fit = self.weight.shape == (C, kernel, 1) and self.bias.shape == (C,)
        in_c = fit and native.worthwhile(x.shape[1] - kernel + 1)
        return native.either(in_c, self._in_c, self._by_operations, x, self.weight, self.bias)

    @staticmethod
    def _by_operations(x, weight, bias):
        weight = weight[..., 0].T  # [kernel, C]
        kernel = weight.shape[0]
        T = x.shape[1] - kernel + 1
        if T == 1:
            return (x * weight).sum(1, keepdims=True) + bias
        # A sum of shifted products: on a CPU three times faster than MLX's grouped convolution.
        return sum((x[:, i : i + T] * weight[i] for i in range(kernel)), bias)

    @staticmethod
    def _in_c(x, weight, bias):
        B, T, C = x.shape[0], x.shape[1] - weight.shape[1] + 1, x.shape[2]
        y = np.empty((B, T, C), np.float32)
        taps = np.ascontiguousarray(weight[..., 0].T)  # [kernel, C]
        native.call("mlx_ttt_convolve", x, taps, bias, y, B, T, C, len(taps))
        return y


class Conv(nn.Module):
    """The convolution in front of a block (`pre_conv`): RMSNorm, then a causal depthwise convolution."""

    def __init__(self, args):
        super().__init__()
        self.kernel_size = args.conv_kernel
        self.norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.conv = CausalConv1d(args.hidden_size, args.conv_kernel)

    def add_history(self, cache: TTTCache) -> None:
        cache.add_history("conv", self.kernel_size - 1, self.norm.weight.size)

    def __call__(self, x: mx.array, cache: TTTCache) -> mx.array:
        return self.conv(cache.with_history("conv", self.norm(x), self.kernel_size - 1))


class SwiGLU(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(silu_times(self.gate_proj(x), self.up_proj(x)))


class RoPE:
    """Rotates adjacent pairs (2m, 2m + 1) by (position mod K) · theta^(-2m / D): positions restart in every
    mini-batch."""

    def __init__(self, head_dim: int, mini_batch_size: int, theta: float):
        frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
        angle = np.arange(mini_batch_size)[:, None, None] * frequency  # [K, 1, D/2]
        self.cos = mx.array(np.repeat(np.cos(angle), 2, axis=-1), mx.float32)  # [K, 1, D]
        self.sin = mx.array(np.stack([-np.sin(angle), np.sin(angle)], axis=-1).reshape(self.cos.shape), mx.float32)

    def table(self, phase: list[int] | mx.array, T: int) -> tuple[mx.array, mx.array]:
        """Factors for T tokens from each phase, as `rotate` takes them, [B or 1, T, 1, D]."""
        if isinstance(phase, mx.array):  # which only the device knows, [B]
            slots = (phase[:, None] + mx.arange(T)) % len(self.cos)  # [B, T]
            return self.cos[slots], self.sin[slots]
        phase = phase[:1] if len(set(phase)) == 1 else phase
        slots = mx.array((np.array(phase)[:, None] + np.arange(T)) % len(self.cos))  # [B or 1, T]
        return self.cos[slots], self.sin[slots]

    @staticmethod
    def rotate(x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
        """x [B, T, H, D], rotated in float32 and returned in its dtype."""
        B, T, _, D = x.shape
        fit = D % 2 == 0 and all(factors.shape in ((1, T, 1, D), (B, T, 1, D)) for factors in table)
        in_c = fit and table[0].shape == table[1].shape and native.worthwhile(T)
        return native.either(in_c, RoPE._in_c, RoPE._by_operations, x, *table).astype(x.dtype)

    @staticmethod
    def _by_operations(x, cos, sin):
        swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
        return x * cos + swapped * sin

    @staticmethod
    def _in_c(x, cos, sin):
        B, T, H, D = x.shape
        y = np.empty_like(x)
        native.call("mlx_ttt_rotate", x, cos, sin, y, B * T, H, D, cos.size // D)
        return y


class TTT(nn.Module):
    """A TTT layer: its hidden state is an inner model, trained on every token it reads."""

    def __init__(self, args):
        super().__init__()
        C, H, D, K = args.hidden_size, args.num_attention_heads, args.head_dim, args.mini_batch_size
        self.num_heads, self.head_dim, self.mini_batch_size = H, D, K
        self.base_lr = args.ttt_base_lr / D
        self.update_rule = {"linear": ttt_linear, "mlp": ttt_mlp}[args.ttt_layer_type]
        self.kernel_size = args.conv_kernel

        self.q_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        if args.share_qk:
            self.conv_q = CausalConv1d(C, args.conv_kernel)
            self.conv_k = CausalConv1d(C, args.conv_kernel)
        else:
            self.k_proj = nn.Linear(C, C, bias=False)
        if args.use_gate:
            self.g_proj = nn.Linear(C, C, bias=False)
        self.rope = RoPE(D, K, args.rope_theta)
        self.post_norm = LayerNorm(C, eps=1e-6)

        self.learnable_ttt_lr_weight = mx.random.normal((H, 1, C), scale=0.02)
        self.learnable_ttt_lr_bias = mx.zeros((H, 1))
        self.learnable_token_idx = mx.zeros((K,))
        self.ttt_norm_weight = mx.ones((H, D))
        self.ttt_norm_bias = mx.zeros((H, D))
        hidden = D if args.ttt_layer_type == "linear" else 4 * D
        self.W1 = mx.random.normal((H, D, hidden), scale=0.02)
        self.b1 = mx.zeros((H, 1, hidden))
        if args.ttt_layer_type == "mlp":
            self.W2 = mx.random.normal((H, hidden, D), scale=0.02)
            self.b2 = mx.zeros((H, 1, D))

    def make_cache(self) -> TTTCache:
        """The state before the first token of one sequence: the learned initial weights, no open rows."""
        weights = tuple(self[name][None].astype(mx.float32) for name in ("W1", "b1", "W2", "b2") if name in self)
        R = sum(d for W in weights[::2] for d in W.shape[-2:])
        rows = mx.zeros((1, self.num_heads, self.mini_batch_size, R))
        cache = TTTCache(weights, rows)
        if "conv_q" in self:
            cache.add_history("conv_qk", self.kernel_size - 1, self.num_heads * self.head_dim)
        return cache

    def __call__(self, x: mx.array, cache: TTTCache) -> mx.array:
        """x [B, T, C]: read T tokens, whatever T is and wherever the mini-batch stands."""
        B, T, C = x.shape
        shape = (B, T, self.num_heads, self.head_dim)
        q, k = self.queries_and_keys(x, cache)
        table = self.rope.table(cache.phase, T)
        tokens = (
            self.rope.rotate(q.reshape(shape), table),
            self.rope.rotate(k.reshape(shape), table),
            self.v_proj(x).reshape(shape),
            self.learning_rates(x),
        )
        gamma, beta = (w.astype(mx.float32) for w in (self.ttt_norm_weight, self.ttt_norm_bias))
        y = cache.update(self.update_rule, tokens, (self.token_factors(), gamma, beta))
        y = self.post_norm(y.reshape(B, T, C))
        if "g_proj" in self:
            y = gelu_times(self.g_proj(x), y)
        return self.o_proj(y)

    def queries_and_keys(self, x: mx.array, cache: TTTCache) -> tuple[mx.array, mx.array]:
        if "k_proj" in self:
            return self.q_proj(x), self.k_proj(x)
        qk = cache.with_history("conv_qk", self.q_proj(x), self.kernel_size - 1)
        return self.conv_q(qk), self.conv_k(qk)

    def learning_rates(self, x: mx.array) -> mx.array:
        """lr = ttt_base_lr / D · sigmoid(x · w + b), [B, T, H], float32."""
        gate = x.astype(mx.float32) @ self.learnable_ttt_lr_weight[:, 0].T + self.learnable_ttt_lr_bias[:, 0]
        return self.base_lr * sigmoid(gate)

    def token_factors(self) -> mx.array:
        """t = max(1 / (i + 1) + learnable_token_idx_i, 0), [K], in float32: bfloat16 cannot hold 1/3."""
        token_idx = 1 / mx.arange(1, self.mini_batch_size + 1, dtype=mx.float32)
        return mx.maximum(token_idx + self.learnable_token_idx.astype(mx.float32), 0)


class Block(nn.Module):
    """Convolution, TTT layer and feed-forward network, each added to what it reads."""

    def __init__(self, args):
        super().__init__()
        if args.pre_conv:
            self.conv = Conv(args)
        self.seq_norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.seq_modeling_block = TTT(args)
        self.ffn_norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = SwiGLU(args)

    def __call__(self, x: mx.array, cache: TTTCache | None = None) -> mx.array:
        if cache is None:  # made here: gradient checkpointing calls a block twice, and both times from the start
            cache = self.make_cache()
            cache.expand(x.shape[0])
        if "conv" in self:
            x = x + self.conv(x, cache)
        x = x + self.seq_modeling_block(self.seq_norm(x), cache)
        return x + self.mlp(self.ffn_norm(x))

    def make_cache(self) -> TTTCache:
        cache = self.seq_modeling_block.make_cache()
        if "conv" in self:
            self.conv.add_history(cache)
        return cache
