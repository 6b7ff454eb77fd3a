"""A TTT language model on one page, in mlx-lm's model interface.

Parameter names are the official ones (Sun et al. 2024, arXiv 2407.04620, and its PyTorch implementation), so that
checkpoints load as they are. Shapes: B batch, T tokens, H heads, D head dimension, C = H D hidden size, K mini-batch
size, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .args import ModelArgs
from .backend import replaceable
from .cache import LayerState, TTTCache, turned
from .inner import INNER_MODELS
from .learning_scale import Scale, is_one, learning_scale
from .operations import causal_conv1d, geglu, layer_norm, rms_norm, rotate, sigmoid, swiglu
from .rewind import RewindableTTTCache
from .rule import Learner, Tokens, state_shapes


class RMSNorm(nn.RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    def __call__(self, x: mx.array) -> mx.array:
        return layer_norm(x, self.get("weight"), self.get("bias"), self.eps)


class CausalConv1d(nn.Module):
    """Depthwise convolution over time. weight [C, kernel, 1], bias [C]."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        scale = 1 / math.sqrt(kernel_size)
        self.weight = mx.random.uniform(-scale, scale, (channels, kernel_size, 1))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """x: the inputs with the kernel - 1 before them, [B, kernel - 1 + T, C]. Returns [B, T, C]."""
        return causal_conv1d(x, self.weight, self.bias)


class Conv(nn.Module):
    """The convolution in front of a block (`pre_conv`): RMSNorm, then a causal depthwise convolution."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.kernel_size = args.conv_kernel
        self.norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.conv = CausalConv1d(args.hidden_size, args.conv_kernel)

    def add_history(self, cache: TTTCache) -> None:
        cache.add_history("conv", self.kernel_size - 1, self.norm.weight.size)

    def __call__(self, x: mx.array, cache: LayerState) -> mx.array:
        return self.conv(cache.with_history("conv", self.norm(x), self.kernel_size - 1))


class SwiGLU(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class RoPE(nn.Module):
    """Rotates adjacent pairs (2m, 2m + 1) by (position mod K) theta^(-2m / D): each mini-batch counts from 0."""

    def __init__(self, head_dim: int, mini_batch_size: int, theta: float):
        super().__init__()
        frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
        angle = np.arange(mini_batch_size)[:, None, None] * frequency  # [K, 1, D/2]
        self._cos = mx.array(np.repeat(np.cos(angle), 2, axis=-1), mx.float32)  # [K, 1, D]
        self._sin = mx.array(np.stack([-np.sin(angle), np.sin(angle)], axis=-1).reshape(self._cos.shape), mx.float32)

    def __call__(self, q: mx.array, k: mx.array, phase: Sequence[int] | mx.array) -> tuple[mx.array, mx.array]:
        """q and k [B, T, H, D] of the T tokens from each sequence's phase on."""
        if not isinstance(phase, mx.array):
            phase = mx.array(list(phase[:1] if len(set(phase)) == 1 else phase))  # one table where one is enough
        slots = (phase[:, None] + mx.arange(q.shape[1])) % len(self._cos)  # [B or 1, T]
        cos, sin = self._cos[slots], self._sin[slots]  # [B or 1, T, 1, D]
        return rotate(q, cos, sin), rotate(k, cos, sin)


class TTT(nn.Module):
    """A TTT layer: its hidden state is an inner model, trained on every token it reads."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        C, H, D, K = args.hidden_size, args.num_attention_heads, args.head_dim, args.mini_batch_size
        self.num_heads, self.head_dim, self.mini_batch_size = H, D, K
        self.base_lr = args.ttt_base_lr / D
        self.inner_model = args.inner_model
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
        for name, shape in self.inner_model.weight_shapes(D).items():
            is_bias = name.startswith("b")
            self[name] = mx.zeros((H, *shape)) if is_bias else mx.random.normal((H, *shape), scale=0.02)

    def make_cache(self) -> TTTCache:
        """The state before the first token of one sequence: the learned start weights, no open rows."""
        weights = tuple(self[name][None].astype(mx.float32) for name in self.inner_model.weight_names)
        shapes = state_shapes(self.inner_model, 1, self.num_heads, self.head_dim, self.mini_batch_size)
        cache = TTTCache(weights, mx.zeros(shapes["rows"]))
        if "conv_q" in self:
            cache.add_history("conv_qk", self.kernel_size - 1, self.num_heads * self.head_dim)
        return cache

    def __call__(self, x: mx.array, cache: LayerState, scale: mx.array | None = None) -> mx.array:
        """x [B, T, C]: read T tokens, whatever T is and wherever the mini-batch stands.

        scale: see `learning_rates`.
        """
        B, T, _ = x.shape
        q, k = self.queries_and_keys(x, cache)
        q, k, v = (z.reshape(B, T, self.num_heads, self.head_dim) for z in (q, k, self.v_proj(x)))
        q, k = self.rope(q, k, cache.phase)
        y = cache.update(Tokens(q, k, v, self.learning_rates(x, scale)), self.learner())
        y = self.post_norm(y.reshape(B, T, self.num_heads * self.head_dim))
        if "g_proj" in self:
            y = geglu(self.g_proj(x), y)
        return self.o_proj(y)

    def queries_and_keys(self, x: mx.array, cache: LayerState) -> tuple[mx.array, mx.array]:
        """[B, T, C] each."""
        if "k_proj" in self:
            return self.q_proj(x), self.k_proj(x)
        qk = cache.with_history("conv_qk", self.q_proj(x), self.kernel_size - 1)
        return self.conv_q(qk), self.conv_k(qk)

    def learning_rates(self, x: mx.array, scale: mx.array | None = None) -> mx.array:
        """lr = ttt_base_lr / D sigmoid(x . w + b), [B, T, H], float32; times a learning scale [B or 1, 1, H or 1]."""
        gate = x.astype(mx.float32) @ self.learnable_ttt_lr_weight[:, 0].T + self.learnable_ttt_lr_bias[:, 0]
        lr = self.base_lr * sigmoid(gate)
        return lr if scale is None else scale * lr

    def learner(self) -> Learner:
        gamma, beta = (w.astype(mx.float32) for w in (self.ttt_norm_weight, self.ttt_norm_bias))
        return Learner(self.inner_model, self.token_factors(), gamma, beta)

    def token_factors(self) -> mx.array:
        """t = max(1 / (i + 1) + learnable_token_idx_i, 0), [K], in float32: bfloat16 cannot hold 1/3."""
        token_idx = 1 / mx.arange(1, self.mini_batch_size + 1, dtype=mx.float32)
        return mx.maximum(token_idx + self.learnable_token_idx.astype(mx.float32), 0)


class Block(nn.Module):
    """Convolution, TTT layer and feed-forward network, each added to what it reads."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        if args.pre_conv:
            self.conv = Conv(args)
        self.seq_norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.seq_modeling_block = TTT(args)
        self.ffn_norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = SwiGLU(args)

    def __call__(self, x: mx.array, cache: LayerState | None = None, scale: mx.array | None = None) -> mx.array:
        if cache is None:  # made here, since gradient checkpointing calls a block twice, both times from the start
            cache = self.make_cache()
            cache.expand(x.shape[0])
        return through_block(self, x, cache, scale)

    def make_cache(self) -> TTTCache:
        cache = self.seq_modeling_block.make_cache()
        if "conv" in self:
            self.conv.add_history(cache)
        return cache


@replaceable
def through_block(block: Block, x: mx.array, state: LayerState, scale: mx.array | None = None) -> mx.array:
    """Read x [B, T, C], with learning rates scaled by scale [B or 1, 1, H or 1]. Returns [B, T, C]."""
    if "conv" in block:
        x = x + block.conv(x, state)
    x = x + block.seq_modeling_block(block.seq_norm(x), state, scale)
    return x + block.mlp(block.ffn_norm(x))


class TTTModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: list[TTTCache] | None = None, learning: Scale = 1.0) -> mx.array:
        if is_one(learning):
            return hidden_states(self, inputs, cache)
        H = self.layers[0].seq_modeling_block.num_heads
        return hidden_states(self, inputs, cache, learning_scale(learning, len(self.layers), len(inputs), H))

    def through_blocks(
        self, ids: mx.array, states: Sequence[LayerState | None], scales: mx.array | None = None
    ) -> mx.array:
        """Hidden states [B, T, C] of token ids [B, T], with one state for each block, and a learning scale if any."""
        x = self.embed_tokens(ids)
        for i, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            x = layer(x, state) if scales is None else layer(x, state, scales[i])
        return self.norm(x)


@replaceable
def hidden_states(
    model: TTTModel, ids: mx.array, cache: list[TTTCache] | None, scales: mx.array | None = None
) -> mx.array:
    """Read token ids [B, T] after those that the caches have read. Returns hidden states [B, T, C].

    scales: what the learning rates of each layer are multiplied by, [layers, B or 1, 1, H or 1], float32; None for 1.
    """
    B, T = ids.shape
    for c in cache or ():
        c.expand(B)
    padding = cache[0].left_padding(T) if cache else [0] * B
    ids = turned(ids, [-n for n in padding])  # padding behind the tokens that count
    return turned(model.through_blocks(ids, cache or [None] * len(model.layers), scales), padding)


class Model(nn.Module):
    """Token ids [B, T] to logits [B, T, V]."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = TTTModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: list[TTTCache] | None = None, learning: Scale = 1.0) -> mx.array:
        """Read the tokens after those that the cache has read, or from the start of a text without one.

        Args:
            inputs: token ids, [B, T], any T; each must be less than vocab_size.
            cache: from `make_cache`; updated in place.
            learning: the learning scale, which multiplies all learning rates of these tokens: a number; one for each
                sequence [B]; for each layer and head [layers or 1, H or 1]; or [layers or 1, B or 1, H or 1]. With 1
                the model is as it is. With 0 it learns nothing from these tokens: the open mini-batch is committed in
                time with what it holds already, and from then on the inner weights stay. It may change in every call.

        Returns:
            Logits of the token after each position, [B, T, V].

        Raises:
            ValueError: `learning` has another shape, or a value in it is negative or no finite number.
        """
        return self.head(self.model(inputs, cache, learning))

    def head(self, x: mx.array) -> mx.array:
        """Logits [..., V] of hidden states [..., C]."""
        return self.model.embed_tokens.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def make_cache(self, rewind: bool = False) -> list[TTTCache]:
        """The state before the first token, one cache per layer. With `rewind`, one that can be trimmed."""
        caches = [layer.make_cache() for layer in self.layers]
        return [RewindableTTTCache(c) for c in caches] if rewind else caches

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Split the model over a group of machines, as mlx-lm's models do. See `mlx_ttt/distributed/sharding.py`."""
        shard(self, group)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Official PyTorch tensors as this model's: convolutions [C, 1, kernel] -> [C, kernel, 1], no tied lm_head."""
        weights = dict(weights)
        if self.args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        for name, w in weights.items():
            if ".conv" in name and name.endswith(".weight") and w.ndim == 3 and w.shape[1] == 1:
                weights[name] = w.swapaxes(1, 2)
        return weights

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Which modules may be quantized: projections and embeddings. What the inner model learns with is in none."""
        return lambda path, module: isinstance(module, nn.Linear | nn.Embedding)

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Which parameters follow the model's dtype: all but the inner model's, which stay float32."""
        inner = {"learnable_token_idx", *(name for model in INNER_MODELS.values() for name in model.weight_names)}
        prefixes = ("learnable_ttt_lr_", "ttt_norm_")

        def follows(path: str) -> bool:
            name = path.rsplit(".", 1)[-1]
            return name not in inner and not name.startswith(prefixes)

        return follows


def has_dropout(module: nn.Module) -> bool:
    """Whether it drops values (LoRA layers may), and other ones whenever it is computed again."""
    kinds = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)
    return module.training and any(isinstance(m, kinds) for m in module.modules())


@replaceable
def prepare(model: Model) -> None:
    """Called with a loaded model. A backend may give it a form that its device reads better: same names and values."""


@replaceable
def computes_when_called() -> bool:
    """Whether a call for one token returns only when it has been computed. Otherwise a device computes it meanwhile."""
    return False


@replaceable
def shard(model: Model, group: mx.distributed.Group | None) -> None:
    """Keep one machine's part of a model. Alone, the network knows no other machines."""
    raise NotImplementedError("this model has no sharding plugged in: take Model from mlx_ttt.model")
