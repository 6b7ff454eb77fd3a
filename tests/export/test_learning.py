"""The learning scale as an input, and signals as outputs, of the description: run by NumPy, against the model."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_ttt.export.functions import SIGNALS

from ..models import build
from .eager import EagerFunctions, EagerOperations, eager_session
from .observing import compare, uneven
from .texts import error, expected


def text(model, n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, model.args.vocab_size, n)


@pytest.mark.parametrize("flags", ["000", "111"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_scale_and_signals(kind, flags):
    model = build(kind, flags)
    K = model.args.mini_batch_size
    session = eager_session(model, prefill_tokens=2 * K, learning=True, signals=True)
    compare(model, session, text(model, 6 * K - 2), uneven(model), 1e-4)


def test_signals_without_a_scale():
    model = build("mlp", "101")
    compare(model, eager_session(model, signals=True), text(model, 26), None, 1e-4)


def test_no_learning():
    """With 0 the weights stay as they are, and nothing is written."""
    model = build("linear", "000")
    session = eager_session(model, learning=True, signals=True)
    session.learning = 0 * session.learning
    ids = text(model, 2 * model.args.mini_batch_size)
    list(session.feed(ids))
    assert not session.signals["writeNorm"].any()
    assert not session.signals["lr"].any()
    assert session.signals["loss"].all()
    assert error(session.state[:, :, : model.args.head_dim], expected(model, ids)[1][:, :, : model.args.head_dim]) == 1


def test_tokens_that_do_not_count_give_zeros():
    model = build("linear", "000")
    K = model.args.mini_batch_size
    session = eager_session(model, signals=True)
    functions: EagerFunctions = session._functions
    outputs = functions.predict(
        "prefill", {"inputIds": np.full((1, K), 3, np.int32), "length": np.array([2], np.int32)}
    )
    for name in SIGNALS:
        assert outputs[name].shape == (2, 2, K)
        assert outputs[name][..., :2].all()
        assert not outputs[name][..., 2:].any()


def test_nothing_is_computed_that_is_not_asked_for():
    """Without the options the functions are those of before, operation by operation."""

    def calls(**options) -> list[str]:
        called: list[str] = []

        class Recording(EagerOperations):
            def __getattribute__(self, name):
                called.append(name)
                return super().__getattribute__(name)

        model = build("mlp", "111")
        list(eager_session(model, Recording(), **options).feed([1]))
        return called

    plain = calls()
    assert len(calls(learning=True)) > len(plain)
    assert len(calls(signals=True)) > len(plain)
    assert calls() == plain
