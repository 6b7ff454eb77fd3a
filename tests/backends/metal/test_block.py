"""A token through a whole model by kernels, on the harness or a device, against the network as it is."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ttt.backends.metal import layer, rule, side_by_side
from mlx_ttt.network.cache import watched
from mlx_ttt.network.model import Model, SwiGLU

from ...models import KINDS, build, configuration, largest_error
from .test_decode_step import Switch, arrays, decode, started

K = 6  # of the tests' models


@pytest.fixture
def switch(kernels, monkeypatch):
    """On the harness a launch runs at once, so nothing is compiled there."""
    return Switch(monkeypatch, compiled=kernels is None)


def model_of(kind: str, flags: str, **sizes) -> Model:
    """Heads of 16, with projections side by side."""
    model = build(kind, flags, **({"hidden_size": 32} | sizes))
    side_by_side.lay_side_by_side(model)
    return model


def assert_same(switch: Switch, model: Model, B: int, T: int = 8, bound: float = 2e-6) -> None:
    """Logits and state after each of T tokens, all of which are decode steps."""
    ids, results = mx.random.randint(0, 61, (B, T)), {}
    for switch.on in (True, False):
        cache = started(model, B)
        results[switch.on] = decode(model, ids, cache), cache
    assert switch.calls == T
    assert largest_error(results[True][0], results[False][0]) <= bound
    for (name, found), (_, expected) in zip(arrays(results[True][1]), arrays(results[False][1]), strict=True):
        assert found.dtype == expected.dtype and largest_error(found, expected) <= bound, name
    for c, expected in zip(results[True][1], results[False][1], strict=True):
        assert c.offset == expected.offset == [b + 2 + T for b in range(B)]


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(
    "flags", ["000", "111", *(pytest.param(f, marks=pytest.mark.slow) for f in ("010", "101", "001"))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_state_are_those_of_the_network(switch, kind, flags, B):
    """Through commits, of one sequence or of several at different times."""
    assert_same(switch, model_of(kind, flags), B)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(switch, kind, dtype):
    model, ids = build(kind, "111", hidden_size=64), mx.random.randint(0, 61, (2, 8))
    switch.on = False
    exact = decode(model, ids, started(model, 2))
    model.apply(lambda x: x.astype(dtype))
    for block in model.layers:
        of_learner = [n for n in block.seq_modeling_block if n.startswith(("learnable", "ttt_norm", "W", "b"))]
        block.seq_modeling_block.update({n: block.seq_modeling_block[n].astype(mx.float32) for n in of_learner})
    side_by_side.lay_side_by_side(model)
    ordinary = decode(model, ids, started(model, 2))
    switch.on = True
    found = decode(model, ids, started(model, 2))
    assert switch.calls == 8
    assert largest_error(found, exact) <= 1.5 * largest_error(ordinary, exact)


def test_a_token_is_so_many_launches(launches, switch):
    """Of kernels. With the products, the activation and the last residual it is what benchmarks.launches counts."""
    model = model_of("linear", "111")
    cache = started(model, 1)
    decode(model, mx.array([[1, 2, 3, 4, 5]]), cache)  # probes the kernels
    around = ["ttt_conv_norm", "ttt_views_conv", "FORM", "ttt_gated_norm", "ttt_add_norm"]
    for phase, form in ((1, "step"), (2, "step"), (3, "step"), (4, "step"), (5, "chunk"), (0, "step")):
        assert cache[0].phase == [phase]
        del launches.names[:]
        weights = cache[0].weights
        decode(model, mx.array([[7]]), cache)
        assert launches.names == [name.replace("FORM", f"ttt_linear_{form}") for name in around] * 2
        assert (cache[0].weights is weights) == (form == "step")


@pytest.mark.parametrize("kind", KINDS)
def test_signals_and_learning_scale(switch, kind):
    """The same launches, and one more for the scale."""
    model, results = model_of(kind, "111"), {}
    ids, scale = mx.array([[3, 9, 4, 1, 5, 2]] * 2), mx.array([[0.5, 2.0], [0.0, 1.5]])
    for switch.on in (True, False):
        cache, logits = started(model, 2), []
        with watched(cache) as seen:
            for i in range(6):
                logits.append(model(ids[:, i : i + 1], cache=cache, learning=scale))
        signals = [x for layer in seen for found in layer for x in found]
        assert len(signals) == 2 * 6 * 3
        results[switch.on] = [*logits, *signals, *(x for _, x in arrays(cache))]
    assert switch.calls == 6
    for found, expected in zip(results[True], results[False], strict=True):
        assert found.shape == expected.shape and mx.allclose(found, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("kind", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
def test_gradients(switch, with_scratch, kind, B):
    """Of parameters, through a token that leaves all mini-batches open and one that completes one."""
    model = model_of(kind, "111")
    cache, ids = started(model, B), mx.array([[3, 8], [1, 7], [4, 2]])[:B]
    decode(model, mx.ones((B, K - 2 - B), mx.int32), cache)

    def loss(parameters):
        model.update(parameters)
        copies = [c.copy() for c in cache]
        return sum(model(ids[:, i : i + 1], cache=copies).square().mean() for i in range(2)) + sum(
            w.square().mean() for c in copies for w in (*c.weights, c.rows)
        )

    parameters, gradients, switch.calls = model.trainable_parameters(), {}, 0
    for switch.on in (True, False):
        gradients[switch.on] = tree_flatten(mx.grad(loss)(parameters))
        model.update(parameters)
    assert switch.calls == 2
    for (name, found), (_, expected) in zip(gradients[True], gradients[False], strict=True):
        assert mx.allclose(found, expected, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters(switch, quantized):
    """Put around projections that lie side by side already; the others of such a group are multiplied alone."""
    sizes = {"intermediate_size": 64} if quantized else {}  # whole groups of 32
    model = build("linear", "111", hidden_size=64, **sizes)
    if quantized:
        nn.quantize(model, group_size=32, bits=4, class_predicate=model.quant_predicate)
    side_by_side.lay_side_by_side(model)
    decode(model, mx.array([[3]]), started(model, 1))
    keys = ["seq_modeling_block.q_proj", "seq_modeling_block.o_proj", "mlp.up_proj"]
    linear_to_lora_layers(model, 2, {"rank": 4, "dropout": 0.0, "scale": 20.0, "keys": keys})
    for block in model.layers:
        for module in (block.seq_modeling_block.q_proj, block.seq_modeling_block.o_proj, block.mlp.up_proj):
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
    switch.calls = 0
    assert_same(switch, model, 2)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models(switch, bits):
    model = build("linear", "111", hidden_size=64, intermediate_size=64)
    nn.quantize(model, group_size=32, bits=bits, class_predicate=model.quant_predicate)
    side_by_side.lay_side_by_side(model)
    assert_same(switch, model, 2)


def heads_of_twelve(monkeypatch) -> Model:
    return build("linear", "111")


def a_patched_class(monkeypatch) -> Model:
    call = SwiGLU.__call__
    monkeypatch.setattr(SwiGLU, "__call__", lambda self, x: 2 * call(self, x))
    return model_of("linear", "111")


def a_norm_in_float32(monkeypatch) -> Model:
    model = Model(configuration("linear", "000", hidden_size=32))
    model.apply(lambda x: x.astype(mx.float16))
    norm = model.layers[1].ffn_norm
    norm.weight = norm.weight.astype(mx.float32)
    return model


@pytest.mark.parametrize("make", [heads_of_twelve, a_patched_class, a_norm_in_float32], ids=lambda f: f.__name__)
def test_other_models_go_through_the_network(switch, monkeypatch, make):
    """Within the decode step still, also where a mini-batch is completed."""
    model, ids, logits = make(monkeypatch), mx.array([[3, 1, 4, 1, 5]]), {}
    for switch.on in (True, False):
        logits[switch.on] = decode(model, ids, started(model, 1))
    assert largest_error(logits[True], logits[False]) <= 1e-5
    assert switch.calls == 5


@pytest.fixture
def traced(monkeypatch):
    """Really compiled, on any machine: what a device computes that refuses all kernels."""
    monkeypatch.setattr(rule, "available", lambda: True)
    monkeypatch.setattr(rule, "_tiles", lambda variant: None)
    monkeypatch.setattr(layer, "_runs", lambda *call: False)
    return Switch(monkeypatch, compiled=True)


@pytest.mark.slow
def test_two_traces_serve_all_tokens(traced):
    """One for tokens that leave all mini-batches open, and one for those that complete one."""
    model = model_of("linear", "111", num_hidden_layers=1)
    assert_same(traced, model, 2, bound=1e-5)
    assert traced.traces == 2
    model.layers[0].mlp.up_proj.weight *= 2  # no longer side by side
    traced.calls = 0
    assert_same(traced, model, 2, bound=1e-5)
    assert traced.traces == 4
