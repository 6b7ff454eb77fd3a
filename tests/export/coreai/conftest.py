"""Programs that the tests share, each made, compiled and loaded once."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack

import pytest

import mlx_ttt

collect_ignore_glob = [] if importlib.util.find_spec("coreai") else ["test_*.py"]


@pytest.fixture(scope="session")
def programs(model_dirs, tmp_path_factory):
    """A model of that name and its program, loaded; made when asked for."""
    from mlx_ttt.export.coreai.program import ALL, build, save
    from mlx_ttt.export.coreai.runtime import Runtime
    from mlx_ttt.export.functions import Options

    made = {}
    with ExitStack() as stack:

        def program(name: str, weights: str = "float32", compute: str = "float32", functions: tuple = ALL):
            key = name, weights, compute, functions
            if key not in made:
                model, _ = mlx_ttt.load_model(model_dirs(name))
                path = tmp_path_factory.mktemp(name) / "model.aimodel"
                save(build(model, weights, Options(compute=compute), functions), path)
                made[key] = model, stack.enter_context(Runtime(path))
            return made[key]

        yield program
