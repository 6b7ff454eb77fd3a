"""Packages that the tests share, each made once."""

from __future__ import annotations

import importlib.util

import pytest

import mlx_ttt
from mlx_ttt.checkpoint.convert import convert

from ..conftest import DATA

if importlib.util.find_spec("coremltools"):
    from mlx_ttt.export.mil import require_coremltools

    require_coremltools()


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """Each golden checkpoint as a model directory, made when asked for by name."""
    made = {}

    def model_dir(name: str):
        if name == "trained":
            return mlx_ttt.bundled_model()
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            convert(DATA / "golden" / name, made[name])
        return made[name]

    return model_dir


@pytest.fixture(scope="session")
def packages(model_dirs, tmp_path_factory):
    """Packages of those models, made when asked for."""
    from .mil.packages import Package

    made = {}

    def package(name: str, saved: bool = True, **settings) -> Package:
        key = (name, saved, *sorted(settings.items()))
        if key not in made:
            model, _ = mlx_ttt.load_model(model_dirs(name))
            made[key] = Package(model, tmp_path_factory.mktemp(name) if saved else None, **settings)
        return made[key]

    return package


@pytest.fixture(scope="session")
def exported(model_dirs, tmp_path_factory):
    """A finished package of the smallest golden checkpoint with all flags."""
    from mlx_ttt.export.mil.package import export

    out = tmp_path_factory.mktemp("exported") / "Small.mlpackage"
    export(model_dirs("mlp-mamba"), out, companions=False)
    return out
