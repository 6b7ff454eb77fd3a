"""The exported functions on Apple's runtime, in odd splits, against the model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_ttt
from mlx_ttt.export.coreai.program import build, outside, save
from mlx_ttt.export.coreai.runtime import Main, Runtime, start_session
from mlx_ttt.export.coreai.state import apart, packed, together, unpacked
from mlx_ttt.export.functions import Options
from mlx_ttt.export.layout import StateLayout

from ..texts import error, expected, feed, singly

EXACT = 1e-4  # of the largest absolute logit
HALF_LOGITS = 6e-4  # where logits leave in float16
MODELS = ["linear-mamba", "mlp-mamba", "mlp-transformer", "trained"]


def text(model, n: int) -> list[int]:
    return [int(id) for id in np.random.default_rng(0).integers(1, model.args.vocab_size, n)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_decode_and_prefill(programs, name):
    model, runtime = programs(name)
    layout, K = StateLayout.of(model.args), model.args.mini_batch_size
    ids = text(model, 4 * K + 5)
    session = start_session(runtime, layout, np.float32)
    positions, logits = feed(session, ids[: K + 3], *singly(ids[K + 3 : 2 * K + 1]), ids[2 * K + 1 :])
    wanted, state = expected(model, ids)
    assert error(logits, wanted[positions]) <= EXACT
    assert error(session.state, state) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_main_in_any_splits(programs, name):
    model, runtime = programs(name)
    layout, K = StateLayout.of(model.args), model.args.mini_batch_size
    ids = text(model, 5 * K + 3)
    wanted, state = expected(model, ids)
    for cuts in ((5 * K + 3,), (1, 1, 2 * K, K - 2, K, 3, K), (K,) * 5 + (1, 2), (3,) * ((5 * K + 3) // 3)):
        main, start, logits = Main(runtime, layout, np.float32), 0, []
        for n in cuts:
            logits.append(main.read(ids[start : start + n]))
            start += n
        assert error(np.concatenate(logits), wanted[:start]) <= HALF_LOGITS
        if start == len(ids):
            found = packed(layout, apart(layout, main.arrays))
            assert error(found, state) <= EXACT


@pytest.mark.slow
def test_a_text_goes_from_prefill_to_main_and_back(programs):
    """The two forms of the state hold the same."""
    model, runtime = programs("mlp-mamba")
    layout, K = StateLayout.of(model.args), model.args.mini_batch_size
    ids = text(model, 4 * K)
    wanted, _ = expected(model, ids)
    session = start_session(runtime, layout, np.float32)
    feed(session, ids[: K + 5])
    main = Main(runtime, layout, np.float32)
    main.arrays = together(layout, unpacked(layout, session.state))
    main.offset = K + 5
    assert error(main.read(ids[K + 5 : 2 * K + 9]), wanted[K + 5 : 2 * K + 9]) <= HALF_LOGITS
    session.restore(packed(layout, apart(layout, main.arrays)), main.offset)
    positions, logits = feed(session, *singly(ids[2 * K + 9 : 3 * K]), ids[3 * K :])
    assert error(logits, wanted[positions]) <= EXACT * 10  # restore() rounds the state to float16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jax-linear-mamba", "jax-mlp-transformer", "linear-transformer-head96", "quantized"])
def test_other_sources(name, model_dirs, tmp_path):
    """Checkpoints of JAX, heads of 96, matrices that are quantized already: all three functions."""
    model, _ = mlx_ttt.load_model(model_dirs("mlp-transformer" if name == "quantized" else name))
    model.set_dtype(mx.float32)  # the same numbers; MLX would round activations to those of the checkpoint
    if name == "quantized":
        nn.quantize(model, group_size=32, bits=4, class_predicate=lambda _, module: hasattr(module, "to_quantized"))
    save(build(model, "float32", Options(compute="float32")), tmp_path / "model.aimodel")
    with Runtime(tmp_path / "model.aimodel") as runtime:
        check_all_functions(model, runtime)


def check_all_functions(model, runtime) -> None:
    layout, K = StateLayout.of(model.args), model.args.mini_batch_size
    ids = text(model, 2 * K + 5)
    wanted, state = expected(model, ids)
    session = start_session(runtime, layout, np.float32)
    positions, logits = feed(session, ids[: K + 1], *singly(ids[K + 1 :]))
    assert error(logits, wanted[positions]) <= EXACT
    assert error(session.state, state) <= EXACT
    main = Main(runtime, layout, np.float32)
    logits = np.concatenate([main.read(ids[: K + 3]), main.read(ids[K + 3 :])])
    assert error(logits, wanted) <= HALF_LOGITS
    assert error(packed(layout, apart(layout, main.arrays)), state) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["mixed", "float16"])
@pytest.mark.parametrize("name", ["linear-mamba", "mlp-mamba"])
def test_half_precision(programs, name, compute):
    """Within the bounds of `verify`, of small models: 0.8 % of the logits, 0.4 % of the state. Not exact."""
    model, runtime = programs(name, "float16", compute)
    layout, K = StateLayout.of(model.args), model.args.mini_batch_size
    ids, number = text(model, 4 * K), outside(compute)
    wanted, state = expected(model, ids)
    session, main = start_session(runtime, layout, number), Main(runtime, layout, number)
    positions, logits = feed(session, ids[: K + 1], *singly(ids[K + 1 : 2 * K]), ids[2 * K :])
    found = np.concatenate([main.read(ids[: K + 3]), main.read(ids[K + 3 :])])
    assert 1e-4 < error(logits, wanted[positions]) <= 0.02
    assert error(found, wanted) <= 0.02
    assert error(session.state, state) <= 0.02
    assert error(packed(layout, apart(layout, main.arrays)), state) <= 0.02
