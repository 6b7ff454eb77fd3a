"""A block as one node in a graph that is differentiated: gradients, the state behind it, and memory."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ttt.backends.cpu import block
from mlx_ttt.network.model import Block, through_block

from ...models import KINDS, VOCABULARY, build
from .c_code import needs_c

pytestmark = needs_c

SIZES = {"hidden_size": 32}  # heads of 16


@pytest.fixture
def nodes(monkeypatch):
    """How many tokens each node differentiates at a time. Every call of 16 tokens or more makes one."""
    monkeypatch.setattr(block, "CHUNK", 15)
    made, make = [], block._Node.__init__

    def note(self, *args):
        make(self, *args)
        made.append(self._size)

    monkeypatch.setattr(block._Node, "__init__", note)
    return made


@pytest.fixture
def checkpointed(monkeypatch):
    """Have mlx-lm compute blocks again in the backward."""
    own = Block.__call__
    yield lambda model: grad_checkpoint(model.layers[0])
    Block.__call__ = own


def without_nodes(function, *args):
    versions, through_block._versions = through_block._versions, []
    try:
        return function(*args)
    finally:
        through_block._versions = versions


def differentiated(model, ids, lengths=None):
    """Loss, gradients and the offsets behind the tokens, from the middle of a mini-batch on."""
    caches = model.make_cache()
    model(ids[:, :5], caches)
    for c in caches if lengths else ():
        c.prepare(lengths=lengths)
    counted = mx.arange(ids.shape[1] - 6) < mx.array(lengths or [ids.shape[1]])[:, None]

    def loss(model):
        running = [c.copy() for c in caches]
        total = (nn.losses.cross_entropy(model(ids[:, 5:-1], running), ids[:, 6:]) * counted).mean()
        offsets.append([c.offset for c in running])
        return total + sum(w.square().sum() for c in running for w in (*c.weights, c.rows))

    offsets: list = []
    return (*nn.value_and_grad(model, loss)(model), offsets[0])


def from_the_start(model, ids):
    """The same without a state before or behind the tokens."""
    return (
        *nn.value_and_grad(model, lambda model: nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean())(model),
        0,
    )


def agree(found, expected):
    (loss, tree, offsets), (expected_loss, expected_tree, expected_offsets) = found, expected
    assert offsets == expected_offsets
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    tree, expected_tree = dict(tree_flatten(tree)), dict(tree_flatten(expected_tree))
    largest = max(mx.abs(g).max().item() for g in expected_tree.values())
    assert tree.keys() == expected_tree.keys()
    assert all(mx.abs(g - expected_tree[name]).max() <= 1e-5 * largest for name, g in tree.items())


@pytest.mark.parametrize("lengths", [None, [31, 50]], ids=["all tokens", "padding"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, lengths, nodes, monkeypatch):
    """In one part, and in parts of 15 tokens, two and a half mini-batches."""
    model = build(kind, "111", **SIZES)
    ids = mx.random.randint(0, VOCABULARY, (2, 60))
    expected = without_nodes(differentiated, model, ids, lengths)
    assert nodes == []
    agree(differentiated(model, ids, lengths), expected)
    assert set(nodes) == {54}
    monkeypatch.setattr(block, "_CALL", None)
    agree(differentiated(model, ids, lengths), expected)
    assert set(nodes) == {54, 15}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_checkpointing(kind, nodes, checkpointed):
    model = build(kind, "111", **SIZES)
    ids = mx.random.randint(0, VOCABULARY, (2, 41))
    expected = without_nodes(from_the_start, model, ids)
    checkpointed(model)
    agree(from_the_start(model, ids), expected)
    assert set(nodes) == {15}


def test_frozen_parameters_stay_out_of_the_node(nodes):
    model = build(KINDS[0], "111", **SIZES)
    model.freeze()
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    ids = mx.random.randint(0, VOCABULARY, (1, 40))
    expected = without_nodes(differentiated, model, ids)
    agree(differentiated(model, ids), expected)
    assert len(nodes) == 1  # the block before the adapters needs no gradient


def test_dropout_is_left_to_mlx(nodes):
    """Computed again, it would drop other values."""
    model = build(KINDS[0], "111", **SIZES)
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.5})
    model.train()
    differentiated(model, mx.random.randint(0, VOCABULARY, (1, 40)))
    assert len(nodes) == len(model.layers) - 1


def test_without_a_gradient_there_is_no_node(nodes):
    model = build(KINDS[0], "111", **SIZES)
    model(mx.random.randint(0, VOCABULARY, (1, 40)))
    mx.eval(model(mx.random.randint(0, VOCABULARY, (1, 40)), model.make_cache()))
    assert nodes == []


def test_second_derivatives(nodes):
    layer = build(KINDS[0], "111", **SIZES).layers[0]
    x = mx.random.normal((1, 20, layer.seq_norm.weight.size))

    def twice(x):
        return mx.grad(lambda x: mx.grad(lambda x: layer(x).square().sum())(x).square().sum())(x)

    expected = without_nodes(twice, x)
    assert np.allclose(twice(x), expected, rtol=1e-3, atol=1e-3 * mx.abs(expected).max().item())
    assert nodes


@pytest.mark.slow
def test_memory(checkpointed):
    """Beside the logits, of half a megabyte: a block's inside is there once, and with checkpointing a part of it."""
    model = build(KINDS[0], "111", num_hidden_layers=6, hidden_size=64, intermediate_size=160)
    ids = mx.random.randint(0, VOCABULARY, (1, 2049))

    def peak(function, *args):
        gc.collect()  # what earlier tests have left
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(function(*args)[:2])
        return mx.get_peak_memory() - before

    whole = peak(without_nodes, from_the_start, model, ids)
    plain = peak(from_the_start, model, ids)
    checkpointed(model)
    small = peak(from_the_start, model, ids)
    assert plain < 0.6 * whole
    assert small < 0.7 * plain
