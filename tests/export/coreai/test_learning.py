"""The learning scale and the signals of a bundle's functions, on Apple's runtime, against the model."""

from __future__ import annotations

import numpy as np
import pytest

import mlx_ttt
from mlx_ttt.export.coreai.program import build, save
from mlx_ttt.export.coreai.runtime import Runtime, start_session
from mlx_ttt.export.functions import Options
from mlx_ttt.export.layout import StateLayout

from ..observing import compare, uneven


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear-mamba", "mlp-mamba", "mlp-transformer"])
def test_scale_and_signals(model_dirs, tmp_path, name):
    model, _ = mlx_ttt.load_model(model_dirs(name))
    options = Options(compute="float32", learning=True, signals=True)
    save(build(model, "float32", options, ("decode", "prefill")), tmp_path / "model.aimodel")
    ids = np.random.default_rng(0).integers(1, model.args.vocab_size, 4 * model.args.mini_batch_size)
    with Runtime(tmp_path / "model.aimodel") as runtime:
        session = start_session(runtime, StateLayout.of(model.args), np.float32)
        compare(model, session, ids, uneven(model), 1e-4)
