"""A decoded token in C gives what MLX operations give, whatever happens to the model and its state in between."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_ttt
from mlx_ttt.backends.cpu.decode_step import MOST
from mlx_ttt.backends.cpu.prepare import prepare
from mlx_ttt.network.inner import TTT_LINEAR
from mlx_ttt.network.model import Block, CausalConv1d, LayerNorm, Model, SwiGLU

from ... import models
from ...models import KINDS, largest_error
from .c_code import needs_c, without_c

pytestmark = needs_c

BOUND = 1e-5


def build(kind, flags, **sizes) -> Model:
    """Of sizes that C takes."""
    return models.build(kind, flags, **({"hidden_size": 32} | sizes))


def started(model, read=(3,)):
    """A cache of sequences, each of which has read so many tokens."""
    caches = [model.make_cache() for _ in read]
    for n, cache in zip(read, caches, strict=True):
        if n:
            model(mx.random.randint(0, 61, (1, n), key=mx.random.key(n)), cache=cache)
    return [layer[0].merge(layer) for layer in zip(*caches, strict=True)]


def copies(cache):
    return [c.copy() for c in cache]


def step(model, cache, token=7):
    """Logits after one more token of every sequence. The cache stays as it is."""
    logits = model(mx.full((len(cache[0].offset), 1), token), cache=copies(cache))
    mx.eval(logits)
    return logits


def step_in_c(model, cache, spy, monkeypatch, what=""):
    """The same, checked: the token went through C, and MLX operations agree."""
    spy.taken()
    found = step(model, cache)
    assert spy.taken() == {"token"}
    assert largest_error(found, without_c(monkeypatch, lambda: step(model, cache))) <= BOUND, what
    return found


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


@pytest.mark.parametrize("read", [pytest.param((5,), marks=pytest.mark.slow), (0, 3, 5)])
@pytest.mark.parametrize(("flags", "conv_kernel"), [("000", 4), ("010", 4), ("101", 1), ("111", 1), ("111", 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_state_are_those_of_mlx_operations(kind, flags, conv_kernel, read, spy, monkeypatch):
    model = build(kind, flags, conv_kernel=conv_kernel)
    cache = started(model, read)
    ids = mx.random.randint(0, 61, (len(read), 40))
    expected, expected_cache = [], copies(cache)
    for i in range(40):
        logits = without_c(monkeypatch, lambda i=i: model(ids[:, i : i + 1], cache=expected_cache))
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
    step_in_c(model, cache, spy, monkeypatch)


def test_a_large_model_goes_through_several_threads(spy, monkeypatch):
    model = build("linear", "111", hidden_size=512, num_attention_heads=8, intermediate_size=1000)
    cache = started(model, (1, 2, 7))
    step_in_c(model, cache, spy, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_cache_stays_as_it_is(kind):
    """Also at the ends of three mini-batches, where the weights change."""
    model = build(kind, "111")
    cache = started(model, (2, 5))
    for _ in range(18):
        copied = copies(cache)
        before = [np.array(x) for _, x in tree_flatten([c.arrays for c in copied])]
        model(mx.array([[3], [4]]), cache=cache)
        after = [np.array(x) for _, x in tree_flatten([c.arrays for c in copied])]
        assert all(map(np.array_equal, after, before))
        assert [c.offset for c in cache] == [[n + 1 for n in c.offset] for c in copied]


def test_the_learned_weights_stay_as_they_are():
    """They are shared with every new cache, so C must not write to them."""
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
        found = step_in_c(model, cache, spy, monkeypatch, name)
        if name.rsplit(".", 1)[-1] not in ("W1", "b1", "W2", "b2"):  # where a text starts
            assert largest_error(found, before) > 1e-4, name
        model.model.load_weights([(name, parameter)], strict=False)


@pytest.mark.parametrize(("kind", "flags"), [("linear", "111"), ("mlp", "000")])
def test_every_parameter_can_be_changed_in_place(kind, flags, spy, monkeypatch):
    """The array stays the same object, but its memory moves, and the old memory may be gone."""
    model = build(kind, flags)
    cache = started(model, (1, 2, 4))
    for name, parameter in tree_flatten(model.model.parameters()):
        before, saved = step(model, cache), np.array(parameter)
        parameter *= 1.5
        parameter += 0.5
        mx.eval(parameter)
        mx.clear_cache()
        found = step_in_c(model, cache, spy, monkeypatch, name)
        if name.rsplit(".", 1)[-1] not in ("W1", "b1", "W2", "b2"):
            assert largest_error(found, before) > 1e-4, name
        parameter[:] = mx.array(saved)


def change_eps(model, eps=0.5):
    for norm in (model.layers[0].conv.norm, model.layers[0].seq_norm, model.layers[0].ffn_norm):
        norm.eps = eps


def change_eps_to_an_integer(model):
    change_eps(model, 1)


def change_last_eps(model, eps=0.5):
    model.model.norm.eps = eps


def change_last_eps_to_an_integer(model):
    change_last_eps(model, 2)


def change_last_eps_to_one_of_numpy(model):
    change_last_eps(model, np.float32(0.5))


def change_post_norm_eps(model):
    model.layers[1].seq_modeling_block.post_norm.eps = 0.5


def change_base_lr(model):
    model.layers[0].seq_modeling_block.base_lr *= 3


def change_rope(model):
    rope = model.layers[0].seq_modeling_block.rope
    rope._cos = rope._cos * 0.5


def take_the_gate_away(model):
    del model.layers[0].seq_modeling_block["g_proj"]


@pytest.mark.parametrize(
    "change",
    [
        *(change_eps, change_eps_to_an_integer, change_post_norm_eps, change_base_lr, change_rope, take_the_gate_away),
        *(change_last_eps, change_last_eps_to_an_integer, change_last_eps_to_one_of_numpy),
    ],
    ids=lambda f: f.__name__,
)
def test_every_setting_can_be_changed(change, spy, monkeypatch):
    model = build("linear", "111")
    cache = started(model, (1, 2, 4))
    before = step(model, cache)
    change(model)
    found = step_in_c(model, cache, spy, monkeypatch)
    assert largest_error(found, before) > 1e-4


def test_a_gate_can_be_added(spy, monkeypatch):
    model = build("linear", "110")
    cache = started(model)
    before = step(model, cache)
    model.layers[1].seq_modeling_block.g_proj = nn.Linear(32, 32, bias=False)
    found = step_in_c(model, cache, spy, monkeypatch)
    assert largest_error(found, before) > 1e-4


def test_what_was_replaced_does_not_stay_in_memory():
    """It is let go at the next call, even if that is a prompt."""
    model = build("linear", "111")
    step(model, started(model))
    old = [weakref.ref(layer.mlp.up_proj) for layer in model.layers]
    old += [weakref.ref(module.weight) for module in (model.model.embed_tokens, model.model.norm)]
    nn.quantize(model, 32, 8, class_predicate=of_32_columns)
    model.update({"model": {name: {"weight": mx.ones(n)} for name, n in (("embed_tokens", (61, 32)), ("norm", (32,)))}})
    started(model)
    gc.collect()
    assert not any(part() for part in old)


def test_a_layer_can_be_added_or_taken_away(spy, monkeypatch):
    model = build("linear", "111")
    step(model, started(model))
    (last,) = model.layers[-1:]
    for change in (lambda: model.layers.append(last), lambda: model.layers.__delitem__(slice(-2, None))):
        change()
        cache = started(model)
        step_in_c(model, cache, spy, monkeypatch)


def test_a_cache_of_another_model_is_refused():
    model = build("linear", "111")
    cache = started(model)
    for wrong in (cache[:1], cache * 2):
        with pytest.raises(ValueError, match="zip"):
            step(model, wrong)


@pytest.mark.parametrize(
    ("kind", "flags", "sizes"),
    [
        ("mlp", "111", {}),
        ("linear", "011", {}),
        *(("linear", "111", {name: size}) for name, size in [("mini_batch_size", 64), ("num_attention_heads", 4)]),
        *(("linear", "111", {name: size}) for name, size in [("hidden_size", 256), ("conv_kernel", 9)]),
    ],
    ids=str,
)
def test_a_cache_of_another_size_is_for_mlx_to_judge(kind, flags, sizes, monkeypatch):
    models = build("linear", "111"), build(kind, flags, **sizes)
    for model, other in (models, models[::-1]):
        step(model, started(model))
        cache = started(other)
        try:
            expected = without_c(monkeypatch, lambda: step(model, cache))  # noqa: B023
        except (ValueError, KeyError) as error:
            with pytest.raises(type(error)):
                step(model, cache)
        else:
            assert mx.array_equal(step(model, cache), expected)  # history that nobody asks for


@pytest.mark.parametrize(
    "path",
    [
        *("embed_tokens", "norm", "layers.0.ffn_norm", "layers.1.mlp.gate_proj", "layers.1.mlp.down_proj"),
        *(f"layers.1.seq_modeling_block.{name}" for name in ("q_proj", "o_proj", "conv_k", "post_norm")),
    ],
)
def test_parameters_of_other_sizes_are_refused(path):
    model = build("linear", "111")
    cache = started(model)
    step(model, cache)
    module = dict(model.model.named_modules())[path]
    module.weight = mx.ones((module.weight.shape[0] // 2, *module.weight.shape[1:]))
    if path != "embed_tokens":  # of which any number of rows will do
        with pytest.raises(ValueError):
            step(model, cache)
    module.weight = mx.ones((*module.weight.shape[:-1], 400))
    with pytest.raises(ValueError):
        step(model, cache)


def assign_state(c, other):
    c.state = other.state


def assign_weights(c, other):
    c.arrays = {**c.arrays, "weights": other.weights}


@pytest.mark.parametrize(("assign", "read"), [(assign_state, 2), (assign_weights, 9)])
def test_a_state_can_be_assigned_between_tokens(assign, read, monkeypatch):
    """Though C has the arrays at that time."""
    model = build("linear", "111")
    cache, ids = started(model), mx.array([[7]])
    others = started(model, (read,))

    def assign_after_a_token(cache):
        model(ids, cache=cache)
        for c, other in zip(cache, others, strict=True):
            assign(c, other)
        return model(ids, cache=cache)

    expected_cache = copies(cache)
    found = assign_after_a_token(cache)
    expected = without_c(monkeypatch, lambda: assign_after_a_token(expected_cache))
    assert largest_error(found, expected) <= BOUND
    assert_same_state(cache, expected_cache)


def test_a_cache_can_be_pickled_between_tokens():
    model = build("linear", "111")
    cache, ids = started(model), mx.array([[7]])
    model(ids, cache=cache)
    deep = copy.deepcopy(cache)
    model(ids, cache=cache)
    pickled = pickle.loads(pickle.dumps(cache))
    expected = model(ids, cache=cache)
    assert largest_error(model(ids, cache=pickled), expected) <= BOUND
    model(ids, cache=deep)
    assert largest_error(model(ids, cache=deep), expected) <= BOUND
    assert_same_state(deep, cache)


class Doubled(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def subclass(model):
    block = model.layers[1].mlp
    doubled = Doubled(32, 40, bias=False)
    doubled.weight = block.gate_proj.weight
    block.gate_proj = doubled


def module_of_another_class(model):
    """The module stays the same object."""

    class Sum(SwiGLU):
        def __call__(self, x):
            return self.down_proj(self.gate_proj(x) + self.up_proj(x))

    model.layers[1].mlp.__class__ = Sum


def another_inner_model(model):
    """C cannot know what it computes. Here it computes the same, so something else must make the difference."""
    attention = model.layers[0].seq_modeling_block
    attention.inner_model = dataclasses.replace(TTT_LINEAR, name="another")
    attention.base_lr *= 2


def another_block(model):
    class Twice(Block):
        def __call__(self, x, cache=None):
            return 2 * super().__call__(x, cache)

    model.layers[1].__class__ = Twice


def no_block(model):
    class Wrapped(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def __call__(self, x, cache):
            return 2 * self.block(x, cache)

    model.model.layers = [Wrapped(layer) for layer in model.layers]


def norm_without_parameters(model):
    model.layers[1].seq_modeling_block.post_norm = LayerNorm(32, eps=1e-6, affine=False)


def added_bias(model):
    model.layers[0].mlp.up_proj.bias = mx.ones((40,))


def one_eps(model):
    model.layers[1].ffn_norm.eps = 0.5


def transposed(model):
    projection = model.layers[0].seq_modeling_block.v_proj
    projection.weight = projection.weight.T


def bias(model):
    attention = model.layers[0].seq_modeling_block
    projection = nn.Linear(32, 32, bias=True)
    projection.weight, projection.bias = attention.o_proj.weight, mx.ones((32,))
    attention.o_proj = projection


def dora(model):
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0}, use_dora=True)
    change_adapters(model)


def of_32_columns(path, module):
    return isinstance(module, nn.Linear) and module.weight.shape[1] == 32


def mxfp4(model):
    nn.quantize(model, mode="mxfp4", class_predicate=of_32_columns)


@pytest.mark.parametrize(
    "change",
    [
        *(subclass, bias, module_of_another_class, another_inner_model, another_block, no_block),
        *(norm_without_parameters, added_bias, one_eps, transposed, dora, mxfp4),
    ],
    ids=lambda f: f.__name__,
)
def test_other_layers_are_left_to_mlx(change, spy, monkeypatch):
    model = build("linear", "111")
    cache = started(model)
    before = step(model, cache)
    change(model)
    spy.taken()
    found = step(model, cache)
    assert "token" not in spy.taken()
    assert largest_error(found, without_c(monkeypatch, lambda: step(model, cache))) <= BOUND
    assert largest_error(found.astype(mx.float32), before) > 1e-6
    for _ in range(8):
        logits = model(mx.array([[4]]), cache=cache)
    assert mx.isfinite(logits).all()


def quantize(model, bits=8, group_size=32, dtype=mx.float32):
    """What can be, as mlx-lm does it: rows that do not divide into groups stay."""
    halve(model, dtype)
    fits = model.quant_predicate
    nn.quantize(
        model, group_size, bits, class_predicate=lambda p, m: fits(p, m) and m.weight.shape[1] % group_size == 0
    )


def quantize_in_a_mixed_recipe(model):
    predicate = mixed_quant_predicate_builder("mixed_2_6", model, 32)

    nn.quantize(model, class_predicate=lambda path, m: of_32_columns(path, m) and predicate(path, m))


def halve(model, dtype=mx.float16):
    follows = model.cast_predicate
    parameters = [(n, p.astype(dtype) if follows(n) else p) for n, p in tree_flatten(model.parameters())]
    model.load_weights(parameters, strict=False)


def lora(model, dropout=0.0):
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": dropout})
    change_adapters(model)


def change_adapters(model):
    for name, parameter in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            model.load_weights([(name, mx.random.normal(parameter.shape, scale=0.1))], strict=False)


def lora_on_quantized(model):
    quantize(model, 4, dtype=mx.bfloat16)
    lora(model)


CHANGES = [quantize, quantize_in_a_mixed_recipe, halve, lora, lora_on_quantized]


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_other_precisions_and_adapters_are_read_in_c(change, is_prepared, spy, monkeypatch):
    """As mlx-lm loads them, and as we do. In MLX operations, half-precision models round every step."""
    model = build("linear", "111")
    cache = started(model, (1, 2, 4))
    before = step(model, cache)
    change(model)
    if is_prepared:
        prepare(model)
    spy.taken()
    found = step(model, cache)
    assert "token" in spy.taken()
    in_float32(model)
    assert largest_error(found, without_c(monkeypatch, lambda: step(model, cache))) <= (1e-5 if is_prepared else 1e-2)
    assert largest_error(found, before) > 1e-5


def in_float32(model):
    """Widened, so that MLX operations compute in float32."""
    model.apply(lambda x: x.astype(mx.float32) if x.dtype in (mx.float16, mx.bfloat16) else x)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_tokens_are_those_of_mlx_operations(kind, bits, group_size, spy, monkeypatch):
    """Logits, the state and the signals, with a learning scale, beyond the end of a mini-batch."""
    model = build(kind, "111", hidden_size=128, num_attention_heads=2, intermediate_size=136 + group_size)
    quantize(model, bits, group_size, mx.float16)
    prepare(model)
    cache, ids = started(model, (0, 3, 5)), mx.random.randint(0, 61, (3, 6))
    expected_cache = copies(cache)

    def run(cache):
        seen = [mlx_ttt.observe(model, ids[:, i : i + 1], cache, learning=0.7) for i in range(ids.shape[1])]
        return [mx.concatenate([vars(x)[name] for x in seen], 1) for name in ("logits", "loss", "lr", "write_norm")]

    expected = without_c(monkeypatch, lambda: run(expected_cache))
    spy.taken()
    found = run(cache)
    assert spy.taken() == {"token", "multiply"}  # the head is a layer by itself
    for x, y in zip(found, expected, strict=True):
        assert mx.abs(x - y).max().item() <= BOUND * mx.abs(y).max().item()
    assert_same_state(cache, expected_cache)


def test_dropout_is_left_to_mlx(spy):
    model = build("linear", "111")
    lora(model, dropout=0.5)
    cache = started(model)
    for is_training in (True, False, True):
        model.train(is_training)
        spy.taken()
        step(model, cache)
        assert ("token" in spy.taken()) == (not is_training)


def test_an_adapter_that_is_trained_on_is_read_again(spy, monkeypatch):
    model = build("linear", "111")
    quantize(model, 4)
    lora(model)
    cache = started(model)
    before = step(model, cache)
    change_adapters(model)
    found = step_in_c(model, cache, spy, monkeypatch)
    assert largest_error(found, before) > 1e-4


@pytest.mark.parametrize("kind", [Block, SwiGLU, CausalConv1d])
def test_patched_classes_are_left_to_mlx(kind, spy, monkeypatch):
    """By somebody who wants to see activations, say."""
    old = build("linear", "111")
    expected = step(old, started(old))
    call, seen = kind.__call__, []

    def patched(self, *arguments):
        seen.append(call(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(kind, "__call__", patched)
    for model in (old, build("linear", "111")):
        cache = started(model)
        seen.clear()
        spy.taken()
        assert largest_error(step(model, cache), expected) <= BOUND
        assert len(seen) >= len(model.layers) and "token" not in spy.taken()
    monkeypatch.setattr(kind, "__call__", call)
    step(model, cache)
    assert spy.taken() == {"token"}


@pytest.mark.parametrize("sizes", [{"hidden_size": 24}, {"intermediate_size": 42}])
def test_odd_sizes_are_left_to_mlx(sizes, spy, monkeypatch):
    model = build("linear", "111", **sizes)
    cache = started(model)
    found = step(model, cache)
    assert "token" not in spy.taken()
    assert largest_error(found, without_c(monkeypatch, lambda: step(model, cache))) <= BOUND


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
    assert largest_error(found, without_c(monkeypatch, lambda: step(model, cache))) <= BOUND


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
    """In the parameters and in the state. Afterwards, tokens go through C again."""
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
            changed[1].arrays = {**changed[1].arrays, "weights": tuple(weights)}
            return two_tokens(changed)

        return mx.value_and_grad(function)(list(cache[1].weights))

    for gradients in (of_parameters, of_state):
        found = tree_flatten(gradients())
        assert "token" not in spy.taken()
        expected = dict(tree_flatten(without_c(monkeypatch, gradients)))
        for name, x in found:
            assert mx.abs(x - expected[name]).max() <= 1e-4 * max(mx.abs(expected[name]).max().item(), 1e-3), name
        spy.taken()
        step(model, cache)
        assert spy.taken() == {"token"}


def test_while_it_is_traced_it_is_left_to_mlx(spy, tmp_path):
    """Exported, which traces like mx.compile but needs no C++ compiler."""
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


def test_once_a_gradient_is_taken_its_parameters_are_read_in_c(spy, monkeypatch):
    """The array is the same. It was part of a transformation, and no longer is."""
    model = build("linear", "111")
    cache = started(model)
    projection = model.layers[1].mlp.up_proj

    def function(weight):
        projection.weight = weight
        return step(model, cache).sum()

    mx.eval(mx.grad(function)(projection.weight))
    step_in_c(model, cache, spy, monkeypatch)
