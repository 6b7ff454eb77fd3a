"""The schedule, what decays, and the optimizer's state."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ttt.training.optimizer import OPTIMIZERS, Optimizer, Schedule, clip, decays, is_matrix

from ..models import KINDS, shared


class TestSchedule:
    @pytest.mark.parametrize("decay", ["cosine", "linear"])
    def test_it_rises_and_falls(self, decay):
        rates = [Schedule(1.0, 0.1, 4, 20, decay)(step) for step in range(21)]
        assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
        assert rates[20] == pytest.approx(0.1)
        assert rates[12] == pytest.approx(0.55)  # half of the way
        assert rates[4:] == sorted(rates[4:], reverse=True)

    def test_the_two_differ(self):
        cosine, linear = (Schedule(1.0, 0.0, 0, 8, decay) for decay in ("cosine", "linear"))
        assert cosine(2) == pytest.approx((1 + math.sqrt(0.5)) / 2)
        assert linear(2) == 0.75

    @pytest.mark.parametrize("warmup", [0, 5, 9])
    def test_any_warm_up(self, warmup):
        assert all(0 < Schedule(1.0, 0.1, warmup, 5)(step) <= 1 for step in range(5))


@pytest.mark.parametrize("kind", KINDS)
def test_what_decays(kind):
    names = [name for name, _ in tree_flatten(shared(kind, "111").parameters())]
    never = ["norm.weight", "norm.bias", "conv.bias", "ttt_norm_weight", "ttt_norm_bias", "lr_bias", "b1", "token_idx"]
    always = ["embed_tokens.weight", "q_proj.weight", "down_proj.weight", "conv_q.weight", "W1", "lr_weight"]
    for ending in never + always:
        found = [name for name in names if name.endswith(ending)]
        assert found and all(decays(name) == (ending in always) for name in found), ending
    assert {name.split(".")[-2] for name in names if is_matrix(name)} >= {"q_proj", "o_proj", "gate_proj", "down_proj"}


@pytest.fixture
def weights():
    return {
        "layer.q_proj.weight": mx.random.normal((4, 6)),
        "norm.weight": mx.ones((4,)),
        "layer.W1": mx.ones((2, 3, 3)),
    }


class TestOptimizer:
    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_a_restored_one_goes_on_as_the_first(self, kind, weights):
        def step(optimizer, weights):
            return optimizer.update(weights, {name: w * 0.1 + 0.01 for name, w in weights.items()}, 0.1)

        one = Optimizer(kind, list(weights), 0.1)
        weights = step(one, weights)
        two = Optimizer(kind, list(weights), 0.1)
        two.arrays = one.arrays
        assert {x.dtype for name, x in one.arrays.items() if not name.endswith("step")} == {mx.float32}
        expected, found = step(one, weights), step(two, weights)
        assert all(mx.array_equal(found[name], x) for name, x in expected.items())
        assert one.arrays.keys() == two.arrays.keys()

    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_weight_decay(self, kind, weights):
        """Without gradients, only what decays becomes smaller."""
        zeros = {name: mx.zeros_like(w) for name, w in weights.items()}
        updated = Optimizer(kind, list(weights), 0.5).update(weights, zeros, 0.1)
        assert mx.array_equal(updated["norm.weight"], weights["norm.weight"])
        assert mx.allclose(updated["layer.W1"], weights["layer.W1"] * 0.95)
        assert mx.linalg.norm(updated["layer.q_proj.weight"]) < mx.linalg.norm(weights["layer.q_proj.weight"])

    def test_muon_leaves_what_is_no_matrix_to_adamw(self, weights):
        gradients = {name: mx.ones_like(w) for name, w in weights.items()}
        muon, adamw = (Optimizer(k, list(weights), 0.1).update(weights, gradients, 0.1) for k in ("muon", "adamw"))
        assert not mx.allclose(muon["layer.q_proj.weight"], adamw["layer.q_proj.weight"])
        assert mx.array_equal(muon["layer.W1"], adamw["layer.W1"])

    def test_row_major(self, weights):
        """Else a resumed training, whose weights come from a file, might round otherwise."""
        transposed = {name: w.swapaxes(-1, -2).astype(mx.float32) if w.ndim > 1 else w for name, w in weights.items()}
        updated = Optimizer("adamw", list(weights), 0.1).update(transposed, transposed, 0.1)
        for x in updated.values():
            mx.eval(x)
            assert memoryview(x).c_contiguous


def test_clipping():
    gradients = {"a": mx.array([3.0]), "b": mx.array([4.0])}
    assert clip(gradients, 5.0, 1.0)["a"].item() == pytest.approx(0.6, rel=1e-4)
    assert clip(gradients, 5.0, 6.0)["a"].item() == 3
    assert clip(gradients, 5.0, 0)["b"].item() == 4
