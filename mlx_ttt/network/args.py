"""The official configuration of a TTT language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlx_lm.models.base import BaseModelArgs

from .inner import INNER_MODELS, InnerModel


@dataclass
class ModelArgs(BaseModelArgs):
    """What a config.json says of the network: the official field names and defaults.

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

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for name in (*sizes, "num_attention_heads", "mini_batch_size", "conv_kernel"):
            self._check(name, int, lambda x: x > 0, "a positive integer")
        for name in ("rms_norm_eps", "rope_theta", "ttt_base_lr"):
            self._check(name, (int, float), lambda x: 0 < x < float("inf"), "a positive number")
        for name in ("tie_word_embeddings", "pre_conv", "share_qk", "use_gate"):
            self._check(name, bool, lambda x: True, "true or false")
        self._check("ttt_layer_type", str, lambda x: x in INNER_MODELS, " or ".join(f'"{x}"' for x in INNER_MODELS))
        self._check("hidden_act", str, lambda x: x == "silu", '"silu"')
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads of even size"
            )

    def _check(self, name: str, types: type | tuple[type, ...], holds: Callable[..., bool], expected: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool) or not holds(value):
            raise ValueError(f"{name} is {value!r}, expected {expected}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def inner_model(self) -> InnerModel:
        return INNER_MODELS[self.ttt_layer_type]

    @property
    def kind(self) -> str:
        """The layer's name in the paper."""
        return self.inner_model.title

    @property
    def sizes(self) -> str:
        """The network's sizes in words."""
        return (
            f"{self.num_hidden_layers} layers, hidden size {self.hidden_size}, {self.num_attention_heads} heads of"
            f" {self.head_dim}, mini-batch size {self.mini_batch_size}, vocabulary {self.vocab_size}"
        )
