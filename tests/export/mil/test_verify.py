"""The comparison of a package with its model, as a command and as numbers."""

from __future__ import annotations

import pytest

pytest.importorskip("coremltools", reason='needs coremltools: pip install "mlx-ttt[coreml]"')

import math
import re
import shutil
from pathlib import Path

import numpy as np
from click.testing import CliRunner

import mlx_ttt
from mlx_ttt.cli.coreml import verify as command
from mlx_ttt.errors import CheckpointError, TTTError
from mlx_ttt.export import verify as room
from mlx_ttt.export.layout import StateLayout
from mlx_ttt.export.mil import core_ai, runners
from mlx_ttt.export.mil.session import read_metadata
from mlx_ttt.export.verify import divergence, overlap, verify


@pytest.mark.slow
def test_figures(exported, model_dirs):
    rounded, exact, second = verify(exported, model_dirs("mlp-mamba"))
    assert (rounded.where, exact.where) == ("interpreter", "interpreter, float32")
    assert second.where == "Core AI's runtime, float32"
    assert rounded.positions == exact.positions > 60
    assert 0 < rounded.largest_difference <= 0.02
    assert exact.largest_difference <= rounded.largest_difference
    assert rounded.top1 >= 0.95
    assert rounded.top5 >= 0.95
    assert 0 < rounded.divergence < 1e-3
    assert 0 < rounded.state_error < 0.01


@pytest.mark.slow
def test_a_package_with_another_number_is_found_out(exported, model_dirs, tmp_path):
    """One weight of the last norm is larger than the model's."""
    model, _ = mlx_ttt.load_model(model_dirs("mlp-mamba"))
    stored = np.array(model.model.norm.weight).astype(np.float16)
    changed = Path(shutil.copytree(exported, tmp_path / "Changed.mlpackage"))
    file = changed / "Data/com.apple.CoreML/weights/weight.bin"
    data = file.read_bytes()
    assert data.count(stored.tobytes()) == 1
    larger = stored.copy()
    larger[3] += 4
    file.write_bytes(data.replace(stored.tobytes(), larger.tobytes()))
    for found in verify(changed, model_dirs("mlp-mamba"), tokens=30):
        assert found.largest_difference > 0.02
        assert found.state_error < 0.01


def test_another_model(exported, model_dirs):
    with pytest.raises(CheckpointError, match="exported from another model"):
        verify(exported, model_dirs("linear-transformer"))


def test_what_is_no_package_of_ours(model_dirs, tmp_path):
    with pytest.raises(CheckpointError, match="no such package"):
        verify(tmp_path / "none.mlpackage", model_dirs("mlp-mamba"))
    (tmp_path / "empty.mlpackage").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify(tmp_path / "empty.mlpackage", model_dirs("mlp-mamba"))


@pytest.mark.slow
def test_command(exported, model_dirs):
    result = CliRunner().invoke(command, [str(exported), "--against", str(model_dirs("mlp-mamba")), "--tokens", "40"])
    assert result.exit_code == 0, result.output
    for word in ("largest difference", "same best token", "same five best", "KL divergence", "state drift"):
        assert word in result.stdout
    result = CliRunner().invoke(command, [str(exported), "--against", str(model_dirs("linear-transformer"))])
    assert result.exit_code == 2
    assert re.fullmatch(r"error: [^\n]+another model[^\n]+\n", result.stderr)


class Answers:
    """A session whose logits are all the same number; an error is raised instead."""

    block, signals = 16, {}

    def __init__(self, model_dir: Path, logit: float | Exception):
        args = mlx_ttt.load_model(model_dir)[0].args
        self.logits, self.offset = logit, 0
        self.vocab_size, self.state = args.vocab_size, np.zeros(StateLayout.of(args).shape, np.float32)

    def feed(self, ids):
        if isinstance(self.logits, Exception):
            raise self.logits
        self.offset += len(ids)
        yield self.offset, np.full((1, self.vocab_size), self.logits, np.float32)


@pytest.fixture
def answering(model_dirs, monkeypatch):
    """Sets what each unit answers."""

    def answer(**answers: float | Exception):
        units = [(unit, lambda x=x: Answers(model_dirs("mlp-mamba"), x)) for unit, x in answers.items()]
        monkeypatch.setattr(runners, "_sessions", lambda package: units)
        monkeypatch.setattr(core_ai, "require_coreai", missing)

    def missing():
        raise TTTError("not here")

    return answer


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_logits_that_are_not_finite(exported, model_dirs, answering, logit):
    answering(CPU_ONLY=logit)
    with pytest.raises(CheckpointError, match=r"^the package, in CPU_ONLY, gives logits that are not finite"):
        verify(exported, model_dirs("mlp-mamba"), ids=range(20))


def test_a_model_whose_logits_are_not_finite(exported, model_dirs, monkeypatch):
    broken, config = mlx_ttt.load_model(model_dirs("mlp-mamba"))
    monkeypatch.setattr(room, "load_model", lambda _: (broken, config))
    monkeypatch.setattr(room, "fingerprint", lambda _: read_metadata(exported)["model"])
    broken.model.norm.weight = broken.model.norm.weight * math.nan
    with pytest.raises(CheckpointError, match="the model gives logits that are not finite"):
        verify(exported, model_dirs("mlp-mamba"), ids=range(20))


def test_a_unit_that_refuses(exported, model_dirs, answering):
    answering(CPU_ONLY=1.0, CPU_AND_NE=RuntimeError("cannot run\nstack"), ALL=2.0)
    result = CliRunner().invoke(command, [str(exported), "--against", str(model_dirs("mlp-mamba"))])
    assert result.exit_code == 0, result.output
    assert "\nCPU_AND_NE: refused: cannot run\nALL, " in result.stdout
    answering(CPU_ONLY=RuntimeError("cannot run\nstack"), ALL=RuntimeError())
    with pytest.raises(CheckpointError, match=r"\.mlpackage: nothing runs it; CPU_ONLY: cannot run$"):
        verify(exported, model_dirs("mlp-mamba"), ids=range(20))


def test_a_package_is_compiled_once_and_nothing_stays(exported, model_dirs, answering, tmp_path, monkeypatch):
    def compile_model(path):
        folder = tmp_path / str(len(compiled))
        folder.mkdir()
        compiled.append(folder)
        return str(folder)

    def refuse(path):
        raise RuntimeError("no such op\nstack")

    compiled, used = [], []
    answering(CPU_ONLY=1.0, ALL=1.0)
    monkeypatch.setattr(runners.ct.models.utils, "compile_model", compile_model)
    monkeypatch.setattr(runners, "_devices", lambda paths, unit: used.append({*map(Path, paths.values())}))
    monkeypatch.setattr(runners.sys, "platform", "darwin")
    verify(exported, model_dirs("mlp-mamba"), ids=range(20))
    assert used == [set(compiled)] * 2
    assert len(compiled) == 1
    assert not compiled[0].exists()
    monkeypatch.setattr(runners.ct.models.utils, "compile_model", refuse)
    with pytest.raises(CheckpointError, match=r"\.mlpackage: Core ML cannot compile it: no such op$"):
        verify(exported, model_dirs("mlp-mamba"), ids=range(20))


def test_one_of_a_separate_pair(model_dirs, tmp_path):
    for name in ("decode", "prefill"):
        (tmp_path / f"Two-{name}.mlpackage").mkdir()
    for name in ("decode", "prefill"):
        with pytest.raises(CheckpointError, match=r"one of two; give Two\.mlpackage without -decode or -prefill"):
            verify(tmp_path / f"Two-{name}.mlpackage", model_dirs("mlp-mamba"))


def test_overlap():
    wanted = np.array([[5.0, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]])
    found = np.array([[5.0, 4, 0, 1, 2, 3], [5, 1, 2, 3, 4, 0]])
    assert overlap(found, wanted, 1) == 0.5
    assert overlap(found, wanted, 5) == pytest.approx((4 + 4) / 10)


def test_divergence():
    wanted = np.log([[0.5, 0.25, 0.25]])
    assert divergence(wanted + 3, wanted) == pytest.approx(0, abs=1e-12)
    even = np.zeros((1, 3))
    assert divergence(even, wanted) == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75))
