"""The network against the official implementation, whatever the configuration and however the text is split."""

from __future__ import annotations

import itertools
import json
import re

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from mlx_ttt.model import Model, ModelArgs

from .conftest import DATA

BOUND = 2e-4  # of the largest absolute logit
FLAGS = ["".join(bits) for bits in itertools.product("01", repeat=3)]


def configuration(kind: str, flags: str) -> ModelArgs:
    """Two layers with no size or constant at its default."""
    pre_conv, share_qk, use_gate = (flag == "1" for flag in flags)
    return ModelArgs(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        ttt_layer_type=kind,
        ttt_base_lr=0.7,
        mini_batch_size=6,
        conv_kernel=3,
        tie_word_embeddings=flags.count("1") % 2 == 0,
        pre_conv=pre_conv,
        share_qk=share_qk,
        use_gate=use_gate,
    )


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


def build(kind: str, flags: str) -> Model:
    model = Model(configuration(kind, flags))
    model.load_weights(list(model.sanitize(official_weights(model)).items()))
    return model


def largest_error(logits: mx.array, expected: mx.array) -> float:
    """Largest absolute difference, relative to the largest absolute logit expected."""
    return (mx.abs(logits - expected).max() / mx.abs(expected).max()).item()


def in_calls(model: Model, ids: mx.array, cuts) -> mx.array:
    """Logits of a text that is read in several calls, split at `cuts`."""
    cache = model.make_cache()
    bounds = itertools.pairwise([0, *sorted(cuts), ids.shape[1]])
    return mx.concatenate([model(ids[:, start:end], cache=cache) for start, end in bounds], axis=1)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_every_official_configuration(kind, flags):
    expected = mx.load(str(DATA / "configurations.safetensors"))[f"{kind}-{flags}"]
    ids = mx.arange(1, 33)[None] * 7 % 61
    model = build(kind, flags)
    assert largest_error(model(ids)[0], expected) <= BOUND
    assert largest_error(in_calls(model, ids, range(1, 32))[0], expected) <= BOUND


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["linear", "mlp"]), flags=st.sampled_from(FLAGS), cuts=st.sets(st.integers(1, 39)))
def test_any_split_into_calls_gives_the_same_logits(kind, flags, cuts):
    model = build(kind, flags)
    ids = mx.random.randint(0, 61, (2, 40), key=mx.random.key(len(cuts)))
    assert largest_error(in_calls(model, ids, cuts), model(ids)) <= 1e-4


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_texts_in_a_batch_are_what_they_are_alone(kind):
    model = build(kind, "111")
    ids = mx.random.randint(0, 61, (3, 27))
    together = in_calls(model, ids, [5, 6, 20])
    for row, text in zip(together, ids, strict=True):
        assert largest_error(row, in_calls(model, text[None], [5, 6, 20])[0]) <= 1e-6


@pytest.mark.parametrize("padding", [{}, {"left_padding": [0, 9, 23]}, {"lengths": [31, 2, 11]}])
def test_long_texts_go_through_the_layers_in_chunks(padding, monkeypatch):
    model = build("linear", "111")
    ids = mx.random.randint(0, 61, (3, 31))
    counts = mx.arange(31) < mx.array(padding.get("lengths", [31] * 3))[:, None]
    counts = counts & (mx.arange(31) >= mx.array(padding.get("left_padding", [0] * 3))[:, None])

    def logits():
        cache = model.make_cache()
        for c in cache:
            c.expand(3)
            c.prepare(**padding)
        return model(ids, cache=cache) * counts[..., None], mx.concatenate([c.rows for c in cache])

    expected = logits()
    monkeypatch.setattr("mlx_ttt.model._CPU_CHUNK", 7)
    for found, whole in zip(logits(), expected, strict=True):
        assert largest_error(found, whole) <= 1e-5


def test_one_text_is_continued_in_several_ways():
    model = build("linear", "111")
    start, ways = mx.random.randint(0, 61, (1, 9)), mx.random.randint(0, 61, (3, 8))
    cache = model.make_cache()
    model(start, cache=cache)
    together = model(ways, cache=cache)
    whole = model(mx.concatenate([mx.repeat(start, 3, axis=0), ways], axis=1))
    assert largest_error(together, whole[:, 9:]) <= 1e-5


@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_any_convolution_kernel(kernel):
    args = configuration("linear", "111")
    args.conv_kernel = kernel
    model = Model(args)
    ids = mx.random.randint(0, 61, (1, 20))
    assert largest_error(in_calls(model, ids, [1, 2, 3, 9]), model(ids)) <= 1e-5
    x = mx.random.normal((1, 11, 24))
    conv = model.layers[0].conv.conv
    conv.bias = mx.random.normal(conv.bias.shape)
    padded = mx.pad(x, [(0, 0), (kernel - 1, 0), (0, 0)])
    expected = mx.conv1d(padded, conv.weight, groups=24) + conv.bias
    assert mx.allclose(conv(padded), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_training_reaches_every_parameter(kind):
    """A gradient for each parameter, which agrees with a finite difference along a random direction."""
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
    """Rounded weights and activations: near the float32 logits, in the model's dtype, with a float32 state."""
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
