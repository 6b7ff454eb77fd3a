"""The compiled decode step against the ordinary path: forced on, since it is for devices that CI has not.

On Linux every fused kernel costs a C++ compiler's run when it is first met, so most configurations are slow ones.
"""

from __future__ import annotations

import copy
import gc
import itertools
import re
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ttt import compiled_step, native
from mlx_ttt.cache import TTTCache
from mlx_ttt.layers import SwiGLU
from mlx_ttt.model import Model
from mlx_ttt.update import metal, ttt_linear

from .test_model import build, configuration, largest_error
from .update.cases import make_case
from .update.metal_cases import DUAL_STEP

KINDS = ["linear", "mlp"]
FAST = ("linear", "000", 3)


class Switch:
    """Which path decodes, and how often the compiled one has been traced."""

    def __init__(self, monkeypatch):
        self.on, self.traces, self.calls = True, 0, 0
        step, read = compiled_step._step, compiled_step.CompiledStep.read

        def traced(*args):
            self.traces += 1
            return step(*args)

        def counted(*args):
            x = read(*args)
            self.calls += x is not None
            return x

        monkeypatch.setattr(compiled_step, "wanted", lambda: self.on)
        monkeypatch.setattr(compiled_step, "_step", traced)
        monkeypatch.setattr(compiled_step.CompiledStep, "read", counted)
        monkeypatch.setattr(native, "available", lambda: False)


@pytest.fixture
def switch(monkeypatch):
    return Switch(monkeypatch)


def started(model: Model, B: int) -> list[TTTCache]:
    """B sequences that have read 2, 3, ... tokens."""
    alone = []
    for b in range(B):
        alone.append(model.make_cache())
        model(mx.arange(b + 2)[None] * 5 % 61, cache=alone[-1])
    return [TTTCache.merge(caches) for caches in zip(*alone, strict=True)]


def arrays(cache: list[TTTCache]) -> list[tuple[str, mx.array]]:
    return tree_flatten([(c.weights, c.rows, c.history) for c in cache])


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


@pytest.mark.parametrize(
    ("kind", "flags", "B"),
    [
        pytest.param(*case, marks=() if case == FAST else pytest.mark.slow)
        for case in itertools.product(KINDS, ["000", "111"], [1, 3])
    ],
)
def test_tokens_and_state_are_those_of_the_ordinary_path(switch, kind, flags, B):
    """In all phases, by one trace."""
    assert_same(switch, build(kind, flags), B)
    assert switch.traces == 1
    # Sequences that started a token apart complete their mini-batches of 6 at three different times.
    assert switch.calls == sum(all((b + 2 + n) % 6 < 5 for b in range(B)) for n in range(41))


@pytest.mark.parametrize("kind", KINDS)
def test_with_kernels(switch, kind, monkeypatch):
    """In the place of their launches, which only a device can trace: operations on the same arrays."""

    def launch(variant, tiles, arrays, phase, lengths):
        assert variant.form == "step" or lengths is not None
        B = arrays[0].shape[0]
        inputs = (*arrays[:7], arrays[7:-1], arrays[-1])
        if variant.form == "step":
            phase = metal._integers(phase)
            assert phase.shape == (8,) and phase.dtype == mx.int32
            return list(DUAL_STEP[kind](*inputs, phase[:B]))
        y, weights, rows = metal._DUAL[kind](*inputs, phase, lengths)
        return [y, *weights, rows]

    args = configuration(kind, "111")
    args.hidden_size = 32  # heads of 16
    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.setattr(metal, "_launch", launch)
    monkeypatch.setattr(metal, "_tiles", lambda variant: 1)
    mx.disable_compile()  # for time: what compiling changes is in the test above
    try:
        assert_same(switch, Model(args), 3, T=12)
    finally:
        mx.enable_compile()
    assert switch.calls > 0


def test_replaced_parameters_take_effect(switch):
    model, ids = build("linear", "000"), mx.arange(9).reshape(3, 3)
    decode(model, ids[:, :1], started(model, 3))
    model.update(tree_map(lambda p: 1.1 * p, model.parameters()))
    assert_same(switch, model, 3, T=3)
    assert switch.traces == 1


def test_replaced_modules_are_traced_again(switch):
    """Also where no array's shape tells: two adapters of the same rank but another scale."""
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
def test_so_are_changed_settings_and_classes(switch, monkeypatch, change):
    model, ids = build("linear", "000"), mx.array([[3]])
    before = decode(model, ids, started(model, 1))
    change(model, monkeypatch)
    assert_same(switch, model, 1, T=3)
    switch.on = True
    assert largest_error(decode(model, ids, started(model, 1)), before) > 1e-4
    assert switch.traces == 2


@pytest.mark.slow
def test_a_quantized_model(switch):
    args = configuration("linear", "000")
    args.hidden_size, args.num_attention_heads, args.intermediate_size = 96, 8, 64  # heads of 12, as in other tests
    model = Model(args)
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


def test_inside_transformations(switch):
    """The gradient through a decoded token, in what is read and in the parameters; and compiled from outside."""
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

    logits = {}
    for switch.on in (True, False):
        read = mx.compile(lambda ids: model(ids, cache=[c.copy() for c in cache]))
        logits[switch.on] = read(ids)
    assert largest_error(logits[True], logits[False]) <= 1e-5


def test_the_append_is_in_place(monkeypatch):
    """Decoding holds one copy of the rows. In the kernel's place: what reads rows."""

    def launch(variant, tiles, arrays, phase, lengths):
        q, rows = arrays[0], arrays[-1]
        return [q + rows[:, :, :1, : q.shape[-1]].swapaxes(1, 2), rows.sum(axis=2, keepdims=True)]

    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.setattr(metal, "_launch", launch)
    monkeypatch.setattr(metal, "_tiles", lambda variant: 1)
    case = make_case("linear", T=1, H=64, D=128, K=32, phase=[0])
    tokens, constants = ([case[name] for name in names] for names in (("q", "k", "v", "lr"), ("t", "gamma", "beta")))

    @mx.compile
    def step(phase, weights, rows):
        layer = compiled_step._OpenMiniBatch(phase, weights, rows, {})
        return layer.update(ttt_linear, tokens, constants), layer.rows

    rows, size = case.pop("rows"), case["q"].nbytes * 64
    mx.eval(case["weights"], tokens, constants, rows)
    for p in range(6):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        y, rows = step(mx.array([p]), case["weights"], rows)
        mx.eval(y)
        assert mx.get_peak_memory() - before < rows.nbytes / 4
    assert rows.nbytes == size


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
    """Of MLX's graph of one token: hidden states and the state after it."""
    args = configuration(kind, flags)
    args.num_hidden_layers = layers
    model = Model(args)
    cache = started(model, 1)
    mx.eval(model.parameters(), [array for _, array in arrays(cache)])
    x = model(mx.array([[7]]), cache=cache)
    with open(path, "w") as file:
        mx.export_to_dot(file, x, *(array for _, array in arrays(cache)))
    return len(re.findall(r"shape=rectangle", path.read_text()))


@pytest.mark.parametrize("flags", ["000", "111"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_graph(switch, kind, flags, tmp_path):
    """Operations that are launched for each layer and token."""
    counts = {}
    for switch.on in (True, False):
        counts[switch.on] = nodes(2, kind, flags, tmp_path / "2") - nodes(1, kind, flags, tmp_path / "1")
    print(f"{kind}-{flags}: {counts[False]} nodes a layer, {counts[True]} compiled")
    assert counts[True] < 0.6 * counts[False]
