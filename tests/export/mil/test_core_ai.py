"""Packages on Core AI's runtime beside the interpreter: two programs by different authors give the same numbers."""

from __future__ import annotations

import multiprocessing

import pytest

pytest.importorskip("coremltools", reason='needs coremltools: pip install "mlx-ttt[coreml]"')

import numpy as np

import mlx_ttt
from mlx_ttt.errors import CheckpointError, TTTError
from mlx_ttt.export.mil import core_ai
from mlx_ttt.export.mil.core_ai import NAME, _Lowering, on_core_ai
from mlx_ttt.export.mil.interpreter import _OPERATIONS
from mlx_ttt.export.mil.package import export
from mlx_ttt.export.mil.program import Options
from mlx_ttt.export.mil.session import interpreted
from mlx_ttt.export.verify import Refusal, verify

from ..texts import error, feed, singly

HOW = {
    "int8": ("linear-transformer", {"weights": "int8"}),
    "int4, io": ("mlp-transformer", {"weights": "int4", "options": Options(state_mode="io")}),
    "a pair, mixed": ("mlp-mamba", {"separate": True, "options": Options("mixed", split_head=3, prefill_tokens=32)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_the_same_as_the_interpreter(model_dirs, tmp_path, how):
    pytest.importorskip("coreai")
    name, options = HOW[how]
    package = tmp_path / "P.mlpackage"
    export(model_dirs(name), package, companions=False, **options)
    ids = np.random.default_rng(0).integers(1, mlx_ttt.load_model(model_dirs(name))[0].args.vocab_size, 70)
    found = []
    with on_core_ai(package) as on_runtime:
        for session in (on_runtime(), interpreted(package, rounding=False)()):
            _, logits = feed(session, ids[:37], *singly(ids[37:49]), ids[49:])
            found.append((logits, session.state))
        again = feed(on_runtime(), ids[:9])[1]  # another text, from zeros
    (logits, state), (wanted, wanted_state) = found
    assert error(logits, wanted) <= 2e-5
    assert error(state, wanted_state) <= (2e-3 if "io" in how else 2e-5)  # InOut starts in float16
    first = feed(interpreted(package, rounding=False)(), ids[:9])[1]
    assert error(again, first) <= 2e-5
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_why_a_row_is_missing(exported, model_dirs, monkeypatch):
    def missing():
        raise TTTError("Core AI bundles need coreai-core: pip install it")

    monkeypatch.setattr(core_ai, "require_coreai", missing)
    *others, row = verify(exported, model_dirs("mlp-mamba"), tokens=40)
    assert row == Refusal(NAME, "Core AI bundles need coreai-core: pip install it")
    assert len(others) == 2


def test_every_operation_of_the_interpreter_is_known():
    assert set(core_ai._LOWERED) | {"coreml_update_state"} == set(_OPERATIONS)


def test_an_unknown_operation():
    class Unknown:
        op_type = "conv"

    lowering = object.__new__(_Lowering)
    with pytest.raises(CheckpointError, match="does not know the operation 'conv'"):
        lowering._results(Unknown(), {})
