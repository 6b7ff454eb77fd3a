"""The description of the exported network, run by NumPy, against the network in MLX."""

from __future__ import annotations

import ast
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_ttt.export
from mlx_ttt.errors import CheckpointError
from mlx_ttt.export.operations import OPERATIONS
from mlx_ttt.model import Model

from ..models import FLAGS, build, configuration
from .eager import EagerOperations, eager_session
from .texts import error, expected, feed, feed_all, singly

EXACT = 1e-4  # of the largest absolute logit


def text(model: Model, n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, model.args.vocab_size, n)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_every_configuration(kind, flags):
    """Blocks of two mini-batches; the text's middle through decode; an incomplete last block. Heads of 12 features."""
    model = build(kind, flags)
    K = model.args.mini_batch_size
    ids = text(model, 7 * K - 2)
    session = eager_session(model, prefill_tokens=2 * K, all_logits=True)
    logits = feed_all(session, ids[: 2 * K + 4], *singly(ids[2 * K + 4 : 4 * K]), ids[4 * K :])
    wanted, state = expected(model, ids)
    assert error(logits, wanted) <= EXACT
    assert error(session.state, state) <= EXACT


@pytest.mark.parametrize(
    "change",
    [
        {"conv_kernel": 1},
        {"conv_kernel": 5},
        {"mini_batch_size": 1},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 1, "hidden_size": 32},
        {"num_attention_heads": 3, "hidden_size": 18},
        {"num_attention_heads": 1, "hidden_size": 34},
        {"num_attention_heads": 6, "hidden_size": 24},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_unusual_sizes(kind, change):
    args = configuration(kind, "111")
    for name, value in change.items():
        setattr(args, name, value)
    mx.random.seed(1)
    model = Model(args)
    session = eager_session(model)
    ids = text(model, 20)
    positions, found = feed(session, ids[:9], *singly(ids[9:14]), ids[14:])
    wanted, state = expected(model, ids)
    assert error(found, wanted[positions]) <= EXACT
    assert error(session.state, state) <= EXACT


def test_the_head_in_pieces():
    model = build("mlp", "110")
    ids = text(model, 15)
    answers = [feed(eager_session(model, split_head=n), ids, *singly(ids[:2]))[1] for n in (1, 3)]
    assert error(*answers) <= 1e-6


def test_a_weight_that_is_not_finite():
    model = build("linear", "000")
    model.layers[1].mlp.up_proj.weight = model.layers[1].mlp.up_proj.weight * float("nan")
    with pytest.raises(CheckpointError, match="not a finite number"):
        feed(eager_session(model), [1])


def test_every_operation_is_used():
    """A lowering provides nothing in vain: a TTT-MLP with all flags calls each of the operations."""
    called = set()

    class Recording(EagerOperations):
        def __getattribute__(self, name):
            called.add(name)
            return super().__getattribute__(name)

    model = build("mlp", "111")
    feed(eager_session(model, Recording(), prefill_tokens=2 * model.args.mini_batch_size), text(model, 15), [1])
    assert called >= set(OPERATIONS)


def test_the_description_knows_no_lowering():
    """No module of the description imports coremltools or a lowering's folder."""
    room = Path(mlx_ttt.export.__file__).parent
    for name in ("operations", "numbers", "elementwise", "layout", "weights", "calls", "rule", "network", "functions"):
        tree = ast.parse((room / f"{name}.py").read_text(encoding="utf-8"))
        imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not [module for module in imported if module.split(".")[0] in ("coremltools", "mil")], name
