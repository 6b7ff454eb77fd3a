"""A decoded token in C: what the MLX operations make of it, wherever it is used."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ttt.model import Model
from mlx_ttt.one_token import MOST

from .native import needs_native, without_native
from .test_model import configuration, largest_error, official_weights

pytestmark = needs_native

BOUND = 1e-5
KINDS = ["linear", "mlp"]


def build(kind, flags, **sizes) -> Model:
    """As in test_model.py, with sizes that C takes."""
    args = configuration(kind, flags)
    vars(args).update({"hidden_size": 32, **sizes})
    model = Model(args)
    model.load_weights(list(model.sanitize(official_weights(model)).items()))
    return model


def started(model, read=(3,)):
    """A cache of sequences that have read so many tokens."""
    caches = [model.make_cache() for _ in read]
    for n, cache in zip(read, caches, strict=True):
        if n:
            model(mx.random.randint(0, 61, (1, n), key=mx.random.key(n)), cache=cache)
    return [layer[0].merge(layer) for layer in zip(*caches, strict=True)]


def copies(cache):
    return [c.copy() for c in cache]


def step(model, cache, token=7):
    """Logits of one token more for every sequence; the cache stays as it is."""
    logits = model(mx.full((len(cache[0].offset), 1), token), cache=copies(cache))
    mx.eval(logits)
    return logits


def assert_same_state(cache, expected):
    for c, e in zip(cache, expected, strict=True):
        assert c.offset == e.offset
        assert c.left_padding(9) == e.left_padding(9)
        assert c.lengths(9) == e.lengths(9)
        assert c.history.keys() == e.history.keys()
        for x, y in zip(
            (*c.weights, c.rows, *c.history.values()), (*e.weights, e.rows, *e.history.values()), strict=True
        ):
            assert x.shape == y.shape and x.dtype == y.dtype
            scale = max(mx.abs(y).max().item(), 1e-6)
            assert mx.abs(x - y).max().item() <= BOUND * scale


@pytest.mark.parametrize("read", [(5,), (0, 3, 5)])
@pytest.mark.parametrize(("flags", "conv_kernel"), [("000", 4), ("010", 4), ("101", 1), ("111", 1), ("111", 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_state_are_those_of_mlx_operations(kind, flags, conv_kernel, read, spy, monkeypatch):
    model = build(kind, flags, conv_kernel=conv_kernel)
    cache = started(model, read)
    ids = mx.random.randint(0, 61, (len(read), 40))
    expected, expected_cache = [], copies(cache)
    for i in range(40):
        logits = without_native(monkeypatch, lambda i=i: model(ids[:, i : i + 1], cache=expected_cache))
        expected.append(logits)
    spy.taken()
    found = [model(ids[:, i : i + 1], cache=cache) for i in range(40)]
    assert spy.taken() == {"token"}
    assert max(largest_error(x, y) for x, y in zip(found, expected, strict=True)) <= BOUND
    assert_same_state(cache, expected_cache)


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 1}, {"num_attention_heads": 4}, {"mini_batch_size": 1}])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind, sizes, spy, monkeypatch):
    model = build(kind, "111", **sizes)
    cache = started(model, (1, 2))
    spy.taken()
    found = step(model, cache)
    assert spy.taken() == {"token"}
    assert largest_error(found, without_native(monkeypatch, lambda: step(model, cache))) <= BOUND


def test_a_large_model_goes_through_several_threads(spy, monkeypatch):
    model = build("linear", "111", hidden_size=512, num_attention_heads=8, intermediate_size=1000)
    cache = started(model, (1, 2, 7))
    spy.taken()
    found = step(model, cache)
    assert spy.taken() == {"token"}
    assert largest_error(found, without_native(monkeypatch, lambda: step(model, cache))) <= BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_cache_stays_as_it_is(kind):
    """Through three mini-batches, whose last tokens write weights."""
    model = build(kind, "111")
    cache = started(model, (2, 5))
    for _ in range(18):
        copied = copies(cache)
        before = [np.array(x) for _, x in tree_flatten([c._arrays for c in copied])]
        model(mx.array([[3], [4]]), cache=cache)
        after = [np.array(x) for _, x in tree_flatten([c._arrays for c in copied])]
        assert all(map(np.array_equal, after, before))
        assert [c.offset for c in cache] == [[n + 1 for n in c.offset] for c in copied]


def test_the_learned_weights_stay_as_they_are():
    """A new cache shares them."""
    model = build("linear", "111", mini_batch_size=1)
    before = [np.array(x) for _, x in tree_flatten(model.parameters())]
    model(mx.array([[3]]), cache=model.make_cache())
    assert all(map(np.array_equal, (np.array(x) for _, x in tree_flatten(model.parameters())), before))


@pytest.mark.parametrize(("kind", "flags"), [("linear", "111"), ("mlp", "000")])
def test_every_parameter_can_be_replaced(kind, flags, spy, monkeypatch):
    model = build(kind, flags)
    cache = started(model, (1, 2, 4))
    for name, parameter in tree_flatten(model.model.parameters()):
        before = step(model, cache)
        model.model.load_weights([(name, parameter * 1.5 + 0.5)], strict=False)
        spy.taken()
        found = step(model, cache)
        assert spy.taken() == {"token"}
        assert largest_error(found, without_native(monkeypatch, lambda: step(model, cache))) <= BOUND, name
        if name.rsplit(".", 1)[-1] not in ("W1", "b1", "W2", "b2"):  # where a text starts
            assert largest_error(found, before) > 1e-4, name
        model.model.load_weights([(name, parameter)], strict=False)


def add_bias(model):
    model.layers[0].mlp.up_proj.bias = mx.ones((40,))


def change_eps(model):
    for norm in (model.layers[0].conv.norm, model.layers[0].seq_norm, model.layers[0].ffn_norm):
        norm.eps = 0.5


def change_one_eps(model):
    model.layers[1].ffn_norm.eps = 0.5


def change_last_eps(model):
    model.model.norm.eps = 0.5


def change_post_norm_eps(model):
    model.layers[1].seq_modeling_block.post_norm.eps = 0.5


def change_base_lr(model):
    model.layers[0].seq_modeling_block.base_lr *= 3


@pytest.mark.parametrize(
    "change",
    [add_bias, change_eps, change_one_eps, change_last_eps, change_post_norm_eps, change_base_lr],
    ids=lambda f: f.__name__,
)
def test_every_setting_can_be_changed(change, monkeypatch):
    model = build("linear", "111")
    cache = started(model, (1, 2, 4))
    before = step(model, cache)
    change(model)
    found = step(model, cache)
    assert largest_error(found, without_native(monkeypatch, lambda: step(model, cache))) <= BOUND
    assert largest_error(found, before) > 1e-4


def test_a_layer_can_be_added_or_taken_away(spy, monkeypatch):
    model = build("linear", "111")
    step(model, started(model))
    (last,) = model.layers[-1:]
    for change in (lambda: model.layers.append(last), lambda: model.layers.__delitem__(slice(-2, None))):
        change()
        cache = started(model)
        spy.taken()
        found = step(model, cache)
        assert spy.taken() == {"token"}
        assert largest_error(found, without_native(monkeypatch, lambda cache=cache: step(model, cache))) <= BOUND


def test_a_cache_of_another_model_is_refused():
    model = build("linear", "111")
    cache = started(model)
    for wrong in (cache[:1], cache * 2):
        with pytest.raises(ValueError, match="zip"):
            step(model, wrong)


class Doubled(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def lora(model):
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    for name, parameter in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            model.load_weights([(name, mx.random.normal(parameter.shape, scale=0.1))], strict=False)


def subclass(model):
    block = model.layers[1].mlp
    doubled = Doubled(32, 40, bias=False)
    doubled.weight = block.gate_proj.weight
    block.gate_proj = doubled


def bias(model):
    attention = model.layers[0].seq_modeling_block
    projection = nn.Linear(32, 32, bias=True)
    projection.weight, projection.bias = attention.o_proj.weight, mx.ones((32,))
    attention.o_proj = projection


def quantize(model):
    nn.quantize(
        model, group_size=32, bits=8, class_predicate=lambda _, m: isinstance(m, nn.Linear) and m.weight.shape[1] == 32
    )


def halve(model):
    follows = model.cast_predicate
    parameters = [(n, p.astype(mx.float16) if follows(n) else p) for n, p in tree_flatten(model.parameters())]
    model.load_weights(parameters, strict=False)


@pytest.mark.parametrize("change", [lora, subclass, bias, quantize, halve], ids=lambda f: f.__name__)
def test_other_layers_are_left_to_mlx(change, spy, monkeypatch):
    model = build("linear", "111")
    cache = started(model)
    before = step(model, cache)
    change(model)
    spy.taken()
    found = step(model, cache)
    assert "token" not in spy.taken()
    assert largest_error(found, without_native(monkeypatch, lambda: step(model, cache))) <= BOUND
    assert largest_error(found.astype(mx.float32), before) > 1e-6
    for _ in range(8):
        logits = model(mx.array([[4]]), cache=cache)
    assert mx.isfinite(logits).all()


@pytest.mark.parametrize("sizes", [{"hidden_size": 24}, {"intermediate_size": 42}])
def test_odd_sizes_are_left_to_mlx(sizes, spy, monkeypatch):
    model = build("linear", "111", **sizes)
    cache = started(model)
    found = step(model, cache)
    assert "token" not in spy.taken()
    assert largest_error(found, without_native(monkeypatch, lambda: step(model, cache))) <= BOUND


@pytest.mark.parametrize("padding", [{"left_padding": [1, 0]}, {"lengths": [0, 1]}])
def test_padding_is_left_to_mlx(padding, spy):
    model = build("linear", "111")
    cache = started(model, (1, 3))
    expected = step(model, cache)
    padded = copies(cache)
    for c in padded:
        c.prepare(**padding)
    spy.taken()
    logits = model(mx.array([[7], [7]]), cache=padded)
    assert "token" not in spy.taken()
    assert largest_error(logits[1], expected[1]) <= BOUND
    for c, was in zip(padded, cache, strict=True):
        assert c.offset == [1, 4]
        assert all(
            mx.array_equal(x[0], y[0]) for x, y in zip((*c.weights, c.rows), (*was.weights, was.rows), strict=True)
        )


def test_rewindable_caches_are_left_to_mlx(spy):
    model = build("linear", "111")
    cache = model.make_cache(rewind=True)
    first = model(mx.array([[7]]), cache=cache)
    for c in cache:
        assert c.trim(1) == 1
    assert largest_error(model(mx.array([[7]]), cache=cache), first) <= BOUND
    assert "token" not in spy.taken()


@pytest.mark.parametrize("B", [MOST, MOST + 1])
def test_more_sequences_than_that_are_left_to_mlx(B, spy, monkeypatch):
    model = build("linear", "111")
    cache = started(model, range(B))
    spy.taken()
    found = step(model, cache)
    assert ("token" in spy.taken()) == (B == MOST)
    assert largest_error(found, without_native(monkeypatch, lambda: step(model, cache))) <= BOUND


def test_a_single_cache_continues_several_ways(spy):
    model = build("linear", "111")
    cache = started(model)
    together = model(mx.array([[1], [2]]), cache=(both := copies(cache)))
    assert largest_error(together[1], step(model, cache, 2)[0]) <= BOUND
    spy.taken()
    model(mx.array([[1], [2]]), cache=both)
    assert spy.taken() == {"token"}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_mlx_operations(kind, spy, monkeypatch):
    """In the parameters, and in the state; afterwards tokens go through C again."""
    model = build(kind, "111")
    cache = started(model, (2, 5))
    step(model, cache)
    spy.taken()

    def two_tokens(cache):
        cache = copies(cache)
        return sum((model(mx.full((2, 1), i), cache=cache) ** 2).sum() for i in (3, 4))

    def of_parameters():
        return nn.value_and_grad(model, lambda m: two_tokens(cache))(model)

    def of_state():
        def function(weights):
            changed = copies(cache)
            changed[1].weights = tuple(weights)
            return two_tokens(changed)

        return mx.value_and_grad(function)(list(cache[1].weights))

    for gradients in (of_parameters, of_state):
        found = tree_flatten(gradients())
        assert "token" not in spy.taken()
        expected = dict(tree_flatten(without_native(monkeypatch, gradients)))
        for name, x in found:
            assert mx.abs(x - expected[name]).max() <= 1e-4 * max(mx.abs(expected[name]).max().item(), 1e-3), name
        spy.taken()
        step(model, cache)
        assert spy.taken() == {"token"}


def test_while_it_is_traced_it_is_left_to_mlx(spy, tmp_path):
    """For mx.compile, say, or, without waiting for a C++ compiler, to be exported."""
    model = build("linear", "111")
    cache = started(model)
    expected = step(model, cache)
    spy.taken()
    file, ids = str(tmp_path / "step.mlxfn"), mx.array([[7]])
    mx.export_function(file, lambda ids: model(ids, cache=copies(cache)), ids)
    assert largest_error(mx.import_function(file)(ids)[0], expected) <= BOUND
    assert not spy.taken()


def test_while_parameters_are_traced_it_is_left_to_mlx(spy, tmp_path):
    model = build("linear", "111")
    cache = started(model)
    expected = step(model, cache)
    spy.taken()
    projection = model.layers[1].mlp.up_proj
    file, weight = str(tmp_path / "step.mlxfn"), projection.weight

    def function(weight):
        projection.weight = weight
        return model(mx.array([[7]]), cache=copies(cache))

    mx.export_function(file, function, weight)
    assert largest_error(mx.import_function(file)(weight)[0], expected) <= BOUND
    assert not spy.taken()
    projection.weight = weight
    assert largest_error(step(model, cache), expected) <= BOUND
    assert spy.taken() == {"token"}
