"""Small models that the tests share, and how to compare what they return."""

from __future__ import annotations

import functools
import itertools
import math
import re

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_ttt.model import Model, ModelArgs

KINDS = ["linear", "mlp"]
FLAGS = ["".join(bits) for bits in itertools.product("01", repeat=3)]  # pre_conv, share_qk, use_gate
VOCABULARY = 61
BOUND = 2e-4  # against the official implementation, relative to the largest absolute logit


def configuration(kind: str, flags: str, **sizes) -> ModelArgs:
    """Two layers with no size or constant at its default."""
    pre_conv, share_qk, use_gate = (flag == "1" for flag in flags)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "ttt_layer_type": kind,
        "ttt_base_lr": 0.7,
        "mini_batch_size": 6,
        "conv_kernel": 3,
        "tie_word_embeddings": flags.count("1") % 2 == 0,
        "pre_conv": pre_conv,
        "share_qk": share_qk,
        "use_gate": use_gate,
    }
    return ModelArgs(**(fields | sizes))


def official_weights(model: Model) -> dict[str, mx.array]:
    """Random weights in the official names and layout, large enough that each matters."""
    rng = np.random.RandomState(0)
    weights = {}
    for name, parameter in sorted(tree_flatten(model.parameters())):
        shape = parameter.shape
        if re.search(r"conv(_[qk])?\.weight$", name):
            shape = (shape[0], 1, shape[1])  # PyTorch's layout
        x = rng.standard_normal(shape)
        if re.search(r"norm[._]weight$", name):
            x = 1 + 0.2 * x
        elif len(shape) == 1 or name.endswith("_bias"):
            x = 0.3 * x
        elif not name.endswith("embed_tokens.weight"):
            x = x / np.sqrt(shape[-1])
        if re.search(r"\.b[12]$", name):
            x = 0.1 * x
        weights[name] = mx.array(x.astype(np.float32))
    return weights


def build(kind: str, flags: str, **sizes) -> Model:
    """A model of this configuration with those weights."""
    model = Model(configuration(kind, flags, **sizes))
    model.load_weights(list(model.sanitize(official_weights(model)).items()))
    return model


@functools.cache
def shared(kind: str, flags: str) -> Model:
    """The same, built once, for tests that do not change it."""
    return build(kind, flags)


def largest_error(logits: mx.array, expected: mx.array) -> float:
    """Largest absolute difference, relative to the largest absolute logit expected."""
    return (mx.abs(logits - expected).max() / mx.abs(expected).max()).item()


def bits_per_byte(model: Model, ids: mx.array, cuts, nbytes: int) -> float:
    """Of a text of so many bytes after BOS, read in one pass from an empty state, in several calls."""
    cache, nats = model.make_cache(), 0.0
    bounds = [0, *cuts, ids.shape[1] - 1]
    for start, end in itertools.pairwise(bounds):
        logits = model(ids[:, start:end], cache=cache).astype(mx.float32)
        targets = ids[:, start + 1 : end + 1, None]
        nats += (mx.logsumexp(logits, -1, keepdims=True) - mx.take_along_axis(logits, targets, -1)).sum().item()
    return nats / math.log(2) / nbytes


def in_calls(model: Model, ids: mx.array, cuts) -> mx.array:
    """Logits of a text that is read in several calls, split at `cuts`."""
    cache = model.make_cache()
    bounds = itertools.pairwise([0, *sorted(cuts), ids.shape[1]])
    return mx.concatenate([model(ids[:, start:end], cache=cache) for start, end in bounds], axis=1)
