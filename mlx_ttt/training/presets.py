"""The sizes of the paper and how it trained them, and defaults for training on from a model.

Source: the official JAX implementation (test-time-training/ttt-lm-jax, commit 6f529b1), which the paper (Sun et al.
2024, arXiv 2407.04620) names as its code: `CONFIGS` in ttt/models/model.py, the scripts in scripts/ttt_linear and
scripts/ttt_mlp, the defaults in ttt/infra/optimizers.py.

| value | source |
|---|---|
| layers, hidden size, heads | `CONFIGS` |
| intermediate size, mini-batch 16, RoPE base, tied embeddings, convolution of 4 | `CONFIGS` |
| Mamba backbone: convolutions, shared q and k, gate | the paper's default; `ttt_linear`, `ttt_mlp` in ttt/README.md |
| steps, peak learning rate, 0.5 million tokens a step | the scripts (256 sequences of 2 048 tokens) |
| warm-up of a tenth of the steps, cosine to 1e-5 | the scripts |
| AdamW with betas 0.9 and 0.95, weight decay 0.1, clipping at 1 | the scripts; optimizers.py |
| inner learning rate 1.0 (TTT-Linear), 0.1 from 0.01 during the warm-up (TTT-MLP) | the scripts; ttt/README.md |
| start: normal with 0.02, zero biases, convolutions uniform with the variance 1 / 4 | model.py, ttt_layer.py |

The vocabulary is the tokenizer's: the paper's has 32 000 tokens (Llama 2). `tiny` and the defaults for a model that is
trained on are not from the paper.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..network.args import ModelArgs
from ..network.inner import INNER_MODELS
from ..network.model import Model

PAPER_LENGTH = 2048  # tokens a sequence


@dataclass(frozen=True)
class Defaults:
    """How something is trained unless the user says otherwise. The warm-up is a tenth of the steps."""

    steps: int
    length: int  # tokens a sequence
    batch_size: int  # sequences a step
    lr: float
    end_lr: float
    weight_decay: float


@dataclass(frozen=True)
class Preset:
    """A size of the network and how to train it."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    defaults: Defaults

    def args(self, layer: str, vocab_size: int) -> ModelArgs:
        """The network with TTT layers of this kind ("linear" or "mlp") on the Mamba backbone."""
        return ModelArgs(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            ttt_layer_type=layer,
            ttt_base_lr=INNER_MODELS[layer].base_lr,
            pre_conv=True,
            share_qk=True,
            use_gate=True,
        )


def _paper(steps: int, lr: float) -> Defaults:
    return Defaults(steps, PAPER_LENGTH, batch_size=256, lr=lr, end_lr=1e-5, weight_decay=0.1)


PRESETS = {
    "tiny": Preset(4, 256, 4, 704, Defaults(1000, 1024, batch_size=16, lr=3e-3, end_lr=1e-5, weight_decay=0.1)),
    "125m": Preset(12, 768, 12, 2048, _paper(4_800, 3e-3)),
    "350m": Preset(24, 1024, 16, 2736, _paper(13_500, 1.5e-3)),
    "760m": Preset(24, 1536, 16, 4096, _paper(29_000, 1.25e-3)),
    "1.3b": Preset(24, 2048, 32, 5504, _paper(50_000, 1e-3)),
}
# A model that is trained on: a tenth of the paper's rate, so that it does not forget what it knows.
FROM_MODEL = Defaults(100, 4096, batch_size=4, lr=3e-4, end_lr=3e-5, weight_decay=0.05)

INNER_LR_START = {"mlp": 0.01}  # of TTT-MLP; it rises to its base learning rate during the warm-up


def initialize(model: Model, seed: int) -> None:
    """Give a new model random weights as the official implementation does. The same seed gives the same weights."""
    mx.random.seed(seed)
    start: list[tuple[str, Any]] = []
    for name, parameter in dict(tree_flatten(model.parameters())).items():
        if re.search(r"(proj|embed_tokens|lm_head)\.weight$|\.W\d$|learnable_ttt_lr_weight$", name):
            start.append((name, mx.random.normal(parameter.shape, scale=0.02)))
        elif re.search(r"conv(_[qk])?\.weight$", name):
            bound = math.sqrt(3 / parameter.shape[1])  # [C, kernel, 1]: a variance of 1 / kernel
            start.append((name, mx.random.uniform(-bound, bound, parameter.shape)))
    model.update(tree_unflatten(start))
