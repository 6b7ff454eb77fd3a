"""Gradients in segments, against the official implementation and against MLX's own through the whole text."""

from __future__ import annotations

import gc
import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ttt.backends.cpu import calls
from mlx_ttt.training import gradients, segments

from ..backends.cpu.c_code import needs_c
from ..models import FLAGS, KINDS, VOCABULARY, build

GOLDEN = ["linear-mamba", "linear-transformer", "mlp-mamba", "mlp-transformer"]
TRACES = ["linear-mamba", "mlp-transformer"]


def whole(model, ids, weights=None):
    """Loss and gradients by MLX, through the whole text at once."""

    def loss(model):
        losses = nn.losses.cross_entropy(model(ids[:, :-1]).astype(mx.float32), ids[:, 1:])
        return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()

    return nn.value_and_grad(model, loss)(model)


def distance(found, expected) -> float:
    """The largest difference between two trees of gradients, relative to the largest gradient expected."""
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    largest = max(mx.abs(g).max().item() for g in expected.values())
    return max(mx.abs(found[name] - g).max().item() for name, g in expected.items()) / largest


def agree(found, expected, bound=1e-5) -> bool:
    (loss, tree), (expected_loss, expected_tree) = found, expected
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    return distance(tree, expected_tree) <= bound


@pytest.fixture
def ids():
    return mx.random.randint(0, VOCABULARY, (2, 62))


class TestOfficial:
    @pytest.mark.parametrize("segment", [16, 40, 512])
    @pytest.mark.parametrize("name", GOLDEN)
    def test_gradients(self, golden_dir, golden_model, name, segment):
        model, expected = golden_model(name)
        official = mx.load(str(golden_dir / name / "expected_gradients.safetensors"))
        loss, tree = gradients(model, expected["input_ids"], segment)
        assert loss.item() == pytest.approx(official.pop("loss").item(), rel=1e-5)
        assert distance(tree, tree_unflattened(model.sanitize(official))) <= 1e-4

    @pytest.mark.slow
    @pytest.mark.parametrize("name", TRACES)
    def test_twenty_steps(self, golden_dir, golden_model, name):
        model, expected = golden_model(name)
        trace = json.loads((golden_dir / name / "expected_training.json").read_text())
        start = tree_map(mx.array, model.parameters())
        optimizer = optim.AdamW(trace["lr"], trace["betas"], trace["eps"], trace["weight_decay"], bias_correction=True)
        losses = []
        try:
            for _ in trace["losses"]:
                loss, tree = gradients(model, expected["input_ids"], 40)
                tree, _ = optim.clip_grad_norm(tree, trace["clip_grad_norm"])
                optimizer.update(model, tree)
                mx.eval(model.parameters(), optimizer.state)
                losses.append(loss.item())
        finally:
            model.update(start)
        for found, official in zip(losses, trace["losses"], strict=True):
            assert found == pytest.approx(official, rel=0.01, abs=0.01)


def tree_unflattened(weights):
    from mlx.utils import tree_unflatten

    return tree_unflatten(list(weights.items()))


class TestWholeText:
    @pytest.mark.parametrize("segment", [pytest.param(1, marks=pytest.mark.slow), 7, 24, 61, 100])
    @pytest.mark.parametrize("kind", KINDS)
    def test_any_segment(self, kind, segment, ids):
        model = build(kind, "111")
        assert agree(gradients(model, ids, segment), whole(model, ids))

    @pytest.mark.parametrize("flags", FLAGS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_any_backbone(self, kind, flags, ids):
        model = build(kind, flags)
        assert agree(gradients(model, ids, 25), whole(model, ids))

    @pytest.mark.parametrize("kind", KINDS)
    def test_weights(self, kind, ids):
        model = build(kind, "101")
        weights = (mx.random.uniform(shape=(2, 61)) > 0.4).astype(mx.float32)
        assert agree(gradients(model, ids, 20, weights=weights), whole(model, ids, weights))

    def test_what_is_padding_does_not_matter(self, ids):
        model = build("mlp", "110")
        weights = mx.concatenate([mx.ones((2, 30)), mx.zeros((2, 31))], axis=1)
        others = mx.concatenate([ids[:, :31], mx.zeros_like(ids[:, 31:])], axis=1)
        assert agree(gradients(model, others, 20, weights=weights), gradients(model, ids, 33, weights=weights))

    @pytest.mark.parametrize("use_dora", [False, True])
    @pytest.mark.parametrize("bits", [None, 4])
    def test_adapters_on_frozen_weights(self, bits, use_dora, ids):
        model = build("linear", "111", hidden_size=64, intermediate_size=64)
        if bits:
            nn.quantize(model, 32, bits)
        model.freeze()
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 8.0, "dropout": 0.0}, use_dora=use_dora)
        assert agree(gradients(model, ids, 20), whole(model, ids))

    @pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
    def test_half_precision(self, dtype, ids):
        model = build("mlp", "111")
        model.set_dtype(dtype, lambda _: True)
        # Rounding differs with the order of sums: within some roundings of bfloat16.
        assert agree(gradients(model, ids, 20), whole(model, ids), bound=3e-2)

    @pytest.mark.slow
    @pytest.mark.parametrize("segment", [100, 512, 1000])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_long_text(self, kind, segment):
        model = build(kind, "111")
        ids = mx.random.randint(0, VOCABULARY, (2, 4097))
        weights = (mx.arange(4096) < mx.array([4096, 3001])[:, None]).astype(mx.float32)
        assert agree(gradients(model, ids, segment, weights=weights), whole(model, ids, weights), bound=1e-4)


class TestState:
    @pytest.mark.parametrize("rewind", [False, True])
    def test_windows_go_on_where_the_last_one_stopped(self, rewind, ids):
        """The loss of a window after another is that of the whole text's second half."""
        model = build("mlp", "111")
        cache = model.make_cache(rewind=rewind)
        first, _ = gradients(model, ids[:, :31], 12, cache=cache)
        second, _ = gradients(model, ids[:, 30:], 12, cache=cache)
        together, _ = gradients(model, ids)
        assert ((30 * first + 31 * second) / 61).item() == pytest.approx(together.item(), rel=1e-5)

        plain = model.make_cache(rewind=rewind)
        model(ids[:, :-1], plain)
        found, expected = (dict(tree_flatten([c.state for c in caches])) for caches in (cache, plain))
        for name, x, y in ((name, found[name], expected[name]) for name in expected):
            assert mx.allclose(mx.array(x), mx.array(y), atol=1e-5), name

    @pytest.mark.parametrize("rewind", [False, True])
    def test_a_cache_that_has_read_nothing_is_made_of_the_parameters(self, rewind, ids):
        """The start weights get their gradients, and the cache stands behind the text."""
        model = build("mlp", "111")
        cache = model.make_cache(rewind=rewind)
        assert agree(gradients(model, ids, 25, cache=cache), whole(model, ids))
        assert cache[0].offset == [61, 61]

    def test_the_model_stays_as_it_is(self, ids):
        model = build("linear", "111")
        before = dict(tree_flatten(model.parameters()))
        gradients(model, ids, 20)
        assert all(x is before[name] for name, x in tree_flatten(model.parameters()))

    def test_also_after_an_error(self, ids, monkeypatch):
        model = build("linear", "111")
        before = dict(tree_flatten(model.parameters()))
        monkeypatch.setattr(segments, "cross_entropy", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gradients(model, ids, 20)
        assert all(x is before[name] for name, x in tree_flatten(model.parameters()))


@needs_c
@pytest.mark.slow
def test_nothing_is_kept_for_second_derivatives(trained, monkeypatch):
    """A step of this model takes 156 MB. If its gradient can be differentiated again, 205 MB."""
    model, ids = trained[0], mx.arange(1025)[None]

    def peak():
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradients(model, ids))
        return mx.get_peak_memory() - before

    once = peak()
    monkeypatch.setattr(calls, "is_differentiated_once", lambda: False)
    assert once < 0.87 * peak()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": mx.zeros((2, 1), mx.int32)}, "ids has shape"),
        ({"segment": 0}, "segment is 0"),
        ({"weights": mx.ones((2, 62))}, "weights has shape"),
        ({"weights": mx.zeros((2, 61))}, "no prediction counts"),
    ],
)
def test_bad_arguments(options, message, ids):
    with pytest.raises(ValueError, match=message):
        gradients(build("linear", "111"), **{"ids": ids, **options})
