"""Many tokens through a whole model by kernels, on the harness or a device, against the network as it is."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_ttt.backends.metal import prompt
from mlx_ttt.network.cache import TTTCache, watched
from mlx_ttt.network.model import Model
from mlx_ttt.network.rewind import RewindableTTTCache

from ...models import KINDS, build, largest_error
from .test_decode_step import arrays, started


@pytest.fixture
def switch(kernels, monkeypatch):
    """Has blocks read by kernels, or as they are. What is fused on a device is not on the harness, for time."""
    supports = prompt.supports

    def on(value: bool) -> None:
        monkeypatch.setattr(prompt, "supports", supports if value else lambda *block: False)

    if kernels is not None:
        mx.disable_compile()
    yield on
    mx.enable_compile()


def model_of(kind: str, flags: str, **sizes) -> Model:
    model = build(kind, flags, **({"hidden_size": 32} | sizes))
    model.eval()
    return model


def assert_same(switch, model: Model, caches: list[TTTCache], ids: mx.array, bound: float = 3e-6, **options) -> None:
    """Logits, state and what the learner shows."""
    found = {}
    for on in (True, False):
        switch(on)
        cache = [c.copy() for c in caches]
        with watched(cache) as seen:
            logits = model(ids, cache, **options)
        found[on] = [logits, *(x for layer in seen for signals in layer for x in signals)]
        found[on] += [x for _, x in arrays(cache)]
    assert len(found[True]) == len(found[False])
    for x, y in zip(found[True], found[False], strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert mx.abs(x - y).max() <= bound * max(mx.abs(y).max().item(), 1.0)


@pytest.mark.parametrize("B", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "flags", ["000", "111", *(pytest.param(f, marks=pytest.mark.slow) for f in ("010", "101", "001"))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_and_the_state_after_it_are_those_of_the_network(switch, kind, flags, B):
    """From phases of their own, through mini-batches that are completed."""
    model = model_of(kind, flags)
    assert_same(switch, model, started(model, B), mx.random.randint(0, 61, (B, 9)))


def test_a_learning_scale_and_padding(switch):
    model = model_of("linear", "111")
    for options in ({"left_padding": [0, 2, 3]}, {"lengths": [7, 1, 0]}):
        caches = started(model, 3)
        for c in caches:
            c.prepare(**options)
        assert_same(switch, model, caches, mx.random.randint(0, 61, (3, 7)), learning=[0.5, 2.0, 1.0])


@pytest.mark.slow
def test_a_state_that_can_be_rewound(switch):
    model = model_of("linear", "111")
    caches = [RewindableTTTCache(c) for c in started(model, 2)]
    assert_same(switch, model, caches, mx.random.randint(0, 61, (2, 9)))


@pytest.mark.slow
def test_quantized_models(switch):
    model = model_of("linear", "111", hidden_size=64, intermediate_size=64)
    nn.quantize(model, group_size=32, bits=4, class_predicate=model.quant_predicate)
    assert_same(switch, model, started(model, 2), mx.random.randint(0, 61, (2, 9)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(switch, dtype):
    """No further from float32 than the network in that precision is."""
    model, ids, logits = model_of("linear", "111", hidden_size=64), mx.random.randint(0, 61, (2, 9)), {}
    switch(False)
    exact = model(ids, model.make_cache())
    cast = [
        (path, x.astype(dtype) if model.cast_predicate(path) else x) for path, x in tree_flatten(model.parameters())
    ]
    model.load_weights(cast)
    for on in (True, False):
        switch(on)
        logits[on] = model(ids, model.make_cache())
        assert logits[on].dtype == dtype
    assert largest_error(logits[True], exact) <= 1.5 * largest_error(logits[False], exact)


def test_a_prompt_of_any_length_takes_the_same_launches(launches, switch):
    model = model_of("linear", "111")
    switch(True)
    model(mx.array([[1, 2, 3]]), model.make_cache())  # probes the kernels
    for T in (2, 5, 23):
        del launches.names[:]
        mx.eval(model(mx.ones((1, T), mx.int32), model.make_cache()))
        assert launches.names == ["ttt_turned_conv", "ttt_linear_chunk", "ttt_gated_norm", "ttt_add_norm"] * 2


def test_in_training_the_network_stays_as_it_is(launches, switch):
    model = model_of("linear", "111")
    model.train()
    switch(True)
    mx.eval(model(mx.ones((1, 5), mx.int32)))
    assert set(launches.names) == {"ttt_linear_chunk"}


@pytest.mark.slow
def test_gradients(switch, with_scratch):
    """Where somebody takes them of a model that is not in training."""
    model, ids = model_of("linear", "111"), mx.array([[3, 8, 1, 7, 4, 2, 9]])
    cache, parameters, gradients = started(model, 1), model.trainable_parameters(), {}

    def loss(parameters):
        model.update(parameters)
        copies = [c.copy() for c in cache]
        return model(ids, cache=copies).square().mean() + sum(w.square().mean() for c in copies for w in c.weights)

    for on in (True, False):
        switch(on)
        gradients[on] = tree_flatten(mx.grad(loss)(parameters))
        model.update(parameters)
    for (name, found), (_, expected) in zip(gradients[True], gradients[False], strict=True):
        assert mx.allclose(found, expected, rtol=1e-3, atol=1e-6), name


@pytest.mark.slow
def test_fused_operations_are_the_same(monkeypatch):
    """What MLX makes of them, with each number of tokens."""
    for T in (2, 5):
        x, parts = mx.random.normal((2, T, 8)), [mx.random.normal((2, T + 2, 8))[:, i : i + T] for i in range(3)]
        taps, bias = [mx.random.normal((8,)) for _ in range(3)], mx.random.normal((8,))
        found = prompt._plus_convolution(x, parts, taps, bias)
        assert mx.allclose(found, x + sum((p * t for p, t in zip(parts, taps, strict=True)), bias), atol=1e-5)
        rates = prompt._rates(x, bias, mx.array(0.3), mx.array(2.0))
        assert mx.allclose(rates, 0.6 * mx.sigmoid(x + bias), atol=1e-6)
        assert mx.allclose(prompt._swiglu(x, x), x * mx.sigmoid(x) * x, atol=1e-6)
    assert mx.allclose(prompt._token_factors(mx.array([1.0, 0.5]), mx.array([-2.0, 0.1])), mx.array([0, 0.6]))
