"""A step of training against the same step written out by hand."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ttt.errors import TrainingError
from mlx_ttt.training import gradients
from mlx_ttt.training.checkpoint import State
from mlx_ttt.training.data import Batch
from mlx_ttt.training.loop import Part, Recipe, Step, Trainer
from mlx_ttt.training.optimizer import Schedule

from ..models import KINDS, VOCABULARY, build

SCHEDULE = Schedule(peak=1e-2, end=1e-3, warmup=2, steps=4)


class Fixed:
    """Batches that a test has written down."""

    def __init__(self, *batches: Batch):
        self.batches = batches

    def batch(self, step: int) -> Batch:
        return self.batches[step % len(self.batches)]


def batch(rows: int = 3, length: int = 20, fresh=True, seed: int = 0) -> Batch:
    """Random tokens, of which some do not count."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(VOCABULARY, size=(rows, length + 1), dtype=np.int32)
    weights = (rng.random((rows, length)) < 0.7).astype(np.float32)
    return Batch(ids, weights, np.broadcast_to(fresh, rows))


def trainer(model, *batches: Batch, recipe: Recipe = Recipe(SCHEDULE, micro_batch=2, segment=8), **options) -> Trainer:  # noqa: B008
    weights = {name: mx.array(w) for name, w in tree_flatten(model.parameters())}
    return Trainer(model, recipe, Fixed(*batches), State(0, weights, {}, {}, 0), **options)


def close(found: dict, expected: dict, bound: float = 1e-5) -> bool:
    return all(mx.allclose(found[name], x, atol=bound, rtol=1e-4) for name, x in expected.items())


class TestStep:
    @pytest.mark.parametrize("kind", KINDS)
    def test_parts_of_uneven_sizes_add_up_to_the_batch(self, kind):
        """MLX's own AdamW, one for what decays and one for the rest, on the gradients of the whole batch."""
        model, data = build(kind, "111"), batch()
        training = trainer(model, data)
        loss, tree = gradients(model, mx.array(data.ids), weights=mx.array(data.weights))
        tree, norm = optim.clip_grad_norm(tree, 1.0)
        expected = {}
        for decay, chosen in ((0.1, True), (0.0, False)):
            adamw = optim.AdamW(SCHEDULE(0), [0.9, 0.95], weight_decay=decay, bias_correction=True)
            updated = dict(tree_flatten(adamw.apply_gradients(tree, model.parameters())))
            expected |= {name: w for name, w in updated.items() if decays_by_hand(name) == chosen}
        part, step = list(training._one_step())
        assert isinstance(part, Part) and (part.step, part.sequences, part.tokens) == (1, 2, 40)
        assert isinstance(step, Step) and (step.step, step.tokens, step.lr) == (1, 20, SCHEDULE(0))
        assert step.loss == pytest.approx(loss.item(), rel=1e-5)
        assert step.norm == pytest.approx(norm.item(), rel=1e-4)
        assert close(dict(tree_flatten(model.parameters())), expected)

    def test_a_batch_without_predictions_changes_nothing(self):
        data = batch()
        training = trainer(build("linear", "111"), Batch(data.ids, data.weights * 0, data.fresh))
        before = training.weights
        (*_, step) = training._one_step()
        assert np.isnan(step.loss)
        assert training.weights is before and training.step == 1

    def test_several_machines(self):
        """What one machine computes from its rows goes through the function that adds up all of them."""
        model, data, asked = build("linear", "111"), batch(), []

        def over_machines(loss, tree, count):
            asked.append(count.item())
            return loss, tree, count

        list(trainer(model, data, rows=slice(1, None, 2), over_machines=over_machines)._one_step())
        assert asked == [data.weights[1].sum()]

    def test_half_precision(self):
        """The weights and the optimizer stay float32, and so does what the inner learner learns with."""
        model = build("mlp", "111")
        recipe = Recipe(SCHEDULE, micro_batch=3, dtype="bfloat16")
        training = trainer(model, batch(), recipe=recipe)
        list(training._one_step())
        parameters = dict(tree_flatten(model.parameters()))
        assert parameters["model.layers.0.mlp.up_proj.weight"].dtype == mx.bfloat16
        assert parameters["model.layers.0.seq_modeling_block.W1"].dtype == mx.float32
        assert {w.dtype for w in training.weights.values()} == {mx.float32}

    def test_a_loss_that_is_no_number(self):
        training = trainer(build("linear", "111"), batch())
        training.weights["model.norm.weight"] = mx.full((24,), float("nan"))
        training._copy_weights()
        before = training.state
        with pytest.raises(TrainingError, match="step 1: the loss is nan"):
            list(training.run())
        assert (training.state.step, training.weights) == (0, before.weights)


def decays_by_hand(name: str) -> bool:
    return not ("norm" in name or name.endswith(("bias", "b1", "b2", "token_idx")))


class TestCarry:
    def test_a_window_goes_on_where_the_last_one_stopped(self):
        """Two windows with carried states have the loss of one text of both, if nothing is learned in between."""
        model, whole = build("mlp", "111"), batch(length=40)
        halves = [
            Batch(whole.ids[:, :21], whole.weights[:, :20], np.array([True, True, True])),
            Batch(whole.ids[:, 20:], whole.weights[:, 20:], np.array([False, False, False])),
        ]
        recipe = Recipe(Schedule(1e-20, 1e-20, 0, 2), micro_batch=2, segment=8, carry=True)
        events = trainer(model, *halves, recipe=recipe).run()
        losses = [
            e.loss * n.weights.sum() for e, n in zip((e for e in events if isinstance(e, Step)), halves, strict=True)
        ]
        logits = model(mx.array(whole.ids[:, :-1]))
        nats = nn.losses.cross_entropy(logits, mx.array(whole.ids[:, 1:])) * mx.array(whole.weights)
        assert sum(losses) == pytest.approx(nats.sum().item(), rel=1e-4)

    def test_rows_that_begin_beside_rows_that_go_on(self):
        """A row that begins is as without `carry`: the start weights get their gradients."""
        model, first, second = build("linear", "111"), batch(seed=1), batch(fresh=[False, True, False], seed=2)
        recipe = Recipe(Schedule(1e-20, 1e-20, 0, 2), micro_batch=3, segment=8, carry=True, clip=0)
        training = trainer(model, first, second, recipe=recipe)
        list(training._one_step())
        assert set(training._carried) == {0, 1, 2}
        losses = []
        training._over_machines = lambda *mean: losses.append(mean) or mean
        assert [e.sequences for e in training._one_step() if isinstance(e, Part)] == [1]
        (loss, tree, count), total = losses[0], second.weights.sum()
        assert count.item() == total
        cache = model.make_cache()
        model(mx.array(first.ids[[0, 2], :-1]), cache)
        parts = [
            gradients(model, mx.array(second.ids[[1]]), weights=mx.array(second.weights[[1]])),
            gradients(model, mx.array(second.ids[[0, 2]]), weights=mx.array(second.weights[[0, 2]]), cache=cache),
        ]
        shares = [float(second.weights[rows].sum() / total) for rows in ([1], [0, 2])]
        assert loss.item() == pytest.approx(
            sum(s * x.item() for s, (x, _) in zip(shares, parts, strict=True)), rel=1e-5
        )
        one, other = (dict(tree_flatten(tree)) for _, tree in parts)
        assert close(tree, {name: shares[0] * one[name] + shares[1] * other[name] for name in one}, 1e-6)
        start = "model.layers.0.seq_modeling_block.W1"
        assert mx.abs(one[start]).max() > 0 and mx.abs(other[start]).max() == 0


class TestInnerLearningRate:
    def test_it_rises_during_the_warm_up_and_is_whole_outside_of_steps(self, monkeypatch):
        model = build("mlp", "111")
        seen, layer = [], model.layers[0].seq_modeling_block
        whole = layer.base_lr
        recipe = Recipe(SCHEDULE, micro_batch=3, inner_lr_start=0.1)
        training = trainer(model, batch(), recipe=recipe)
        monkeypatch.setattr(
            "mlx_ttt.training.loop.gradients", lambda *a, **k: seen.append(layer.base_lr) or gradients(*a, **k)
        )
        list(training.run())
        own = model.args.ttt_base_lr
        assert seen == pytest.approx([whole * x / own for x in (0.1, (0.1 + own) / 2, own, own)])
        assert layer.base_lr == whole
