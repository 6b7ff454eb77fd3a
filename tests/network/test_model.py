"""The network against the official implementation, whatever the configuration and however the text is split."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from mlx_ttt.network.args import ModelArgs
from mlx_ttt.network.model import Model

from ..conftest import DATA
from ..models import BOUND, FLAGS, KINDS, build, configuration, in_calls, largest_error, official_weights, shared


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_official_configuration(kind, flags):
    expected = mx.load(str(DATA / "configurations.safetensors"))[f"{kind}-{flags}"]
    ids = mx.arange(1, 33)[None] * 7 % 61
    model = shared(kind, flags)
    assert largest_error(model(ids)[0], expected) <= BOUND
    assert largest_error(in_calls(model, ids, range(1, 32))[0], expected) <= BOUND


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), flags=st.sampled_from(FLAGS), cuts=st.sets(st.integers(1, 39)))
def test_any_split_into_calls_gives_the_same_logits(kind, flags, cuts):
    model = shared(kind, flags)
    ids = mx.random.randint(0, 61, (2, 40), key=mx.random.key(len(cuts)))
    assert largest_error(in_calls(model, ids, cuts), model(ids)) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_texts_in_a_batch_are_what_they_are_alone(kind):
    model = shared(kind, "111")
    ids = mx.random.randint(0, 61, (3, 27))
    together = in_calls(model, ids, [5, 6, 20])
    for row, text in zip(together, ids, strict=True):
        assert largest_error(row, in_calls(model, text[None], [5, 6, 20])[0]) <= 1e-6


def test_one_text_is_continued_in_several_ways():
    model = shared("linear", "111")
    start, ways = mx.random.randint(0, 61, (1, 9)), mx.random.randint(0, 61, (3, 8))
    cache = model.make_cache()
    model(start, cache=cache)
    together = model(ways, cache=cache)
    whole = model(mx.concatenate([mx.repeat(start, 3, axis=0), ways], axis=1))
    assert largest_error(together, whole[:, 9:]) <= 1e-5


@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_any_convolution_kernel(kernel):
    model = Model(configuration("linear", "111", conv_kernel=kernel))
    ids = mx.random.randint(0, 61, (1, 20))
    assert largest_error(in_calls(model, ids, [1, 2, 3, 9]), model(ids)) <= 1e-5
    x = mx.random.normal((1, 11, 24))
    conv = model.layers[0].conv.conv
    conv.bias = mx.random.normal(conv.bias.shape)
    padded = mx.pad(x, [(0, 0), (kernel - 1, 0), (0, 0)])
    expected = mx.conv1d(padded, conv.weight, groups=24) + conv.bias
    assert mx.allclose(conv(padded), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_every_parameter(kind):
    """Each parameter has a gradient, and it agrees with a finite difference."""
    model = build(kind, "111")
    ids = mx.random.randint(0, 61, (2, 15))

    def loss(parameters):
        model.update(parameters)
        logits = model(ids[:, :-1])
        return -mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), ids[:, 1:, None], -1).mean()

    parameters = model.trainable_parameters()
    gradient = dict(tree_flatten(mx.grad(loss)(parameters)))
    for name, parameter in tree_flatten(parameters):
        assert mx.abs(gradient[name]).max().item() > 0, name
        # The step is small in this parameter alone; float32 leaves about three digits of the difference.
        step = 1e-2 * mx.sign(gradient[name]) * mx.abs(parameter).mean()
        moved = [_replace(parameters, name, parameter + s * step) for s in (1, -1)]
        found = (loss(moved[0]) - loss(moved[1])).item() / 2
        expected = (gradient[name] * step).sum().item()
        assert found == pytest.approx(expected, rel=0.05, abs=2e-6), name


def _replace(parameters, name, value):
    return tree_unflatten([(n, value if n == name else p) for n, p in tree_flatten(parameters)])


def test_inner_parameters_stay_float32():
    model = build("mlp", "111")
    kept = {name.rsplit(".", 1)[-1] for name, _ in tree_flatten(model.parameters()) if not model.cast_predicate(name)}
    assert kept == {
        *("W1", "b1", "W2", "b2", "learnable_token_idx", "learnable_ttt_lr_weight", "learnable_ttt_lr_bias"),
        *("ttt_norm_weight", "ttt_norm_bias"),
    }


def test_token_factors_are_exact_in_half_precision():
    model = build("linear", "000")
    model.set_dtype(mx.bfloat16)
    layer = model.layers[0].seq_modeling_block
    layer.learnable_token_idx = mx.zeros((6,), mx.bfloat16)
    assert layer.token_factors().tolist() == [np.float32(1) / np.float32(i) for i in range(1, 7)]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_model(dtype):
    """Logits are in the model's dtype and near those in float32. The state stays float32."""
    model = build("linear", "111")
    ids = mx.random.randint(0, 61, (1, 40))
    expected = model(ids)
    follows = model.cast_predicate
    model.load_weights(
        [(n, p.astype(dtype) if follows(n) else p) for n, p in tree_flatten(model.parameters())], strict=False
    )
    cache = model.make_cache()
    logits = model(ids, cache=cache)
    assert logits.dtype == dtype
    assert {w.dtype for c in cache for w in (*c.weights, c.rows)} == {mx.float32}
    assert largest_error(logits.astype(mx.float32), expected) <= (0.02 if dtype == mx.float16 else 0.15)


def test_tensors_are_accepted_in_either_layout():
    model = build("linear", "111")
    once = model.sanitize(official_weights(model))
    twice = model.sanitize(once)
    assert all(mx.array_equal(once[name], twice[name]) for name in once)
    assert "lm_head.weight" not in build("linear", "000").sanitize({"lm_head.weight": mx.zeros((61, 24))})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", "24"),
        ("num_hidden_layers", True),
        ("num_attention_heads", 5),
        ("num_attention_heads", 8),
        ("mini_batch_size", -1),
        ("conv_kernel", 0),
        ("ttt_base_lr", float("nan")),
        ("rope_theta", None),
        ("ttt_layer_type", "transformer"),
        ("hidden_act", "relu"),
        ("use_gate", 1),
    ],
)
def test_a_bad_configuration_is_named(field, value):
    fields = json.loads(json.dumps(vars(configuration("linear", "111")))) | {field: value}
    with pytest.raises(ValueError, match=field if field != "num_attention_heads" else "heads"):
        ModelArgs.from_dict(fields)


def test_largest_error_is_relative_to_the_largest_logit():
    assert largest_error(mx.array([1.0, 11.0]), mx.array([2.0, -10.0])) == pytest.approx(2.1)
