"""The graph against the network in MLX: exact without rounding, near in half precision, whatever the configuration."""

from __future__ import annotations

import pytest

pytest.importorskip("coremltools", reason='needs coremltools: pip install "mlx-ttt[coreml]"')

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from coremltools import target
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types

from mlx_ttt.export.elementwise import gelu_and_grad
from mlx_ttt.export.mil.interpreter import Interpreter
from mlx_ttt.export.mil.operations import MILOperations
from mlx_ttt.export.verify import overlap
from mlx_ttt.model import Model

from ...conftest import GOLDEN
from ...models import FLAGS, build, configuration
from ..texts import error, expected, feed, feed_all, singly
from .packages import Package

EXACT = 1e-4  # of the largest absolute logit, in float32
HALF = 2e-2  # in float16
MODELS = [*GOLDEN, "trained"]


def text(model: Model, n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, model.args.vocab_size, n)


def by_prefill_and_decode(session_of, ids: np.ndarray, K: int, phases):
    """Read in several ways: by prefill to a phase of the second mini-batch and two tokens more by decode; and by
    decode through a whole mini-batch. Returns positions, their logits, and states after a number of tokens."""
    ends = [(K + phase, K + phase + 2) for phase in phases] + [(K + K // 3, 2 * K + K // 3 + 1)]
    positions, logits, states = [], [], []
    for middle, end in ends:
        session = session_of()
        at, found = feed(session, ids[:middle], *singly(ids[middle:end]))
        positions.append(at)
        logits.append(found)
        states.append((end, session.state))
    return np.concatenate(positions), np.concatenate(logits), states


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("linear-transformer", "mlp-mamba") else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_the_graph_is_exact(packages, name):
    package = packages(name, saved=False, compute="float32")
    model, K = package.model, package.model.args.mini_batch_size
    ids = text(model, 3 * K)
    wanted, _ = expected(model, ids)
    positions, found, states = by_prefill_and_decode(lambda: package.session(rounding=False), ids, K, range(K))
    assert error(found, wanted[positions]) <= EXACT
    for n, state in states[:: K // 2]:
        assert error(state, expected(model, ids[:n])[1]) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_half_precision(packages, name):
    package = packages(name)
    model, K = package.model, package.model.args.mini_batch_size
    ids = text(model, 3 * K)
    wanted, _ = expected(model, ids)
    positions, found, _ = by_prefill_and_decode(package.session, ids, K, [0, K // 2, K - 1])
    assert 0 < error(found, wanted[positions]) <= HALF
    assert overlap(found, wanted[positions], 5) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_the_same_graph(packages, name):
    """But for casts, the half-precision program has the operations of the exact one, in the same order."""

    def operations(package):
        apart = ("const", "cast")
        return {
            name: [(op.op_type, tuple(op.outputs[0].shape)) for op in f.operations if op.op_type not in apart]
            for name, f in package.functions.items()
        }

    assert operations(packages(name)) == operations(packages(name, saved=False, compute="float32"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_every_configuration(kind, flags):
    """Blocks of two mini-batches with all logits; the text's middle through decode; an incomplete last block."""
    model = build(kind, flags)
    K = model.args.mini_batch_size
    package = Package(model, compute="float32", prefill_tokens=2 * K, all_logits=True)
    ids = text(model, 7 * K - 2)
    session = package.session(rounding=False)
    logits = feed_all(session, ids[: 2 * K + 4], *singly(ids[2 * K + 4 : 4 * K]), ids[4 * K :])
    wanted, state = expected(model, ids)
    assert error(logits, wanted) <= EXACT
    assert error(session.state, state) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"conv_kernel": 1},
        {"conv_kernel": 5},
        {"mini_batch_size": 1},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 1, "hidden_size": 32},
        {"hidden_size": 128},
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
    package = Package(model, compute="float32")
    session = package.session(rounding=False)
    ids = text(model, 20)
    positions, found = feed(session, ids[:9], *singly(ids[9:14]), ids[14:])
    wanted, state = expected(model, ids)
    assert error(found, wanted[positions]) <= EXACT
    assert error(session.state, state) <= EXACT


def test_mixed_precision_learns_in_float32():
    """What is left of the error is the rounding of the state and of what goes into the update."""
    model = build("mlp", "111")
    ids = text(model, 60)
    _, state = expected(model, ids)
    errors = []
    for compute in ("float16", "mixed"):
        package = Package(model, compute=compute)
        session = package.session()
        feed(session, ids)
        learned = slice(0, package.layout.first_row("k"))
        errors.append(np.linalg.norm((session.state - state)[:, :, learned]) / np.linalg.norm(state[:, :, learned]))
    assert errors[1] < 0.9 * errors[0] < HALF


@pytest.mark.slow
def test_the_head_in_pieces():
    model = build("linear", "110")
    ids = text(model, 15)
    wanted = feed(Package(model).session(), ids, *singly(ids[:2]))[1]
    package = Package(model, split_head=3)
    assert np.array_equal(feed(package.session(), ids, *singly(ids[:2]))[1], wanted)
    linear = [op.outputs[0].shape for op in package.functions["decode"].operations if op.op_type == "linear"]
    assert linear[-3:] == [(1, 1, 21), (1, 1, 20), (1, 1, 20)]


def test_the_state_as_input_and_output():
    model = build("linear", "111")
    ids = text(model, 27)
    sessions = [Package(model, state_mode=mode).session() for mode in ("state", "io")]
    answers = [feed(session, ids[:17], *singly(ids[17:]))[1] for session in sessions]
    assert np.array_equal(*answers)
    assert np.array_equal(sessions[0].state, sessions[1].state)


def test_a_quantized_model():
    """mlx-lm's quantization is undone: the program holds the numbers that MLX computes with."""
    args = configuration("linear", "111")
    args.hidden_size, args.intermediate_size = 64, 96
    model = Model(args)
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda _, module: hasattr(module, "to_quantized"))
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    ids = text(model, 15)
    positions, found = feed(Package(model, compute="float32").session(rounding=False), ids, *singly(ids[:2]))
    wanted, _ = expected(model, [*ids, *ids[:2]])
    assert error(found, wanted[positions]) <= EXACT


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_eps_counts(compute):
    """Activations of a thousandth, whose squares are as small as eps."""
    model = build("linear", "111")
    model.model.embed_tokens.weight = 1e-3 * model.model.embed_tokens.weight
    ids = text(model, 6)
    wanted, _ = expected(model, ids)
    found = feed_all(Package(model, compute=compute, all_logits=True).session(rounding=compute == "float16"), ids)
    assert error(found, wanted) <= (EXACT if compute == "float32" else HALF)


def test_large_values_do_not_overflow():
    """Activations of a thousand, whose squares are past float16's range."""
    model = build("mlp", "111")
    model.model.embed_tokens.weight = 500 * model.model.embed_tokens.weight
    ids = text(model, 15)
    wanted, _ = expected(model, ids)
    positions, found = feed(Package(model).session(), ids, *singly(ids[:2]))
    assert np.isfinite(found).all()
    assert error(found[:3], wanted[positions[:3]]) <= 0.1


def test_gelu_of_large_values():
    """Beyond 256 the square of its argument is past float16's range; its derivative is 0 or 1 there."""
    z = np.array([-400, -300, -20, -3, -1, -0.1, 0, 0.1, 1, 3, 20, 300, 400], np.float16)
    with Function({"z": mb.placeholder(z.shape, dtype=types.fp16)}, opset_version=target.iOS18) as function:
        function.set_outputs(list(gelu_and_grad(MILOperations(), function.inputs["z"])))
    value, slope = Interpreter(function).predict({"z": z}).values()
    x, h = z.astype(np.float64), 1e-5
    np.testing.assert_allclose(value, gelu(x), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(slope, (gelu(x + h) - gelu(x - h)) / (2 * h), rtol=2e-3, atol=2e-3)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
