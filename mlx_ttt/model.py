"""A TTT language model on one page, in mlx-lm's model interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs

from .cache import LayerState, RewindableTTTCache, TTTCache
from .compiled_step import CompiledStep
from .layers import Block
from .one_token import TokenReader

_CPU_CHUNK = 512  # tokens that go through the layers at a time on a CPU: fewer are slower, more take more memory


@dataclass
class ModelArgs(BaseModelArgs):
    """The official configuration: its field names, its defaults.

    Raises:
        ValueError: a field is missing, ill-typed or outside what the model is defined for.
    """

    model_type: str = "ttt"
    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5504
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    ttt_layer_type: str = "linear"
    ttt_base_lr: float = 1.0
    mini_batch_size: int = 16
    pre_conv: bool = False
    share_qk: bool = False
    use_gate: bool = False
    conv_kernel: int = 4

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            self._check(name, int, lambda x: x > 0, "a positive integer")
        for name in ("num_attention_heads", "mini_batch_size", "conv_kernel"):
            self._check(name, int, lambda x: x > 0, "a positive integer")
        for name in ("rms_norm_eps", "rope_theta", "ttt_base_lr"):
            self._check(name, (int, float), lambda x: 0 < x < float("inf"), "a positive number")
        for name in ("tie_word_embeddings", "pre_conv", "share_qk", "use_gate"):
            self._check(name, bool, lambda x: True, "true or false")
        self._check("ttt_layer_type", str, lambda x: x in ("linear", "mlp"), '"linear" or "mlp"')
        self._check("hidden_act", str, lambda x: x == "silu", '"silu"')
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads of even size"
            )

    def _check(self, name, types, holds, expected):
        value = getattr(self, name)
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool) or not holds(value):
            raise ValueError(f"{name} is {value!r}, expected {expected}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kind(self) -> str:
        """The layer's name in the paper."""
        return {"linear": "TTT-Linear", "mlp": "TTT-MLP"}[self.ttt_layer_type]

    @property
    def sizes(self) -> str:
        """The network's, in words."""
        return (
            f"{self.num_hidden_layers} layers, hidden size {self.hidden_size}, {self.num_attention_heads} heads of"
            f" {self.head_dim}, mini-batch size {self.mini_batch_size}, vocabulary {self.vocab_size}"
        )


class TTTModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)  # lazy: a prompt's chunks do not ask for it
        self._one_token = TokenReader()
        self._compiled_step = CompiledStep()

    def __call__(self, inputs: mx.array, cache: list[TTTCache] | None = None) -> mx.array:
        T = inputs.shape[1]
        for reader in (self._compiled_step, self._one_token):
            if (x := reader.read(self, inputs, cache)) is not None:
                return x
        if cache is None or T <= _CPU_CHUNK or mx.default_device() != mx.cpu:
            return self._read(inputs, cache)
        chunks = (inputs[:, start : start + _CPU_CHUNK] for start in range(0, T, _CPU_CHUNK))
        return mx.concatenate([self._read(chunk, cache) for chunk in chunks], axis=1)

    def _read(self, inputs: mx.array, cache: list[TTTCache] | None) -> mx.array:
        B, T = inputs.shape
        for c in cache or ():
            c.expand(B)
        padding = cache[0].left_padding(T) if cache else [0] * B
        inputs = _roll(inputs, [-n for n in padding])  # padding behind the tokens that count
        return _roll(self.through_blocks(inputs, cache or [None] * len(self.layers)), padding)

    def through_blocks(self, ids: mx.array, states: Sequence[LayerState | None]) -> mx.array:
        """Hidden states [B, T, C] of token ids [B, T], with one state for each block."""
        x = self.embed_tokens(ids)
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, state)
        return self.norm(x)


def _roll(x: mx.array, n: list[int]) -> mx.array:
    """x [B, T, ...] with each sequence b turned by n_b places."""
    if not any(n):
        return x
    T = x.shape[1]
    places = (mx.arange(T) - mx.array(n)[:, None]) % T  # [B, T]
    return x[mx.arange(len(n))[:, None], places]


class Model(nn.Module):
    """Token ids [B, T] to logits [B, T, V]."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = TTTModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: list[TTTCache] | None = None) -> mx.array:
        """Read the tokens after those that the cache has read, or from the start of a text without one.

        Args:
            inputs: token ids, [B, T], any T; each must be less than vocab_size.
            cache: from `make_cache`; updated in place.

        Returns:
            Logits of the token after each position, [B, T, V].
        """
        x = self.model(inputs, cache)
        return self.model.embed_tokens.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def make_cache(self, rewind: bool = False) -> list[TTTCache]:
        """The state before the first token, one cache per layer; with `rewind` one that can be trimmed."""
        caches = [layer.make_cache() for layer in self.layers]
        return [RewindableTTTCache(c) for c in caches] if rewind else caches

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
    def quant_predicate(self):
        """Which modules may be quantized: projections and embeddings. What the inner model learns with is in none."""
        return lambda path, module: isinstance(module, nn.Linear | nn.Embedding)

    @property
    def cast_predicate(self):
        """Which parameters follow the model's dtype: all but the inner model's, which stay float32."""
        inner = ("W1", "b1", "W2", "b2", "learnable_token_idx")
        prefixes = ("learnable_ttt_lr_", "ttt_norm_")

        def follows(path: str) -> bool:
            name = path.rsplit(".", 1)[-1]
            return name not in inner and not name.startswith(prefixes)

        return follows
