"""Data that the tests share. See tests/data/README.md for where it comes from."""

from __future__ import annotations

from pathlib import Path

import mlx_ttt  # noqa: F401  before MLX, so that OpenBLAS is found

import mlx.core as mx  # isort: skip
import pytest

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


@pytest.fixture(autouse=True)
def _seed():
    mx.random.seed(0)
