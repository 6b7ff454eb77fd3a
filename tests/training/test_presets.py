"""The presets' sizes and start weights."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ttt.model import Model
from mlx_ttt.training.presets import PRESETS, initialize

from ..models import KINDS


@pytest.mark.parametrize(("name", "millions"), [("125m", 125), ("350m", 350), ("760m", 760), ("1.3b", 1300)])
def test_sizes(name, millions):
    """What the name says, within the paper's rounding; half a million tokens a step."""
    preset = PRESETS[name]
    args = preset.args("linear", 32_000)
    parameters = sum(w.size for _, w in tree_flatten(Model(args).parameters()))  # nothing is computed for it
    assert parameters / 1e6 == pytest.approx(millions, rel=0.12)
    assert preset.defaults.batch_size * preset.defaults.length == 2**19


@pytest.mark.parametrize("layer", KINDS)
def test_start_weights(layer):
    model = Model(PRESETS["tiny"].args(layer, 500))
    initialize(model, 3)
    weights = dict(tree_flatten(model.parameters()))
    block = "model.layers.1.seq_modeling_block."
    for name in ("model.embed_tokens.weight", block + "q_proj.weight", block + "W1", block + "learnable_ttt_lr_weight"):
        assert math.sqrt(mx.var(weights[name]).item()) == pytest.approx(0.02, rel=0.1), name
    assert math.sqrt(mx.var(weights[block + "conv_q.weight"]).item()) == pytest.approx(0.5, rel=0.1)
    for name in (block + "b1", block + "learnable_token_idx", block + "conv_q.bias"):
        assert not weights[name].any(), name
    again = Model(PRESETS["tiny"].args(layer, 500))
    initialize(again, 3)
    assert all(mx.array_equal(w, weights[name]) for name, w in tree_flatten(again.parameters()))
    initialize(again, 4)
    assert not mx.array_equal(again.model.embed_tokens.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model(name, layer):
    args = PRESETS[name].args(layer, 1000)
    assert args.ttt_layer_type == layer
    assert args.ttt_base_lr == {"linear": 1.0, "mlp": 0.1}[layer]
    assert args.pre_conv and args.share_qk and args.use_gate
