"""Files of every format that a version has written are read by this one, and those of a newer one are refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path

import mlx_ttt

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_ttt.cli import main
from mlx_ttt.errors import CheckpointError, StateError
from mlx_ttt.export import metadata
from mlx_ttt.export.companions import folder
from mlx_ttt.files import check_format
from mlx_ttt.text import state as states
from mlx_ttt.training import checkpoint

from .formats import FORMATS, logits_after, sum_of

VERSIONS = sorted(path.name for path in FORMATS.iterdir())
NEWER = "which a newer version of mlx-ttt wrote; this one reads up to"


@pytest.fixture(params=VERSIONS)
def written(request) -> Path:
    """What a version wrote."""
    return FORMATS / request.param


@pytest.fixture
def expected(written) -> dict:
    return json.loads((written / "expected.json").read_text())


@pytest.fixture
def opened(written):
    """Its model and tokenizer."""
    return mlx_ttt.load(written / "model")


def with_metadata(file: Path, out: Path, **changes: str) -> Path:
    """A safetensors file with other metadata."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    out.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return out


def test_today_is_among_them():
    """A new format needs files of its own: `python -m tests.formats`."""
    numbers = {
        "states": states.FORMAT,
        "training": checkpoint.FORMAT,
        "packages": metadata.FORMAT,
        "companions": folder.SOURCE_FORMAT,
    }
    assert (numbers, VERSIONS) == ({"states": 2, "training": 1, "packages": 1, "companions": 1}, ["0.2.0"])


class TestStates:
    @pytest.mark.parametrize("name", ["plain", "rewindable", "frozen"])
    def test_it_goes_on(self, name, written, expected, opened):
        state = states.load_state(written / f"{name}.state", *opened)
        got, wanted = logits_after(*opened, state), expected["logits"][name]
        np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())

    def test_a_newer_one(self, written, opened, tmp_path):
        file = with_metadata(written / "plain.state", tmp_path / "newer.state", **{"0.mlx_ttt": "3"})
        with pytest.raises(StateError, match=f"newer.state: has format 3, {NEWER} 2"):
            states.load_state(file, *opened)
        result = CliRunner().invoke(main, ["state", "show", str(file), "--model", str(written / "model")])
        assert result.exit_code == 2 and result.stderr.startswith(f"error: {file}: has format 3")

    @pytest.mark.parametrize("found", ["", "x", "-1", "0", "1.0", "\u0661"])
    def test_none(self, found, written, opened, tmp_path):
        file = with_metadata(written / "plain.state", tmp_path / "odd.state", **{"0.mlx_ttt": found})
        with pytest.raises(StateError, match="its format is no number"):
            states.load_state(file, *opened)


class TestTraining:
    def test_it_is_read(self, written, expected):
        saved, about = checkpoint.load(written / "training")
        wanted = expected["training"]
        assert (saved.step, saved.random, about) == (wanted["step"], wanted["random"], {"options": {"steps": 5}})
        assert [cache.offset for cache in saved.carried[1]] == [wanted["offset"]] * 2
        assert sum_of(saved.weights) == pytest.approx(wanted["weights"], rel=1e-6)
        assert len(saved.optimizer) == 2 * len(saved.weights) + 2  # two moments of each; the rate and the count

    def copied(self, written: Path, out: Path, **changes: object) -> Path:
        shutil.copytree(written / "training", out)
        (file,) = out.glob("*/state.json")
        content = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
        return out

    def test_a_newer_one(self, written, tmp_path):
        out = self.copied(written, tmp_path / "newer", format=2)
        for read in (checkpoint.load, checkpoint.read_about):
            with pytest.raises(CheckpointError, match=f"state.json: has format 2, {NEWER} 1"):
                read(out)

    def test_the_first_ones_say_none(self, written, tmp_path):
        checkpoint.load(self.copied(written, tmp_path / "first", format=None))

    def test_damaged(self, written, tmp_path):
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.read_about(self.copied(written, tmp_path / "odd", about=None))


class TestPackages:
    """Core AI and Core ML."""

    @pytest.fixture
    def bundle(self):
        """The module that reads bundles; it needs Core AI."""
        pytest.importorskip("coreai")
        from mlx_ttt.export.coreai import bundle

        return bundle

    def test_a_bundle_is_read(self, bundle, written, opened):
        found = bundle.read_bundle(written / "bundle")
        assert found.facts["model"] == states.fingerprint(opened[0])
        assert found.facts["mini_batch_size"] == opened[0].args.mini_batch_size

    def test_a_newer_bundle(self, bundle, written, tmp_path):
        shutil.copytree(written / "bundle", tmp_path / "bundle")
        file = tmp_path / "bundle" / "metadata.json"
        content = json.loads(file.read_text())
        content["user_data"][metadata.PREFIX + "format"] = "2"
        file.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=f"bundle: has format 2, {NEWER} 1"):
            bundle.read_bundle(tmp_path / "bundle")

    @pytest.mark.slow
    @pytest.mark.parametrize(("package", "library"), [("bundle", "coreai"), ("package.mlpackage", "coremltools")])
    def test_it_runs(self, package, library, written):
        """As the model does that it was exported from."""
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"no {library}")
        command = ["convert", "verify", str(written / package), "--against", str(written / "model"), "--tokens", "40"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output

    def test_what_lies_beside_a_package(self, written, opened):
        _, about = mx.load(str(written / "source.safetensors"), return_metadata=True)
        assert about == {
            "format": "1",
            "fingerprint": states.fingerprint(*opened),
            "model": states.fingerprint(opened[0]),
        }


def test_numbers():
    assert [check_format("f", found, 2, StateError) for found in ("1", 1, 2)] == [1, 1, 2]
    for found in (True, None, 1.5, "9" * 5000):
        with pytest.raises(StateError, match=r"^f: "):
            check_format("f", found, 2, StateError)
