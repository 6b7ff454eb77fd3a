"""The compiled decode step against the network as it is. It is for GPUs; here it is switched on by force.

On Linux every fused kernel costs a run of a C++ compiler when it is first met, so what is really compiled is slow.
"""

from __future__ import annotations

import copy
import functools
import gc
import re
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_ttt
from mlx_ttt.backends.cpu import library
from mlx_ttt.backends.metal import decode_step, rule
from mlx_ttt.network.cache import TTTCache
from mlx_ttt.network.dual import dual_form
from mlx_ttt.network.inner import INNER_MODELS
from mlx_ttt.network.model import Model, SwiGLU
from mlx_ttt.network.rule import Learner, State, Tokens

from ...models import KINDS, build, configuration, largest_error


class Switch:
    """Which path decodes, how often the decode step was compiled or traced, and how often it was called.

    Not compiled, the function is called as it is: everything but what MLX makes of it.
    """

    def __init__(self, monkeypatch, compiled: bool):
        self.on, self.traces, self.calls = True, 0, 0
        step, call = decode_step._decode_step, decode_step.DecodeStep.__call__

        def traced(*args):
            self.traces += 1
            return step(*args)

        def counted(*args):
            x = call(*args)
            self.calls += x is not NotImplemented
            return x

        if compiled:
            monkeypatch.setattr(decode_step, "_decode_step", traced)
        else:
            monkeypatch.setattr(decode_step, "mx", self)
        monkeypatch.setattr(decode_step, "wanted", lambda: self.on)
        monkeypatch.setattr(decode_step.DecodeStep, "__call__", counted)
        monkeypatch.setattr(library, "c_code", lambda: None)

    def compile(self, function, inputs):
        self.traces += 1
        return function

    def __getattr__(self, name: str):
        return getattr(mx, name)


@pytest.fixture(params=["as it is", pytest.param("compiled", marks=pytest.mark.slow)])
def switch(request, monkeypatch):
    return Switch(monkeypatch, request.param == "compiled")


@pytest.fixture
def compiled(monkeypatch):
    return Switch(monkeypatch, compiled=True)


def started(model: Model, B: int) -> list[TTTCache]:
    """B sequences that have read 2, 3, ... tokens."""
    alone = []
    for b in range(B):
        alone.append(model.make_cache())
        model(mx.arange(b + 2)[None] * 5 % 61, cache=alone[-1])
    return [TTTCache.merge(caches) for caches in zip(*alone, strict=True)]


def arrays(cache: list[TTTCache]) -> list[tuple[str, mx.array]]:
    return tree_flatten([c.arrays for c in cache])


def decode(model: Model, ids: mx.array, cache: list[TTTCache]) -> mx.array:
    """The logits after each of the tokens, read one by one, [B, T, V]."""
    logits = []
    for i in range(ids.shape[1]):
        logits.append(model(ids[:, i : i + 1], cache=cache))
        mx.eval(logits)
    return mx.concatenate(logits, axis=1)


def assert_same(switch: Switch, model: Model, B: int, T: int = 41) -> None:
    ids = mx.random.randint(0, 61, (B, T))
    results = {}
    for switch.on in (True, False):
        cache = started(model, B)
        results[switch.on] = decode(model, ids, cache), cache
    assert largest_error(results[True][0], results[False][0]) <= 1e-5
    for (name, found), (_, expected) in zip(arrays(results[True][1]), arrays(results[False][1]), strict=True):
        assert largest_error(found, expected) <= 1e-5, name
    for c, expected in zip(results[True][1], results[False][1], strict=True):
        assert c.offset == expected.offset == [b + 2 + T for b in range(B)]


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("flags", ["000", "111"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_state_are_those_of_the_ordinary_path(switch, kind, flags, B):
    """One trace serves all phases."""
    assert_same(switch, build(kind, flags), B)
    assert switch.traces == 1
    # Sequences that started a token apart complete their mini-batches of 6 at three different times.
    assert switch.calls == sum(all((b + 2 + n) % 6 < 5 for b in range(B)) for n in range(41))


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize(
    "forms", [(0.5, 0.0, 2.0), ([0.5, 1.0], [0.1, 0.0]), ([[0.5, 1.0], [2.0, 0.1]], [[0.0, 0.0], [1.0, 0.1]])], ids=str
)
def test_another_learning_scale_is_the_same_trace(compiled, forms, looks):
    """Nothing is evaluated, so nothing is compiled."""
    model = build("linear", "111")
    for learning in forms:
        read = functools.partial(mlx_ttt.observe, model) if looks else model
        read(mx.array([[3], [4]]), started(model, 2), learning=learning)
    assert compiled.calls == len(forms)
    assert compiled.traces == 1


@pytest.mark.parametrize("kind", KINDS)
def test_with_kernels(compiled, kind, instead_of_kernels):
    """In the place of their launches, which only a device can trace: operations on the same arrays."""

    def launch(kernel, arrays, phase, lengths):
        step, in_array = kernel.variant.form == "step", isinstance(phase, mx.array)
        assert step or lengths is not None
        q, k, v, lr, t, gamma, beta, *weights, rows = arrays
        if step or in_array:
            phase = rule._integers(phase)
            assert phase.shape == (8,) and phase.dtype == mx.int32
            phase = phase[: len(q)] if step else phase[: len(q)].tolist()
        learner = Learner(INNER_MODELS[kind], t, gamma, beta)
        y, state = dual_form.in_mlx(Tokens(q, k, v, lr, lengths), learner, State(tuple(weights), rows, phase))
        return [y, state.rows] if step else [y, *state.weights, state.rows]

    instead_of_kernels(launch)
    mx.disable_compile()  # for time: what compiling changes is in the test above
    try:
        assert_same(compiled, Model(configuration(kind, "111", hidden_size=32)), 3, T=12)  # heads of 16
    finally:
        mx.enable_compile()
    assert compiled.calls > 0


def test_replaced_parameters_take_effect(switch):
    model, ids = build("linear", "000"), mx.arange(9).reshape(3, 3)
    decode(model, ids[:, :1], started(model, 3))
    model.update(tree_map(lambda p: 1.1 * p, model.parameters()))
    assert_same(switch, model, 3, T=3)
    assert switch.traces == 1


def test_replaced_modules_are_traced_again(switch):
    """Also where all shapes are the same: two adapters of one rank, but of different scales."""
    model = build("linear", "000")
    for scale in (2.0, 20.0):
        linear_to_lora_layers(
            model, 2, {"rank": 4, "dropout": 0.0, "scale": scale, "keys": ["seq_modeling_block.q_proj"]}
        )
        for block in model.layers:
            lora = block.seq_modeling_block.q_proj
            lora.lora_b = mx.random.normal(lora.lora_b.shape, key=mx.random.key(1))
        assert_same(switch, model, 3, T=3)
        for block in model.layers:
            block.seq_modeling_block.q_proj = block.seq_modeling_block.q_proj.linear
    assert switch.traces == 2


def change_eps(model, monkeypatch):
    model.layers[1].ffn_norm.eps = 0.5


def change_a_class(model, monkeypatch):
    class Sum(SwiGLU):
        def __call__(self, x):
            return self.down_proj(self.gate_proj(x) + self.up_proj(x))

    model.layers[0].mlp.__class__ = Sum


def patch_a_class(model, monkeypatch):
    call = SwiGLU.__call__
    monkeypatch.setattr(SwiGLU, "__call__", lambda self, x: 2 * call(self, x))


@pytest.mark.parametrize("change", [change_eps, change_a_class, patch_a_class], ids=lambda f: f.__name__)
def test_changed_settings_and_classes_are_traced_again(switch, monkeypatch, change):
    model, ids = build("linear", "000"), mx.array([[3], [1], [4]])
    before = decode(model, ids, started(model, 3))
    change(model, monkeypatch)
    assert_same(switch, model, 3, T=3)
    switch.on = True
    assert largest_error(decode(model, ids, started(model, 3)), before) > 1e-4
    assert switch.traces == 2


@pytest.mark.slow
def test_a_quantized_model(switch):
    sizes = {"hidden_size": 96, "num_attention_heads": 8, "intermediate_size": 64}  # heads of 12, as in other tests
    model = Model(configuration("linear", "000", **sizes))
    decode(model, mx.zeros((3, 1), mx.int32), started(model, 3))
    nn.quantize(model, group_size=32, class_predicate=model.quant_predicate)
    assert_same(switch, model, 3, T=3)
    assert switch.traces == 2


def test_what_it_leaves_to_the_ordinary_path(switch):
    model = build("linear", "000")
    ids = mx.zeros((1, 1), mx.int32)
    padded = model.make_cache()
    for c in padded:
        c.prepare(left_padding=[1])
    for cache in (model.make_cache(rewind=True), padded, None):
        model(ids, cache=cache)
    model(mx.zeros((2, 1), mx.int32), cache=model.make_cache())  # one text, continued in two ways
    model(mx.zeros((1, 5), mx.int32), cache=(cache := model.make_cache()))
    model(ids, cache=cache)  # completes the mini-batch
    assert switch.calls == 0
    model(ids, cache=cache)
    assert switch.calls == 1


def test_gradients(switch):
    """Through a decoded token, in the parameters."""
    model = build("linear", "000")
    cache, ids = started(model, 3), mx.array([[3], [1], [4]])

    def loss(parameters):
        model.update(parameters)
        return model(ids, cache=[c.copy() for c in cache]).square().mean()

    parameters, gradients = model.trainable_parameters(), {}
    for switch.on in (True, False):
        gradients[switch.on] = tree_flatten(mx.grad(loss)(parameters))
        model.update(parameters)
    for (name, found), (_, expected) in zip(gradients[True], gradients[False], strict=True):
        assert mx.allclose(found, expected, rtol=1e-4, atol=1e-7), name
    assert switch.calls == 1


@pytest.mark.slow
def test_compiled_from_outside(switch):
    model = build("linear", "000")
    cache, ids, logits = started(model, 3), mx.array([[3], [1], [4]]), {}
    for switch.on in (True, False):
        read = mx.compile(lambda ids: model(ids, cache=[c.copy() for c in cache]))
        logits[switch.on] = read(ids)
    assert largest_error(logits[True], logits[False]) <= 1e-5


def test_the_weights_are_not_copied_and_the_old_rows_are_free(switch):
    model = build("linear", "000")
    cache = started(model, 3)
    weights, rows = [c.weights for c in cache], [weakref.ref(c.rows) for c in cache]
    model(mx.zeros((3, 1), mx.int32), cache=cache)
    assert switch.calls == 1
    assert all(c.weights is before for c, before in zip(cache, weights, strict=True))
    assert not any(ref() for ref in rows)  # or they could not be written in place


def test_a_model_is_copied_and_freed(switch):
    model = build("linear", "000")
    model(mx.zeros((1, 1), mx.int32), cache=model.make_cache())
    copied = copy.deepcopy(model)
    copied(mx.zeros((1, 1), mx.int32), cache=copied.make_cache())
    assert switch.traces == 2
    model = weakref.ref(model)
    gc.collect()
    assert model() is None


def nodes(layers: int, kind: str, flags: str, path) -> int:
    """How many operations MLX's graph of one token has: logits, and the state after it."""
    model = Model(configuration(kind, flags, num_hidden_layers=layers))
    cache = started(model, 1)
    mx.eval(model.parameters(), [array for _, array in arrays(cache)])
    x = model(mx.array([[7]]), cache=cache)
    with open(path, "w") as file:
        mx.export_to_dot(file, x, *(array for _, array in arrays(cache)))
    return len(re.findall(r"shape=rectangle", path.read_text()))


@pytest.mark.parametrize("flags", ["000", "111"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_graph(compiled, kind, flags, tmp_path):
    """Fewer operations to launch for each layer and token."""
    counts = {}
    for compiled.on in (True, False):
        counts[compiled.on] = nodes(2, kind, flags, tmp_path / "2") - nodes(1, kind, flags, tmp_path / "1")
    print(f"{kind}-{flags}: {counts[False]} nodes a layer, {counts[True]} compiled")
    assert counts[True] < 0.6 * counts[False]
