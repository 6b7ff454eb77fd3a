"""Projections side by side: the same model in the same memory, and one product instead of several."""

from __future__ import annotations

import copy
import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ttt.backends.metal import rule
from mlx_ttt.backends.metal.side_by_side import SideBySide, products
from mlx_ttt.network.model import Model, prepare

from ...models import build


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    monkeypatch.setattr(rule, "available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    limit = mx.set_cache_limit(0)  # or a buffer may be larger than its array
    yield
    mx.set_cache_limit(limit)


def quantized(bits: dict[str, int] | None = None) -> Model:
    """4 bits, but for those projections that are named."""
    model = build("linear", "111", hidden_size=64, intermediate_size=96)

    def predicate(path: str, module: nn.Module):
        wanted = next((n for name, n in (bits or {}).items() if path.endswith(name)), 4)
        return model.quant_predicate(path, module) and {"group_size": 32, "bits": wanted}

    nn.quantize(model, class_predicate=predicate)
    return model


def joined(model: Model) -> list[list[int]]:
    """How many rows lie side by side, in each block and group."""
    of_model = SideBySide.of(model.model).arrays(model.model)
    return [[len(group["weight"]) if group else 0 for group in block] for block in of_model]


def assert_products(model: Model) -> None:
    """Each projection's product is what it says itself."""
    block = model.layers[1]
    x = mx.random.normal((2, 1, block.seq_norm.weight.size))
    for group, arrays in enumerate(SideBySide.of(model.model).arrays(model.model)[1]):
        container = (block.seq_modeling_block, block.mlp)[group]
        for name, part in products(x, block, group, arrays).items():
            assert mx.allclose(part.alone(), container[name](x), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        (lambda: build("linear", "111"), [72, 80]),
        (lambda: build("mlp", "000"), [72, 80]),
        (lambda: build("mlp", "010"), [48, 80]),
        (quantized, [192, 192]),
        (lambda: quantized({"v_proj": 8}), [0, 192]),
        (lambda: quantized({"up_proj": 8}), [192, 0]),
    ],
    ids=["q v gate", "q k v", "q v", "quantized", "mixed in the layer", "mixed in SwiGLU"],
)
def test_the_model_stays_what_it_was(model, rows, tmp_path):
    model = model()
    mx.eval(model.parameters())
    before = dict(tree_flatten(tree_map(lambda x: x + 0, model.parameters())))
    mx.eval(before)
    gc.collect()
    memory = mx.get_active_memory()
    prepare(model)
    gc.collect()
    assert mx.get_active_memory() <= 1.01 * memory  # nothing is kept twice
    assert joined(model) == [rows, rows]
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    model.save_weights(str(tmp_path / "saved.safetensors"))
    saved = mx.load(str(tmp_path / "saved.safetensors"))
    for name, x in before.items():
        assert mx.array_equal(after[name], x) and mx.array_equal(saved[name], x), name
    assert_products(model)


def test_the_memory_of_one_layer_is_taken_meanwhile():
    model = build("linear", "111", num_hidden_layers=12, hidden_size=96, intermediate_size=256)
    mx.eval(model.parameters())
    layer = sum(x.nbytes for _, x in tree_flatten(model.layers[0].parameters()))
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    prepare(model)
    assert mx.get_peak_memory() - before <= layer


def change_in_place(model: Model) -> None:
    model.layers[0].mlp.up_proj.weight *= 2


def change_an_element(model: Model) -> None:
    model.layers[0].mlp.up_proj.weight[0, 0] = 3


def replace_parameters(model: Model) -> None:
    model.update(tree_map(lambda x: x + 0.5, model.parameters()))


def replace_a_module(model: Model) -> None:
    model.layers[0].mlp.up_proj = nn.Linear(24, 40, bias=False)


def adapt(model: Model) -> None:
    linear_to_lora_layers(model, 2, {"rank": 4, "dropout": 0.0, "scale": 20.0, "keys": ["mlp.up_proj"]})


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_an_element, replace_parameters, replace_a_module, adapt],
    ids=lambda f: f.__name__,
)
def test_what_has_changed_is_multiplied_as_it_is_now(change):
    model = build("linear", "111")
    prepare(model)
    before = SideBySide.of(model.model).arrays(model.model)[0][1]["weight"]
    before = weakref.ref(before)
    change(model)
    assert joined(model)[0][1] == 0
    assert_products(model)
    gc.collect()
    assert before() is None  # it would only take memory
    if change is not adapt:
        prepare(model)
        assert joined(model) == [[72, 80], [72, 80]]
        assert_products(model)


@pytest.mark.parametrize("make", [lambda: build("linear", "111"), quantized], ids=["float32", "quantized"])
def test_adapters_and_fuse(make, monkeypatch):
    """LoRA on some projections, its gradients, and the adapters fused: as without anything side by side."""

    def adapted(is_prepared: bool):
        model = make()
        if is_prepared:
            prepare(model)
        model.freeze()
        mx.random.seed(1)
        size = {"rank": 4, "dropout": 0.0, "scale": 20.0, "keys": ["mlp.up_proj", "seq_modeling_block.q_proj"]}
        linear_to_lora_layers(model, 2, size)
        model.update(tree_map(lambda x: mx.cos(7 * x), model.trainable_parameters()))
        return model

    prepared, plain = adapted(True), adapted(False)
    assert joined(prepared) == [[0, 0], [0, 0]]
    assert_products(prepared)
    ids = mx.arange(20)[None] % 30
    with monkeypatch.context() as m:
        m.setattr(rule, "available", lambda: False)  # no kernel is to be tried
        gradients = [nn.value_and_grad(m, lambda m: m(ids).square().mean())(m)[1] for m in (prepared, plain)]
    assert tree_flatten(gradients[0]) and all(
        mx.array_equal(a, b) for (_, a), (_, b) in zip(*map(tree_flatten, gradients), strict=True)
    )
    for model in (prepared, plain):
        fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
        model.update_modules(tree_unflatten(fused))
    prepare(prepared)
    assert all(rows > 0 for block in joined(prepared) for rows in block)
    assert_products(prepared)
    both = [dict(tree_flatten(m.parameters())) for m in (prepared, plain)]
    assert both[0].keys() == both[1].keys()
    assert all(mx.array_equal(x, both[1][name]) for name, x in both[0].items())


def test_a_bias_or_another_class_is_left_alone():
    class Other(nn.Linear):
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * super().__call__(x)

    model = build("linear", "111")
    model.layers[0].mlp.up_proj = nn.Linear(24, 40, bias=True)
    model.layers[1].mlp.up_proj.__class__ = Other
    prepare(model)
    assert joined(model) == [[72, 0], [72, 0]]
    assert_products(model)


def test_a_second_time_changes_nothing():
    model = build("linear", "111")
    prepare(model)
    first = SideBySide.of(model.model).arrays(model.model)[1][0]["weight"]
    prepare(model)
    assert SideBySide.of(model.model).arrays(model.model)[1][0]["weight"] is first


def test_a_copy_is_on_its_own():
    model = build("linear", "111")
    prepare(model)
    copied = copy.deepcopy(model)
    assert joined(copied) == [[0, 0], [0, 0]] and joined(model) == [[72, 80], [72, 80]]
    assert_products(copied)
    copied.layers[0].mlp.up_proj.weight *= 2
    assert_products(model)


@pytest.mark.parametrize("renewed", [True, False])
def test_after_a_trace_the_same_arrays_are_other_objects(renewed):
    model = build("linear", "111")
    prepare(model)
    side_by_side = SideBySide.of(model.model)
    side_by_side.arrays(model.model)
    mx.compile(lambda x: model.model.norm(x), inputs=[model.model])(mx.zeros((1, 24)))
    if renewed:
        side_by_side.renew()
    assert joined(model) == [[72, 80] if renewed else [0, 0]] * 2
    assert_products(model)
