"""The exported functions on Apple's runtime, in odd splits, against the model."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_ttt.export.coreai.runtime import Main, start_session
from mlx_ttt.export.coreai.state import apart, packed, together, unpacked
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
