"""Data that the tests share. See tests/data/README.md for where it comes from."""

from __future__ import annotations

from pathlib import Path

import mlx_ttt  # noqa: F401  before MLX, so that OpenBLAS is found

import mlx.core as mx  # isort: skip
import pytest

from mlx_ttt.checkpoint.convert import convert

from .native import Spy

DATA = Path(__file__).parent / "data"
GOLDEN = sorted(path.name for path in (DATA / "golden").iterdir() if path.is_dir())


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Small random checkpoints with the official implementation's outputs, a folder for each."""
    return DATA / "golden"


@pytest.fixture(scope="session")
def shakespeare_dir() -> Path:
    """The trained model's official PyTorch checkpoint, with tokenizer and the official implementation's figures."""
    return DATA / "shakespeare-ttt-linear"


@pytest.fixture(scope="session")
def directory(shakespeare_dir, tmp_path_factory) -> Path:
    """The trained model as `convert.py mlx --dtype float32` makes it."""
    out = tmp_path_factory.mktemp("models") / "shakespeare"
    convert(shakespeare_dir, out, dtype=mx.float32)
    return out


@pytest.fixture(autouse=True)
def _seed():
    mx.random.seed(0)


@pytest.fixture
def spy(monkeypatch) -> Spy:
    """Which functions in C are called."""
    return Spy(monkeypatch)
