"""Data that the tests share. See tests/data/README.md for where it comes from."""

from __future__ import annotations

from pathlib import Path

import mlx_ttt

import mlx.core as mx  # isort: skip
import pytest
from click.testing import CliRunner

import mlx_ttt.model
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.cli import main

DATA = Path(__file__).parent / "data"
GOLDEN = sorted(path.name for path in (DATA / "golden").iterdir() if path.is_dir())


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Small random checkpoints with the official implementation's outputs, a folder for each."""
    return DATA / "golden"


@pytest.fixture(scope="session")
def golden_model(golden_dir, tmp_path_factory):
    """A golden checkpoint's model, converted by the command line with float32 arithmetic, and what is expected of it.

    Where weights are half-precision, the official logits are float32 ones of the rounded weights.
    """
    made = {}

    def model(name: str):
        if name not in made:
            out = tmp_path_factory.mktemp("golden") / name
            result = CliRunner().invoke(main, ["convert", "mlx", str(golden_dir / name), str(out), "--dtype=float32"])
            assert result.exit_code == 0, result.output
            assert "warning: no tokenizer files" in result.output
            expected = mx.load(str(golden_dir / name / "expected.safetensors"))
            made[name] = mlx_ttt.load_model(out)[0], expected
        return made[name]

    return model


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


@pytest.fixture(scope="session")
def trained(shakespeare_dir, tmp_path_factory):
    """The trained model and its tokenizer, converted as `mlx-ttt convert mlx` does it by default."""
    out = tmp_path_factory.mktemp("trained") / "model"
    convert(shakespeare_dir, out)
    return mlx_ttt.load(out)


@pytest.fixture(scope="session")
def tempest(trained) -> mx.array:
    """The Tempest as token ids with BOS in front, [1, T + 1]."""
    _, tokenizer = trained
    return mx.array(tokenizer.encode((DATA / "tempest.txt").read_bytes().decode("utf-8")))[None]


@pytest.fixture(autouse=True)
def _seed():
    mx.random.seed(0)
