"""The bundle: its files, its formats on Apple's runtime, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from transformers import PreTrainedTokenizerFast

import mlx_ttt
from mlx_ttt.cli.convert import convert
from mlx_ttt.errors import CheckpointError, OutputError, TokenizerError, TTTError
from mlx_ttt.export import coreai as room
from mlx_ttt.export.coreai import bundle
from mlx_ttt.export.coreai.bundle import export, read_bundle
from mlx_ttt.export.coreai.runtime import start_session
from mlx_ttt.export.coreai.verify import store
from mlx_ttt.export.functions import Options
from mlx_ttt.export.layout import StateLayout
from mlx_ttt.text.state import fingerprint

from ..texts import error, expected, feed, singly


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "Shakespeare"
    export(mlx_ttt.bundled_model(), out, weights="float32", options=Options(compute="float32"))
    return out


@pytest.mark.slow
class TestBundle:
    def test_metadata_is_what_the_runner_reads(self, exported):
        content = json.loads((exported / "metadata.json").read_text())
        assert (content["metadata_version"], content["kind"]) == ("0.2", "llm")
        assert (exported / content["assets"]["main"] / "main.mlirb").is_file()
        language = content["language"]
        assert language["vocab_size"] == 2048
        assert language["embedded_tokenizer"] is True
        assert language["function_map"] == {"main": ["main"]}
        assert language["states"] == dict.fromkeys(["tttWeights", "tttInputs", "tttErrors"], "fixed")
        assert all(isinstance(value, str) for value in content["user_data"].values())
        assert read_bundle(exported).facts["model"] == fingerprint(mlx_ttt.load_model()[0])

    def test_what_swift_reads_beside_the_program(self, exported):
        """The states of `main` by the layout of metadata.json, and the start weights that they are differences from."""
        model, tokenizer = mlx_ttt.load()
        arrays, source = mx.load(str(exported / "source.safetensors"), return_metadata=True)
        known = {"format": "1", "fingerprint": fingerprint(model, tokenizer), "model": fingerprint(model)}
        assert source == known
        start = model.make_cache()[0].weights[0]
        np.testing.assert_array_equal(arrays["0.W1"], start)
        state = read_bundle(exported).facts["state"]
        assert state["groups"]["tttErrors"] == ["e1"]
        assert state["parts"] == StateLayout.of(model.args).description()["parts"]
        assert state["dtype"] == "float32"

    def test_tokenizer_gives_the_same_ids(self, exported):
        ours = mlx_ttt.load()[1]._tokenizer
        theirs = PreTrainedTokenizerFast.from_pretrained(exported / "tokenizer")
        for text in ("ROMEO:\nBut, soft!", " naïve café 🙂", "", "  a\r\n\tb"):
            assert theirs.encode(text) == ours.encode(text)

    def test_no_path_of_this_machine_is_in_it(self, exported):
        for file in exported.rglob("*"):
            if file.is_file():
                assert str(Path.cwd()).encode() not in file.read_bytes()

    def test_a_changed_byte(self, exported, tmp_path):
        copy = Path(shutil.copytree(exported, tmp_path / "copy"))
        program = next(copy.glob("*.aimodel")) / "main.mlirb"
        data = bytearray(program.read_bytes())
        data[len(data) // 2] ^= 1
        program.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"damaged: main\.mlirb is not what main\.hash says"):
            read_bundle(copy)

    def test_verify(self, exported):
        command = ["verify", str(exported), "--against", str(mlx_ttt.bundled_model()), "--tokens", "200"]
        result = CliRunner().invoke(convert, command)
        assert result.exit_code == 0, result.output
        assert "decode and prefill" in result.stdout
        assert "main" in result.stdout
        assert "parts at" not in result.stdout

    def test_verify_with_learning_and_signals(self, tmp_path):
        command = ["coreai", str(mlx_ttt.bundled_model()), str(tmp_path / "out"), "--weights", "float16"]
        options = ["--compute", "float32", "--learning", "--signals"]
        result = CliRunner().invoke(convert, [*command, *options])
        assert result.exit_code == 0, result.output
        command = ["verify", str(tmp_path / "out"), "--against", str(mlx_ttt.bundled_model()), "--tokens", "130"]
        result = CliRunner().invoke(convert, command)
        assert result.exit_code == 0, result.output
        table = result.stdout.splitlines()
        assert [line.split("  ")[0] for line in table[1:4]] == [
            "decode and prefill",
            "main",
            "decode and prefill, learning scaled",
        ]
        assert table[0].endswith("signals")
        assert float(table[1].split()[-1]) <= 1e-4
        assert float(table[3].split()[-1]) <= 1e-4

    def test_verify_finds_another_number(self, exported, tmp_path):
        """One weight of the last norm is larger than the model's."""
        copy = Path(shutil.copytree(exported, tmp_path / "copy"))
        asset = next(copy.glob("*.aimodel"))
        norm = np.array(mlx_ttt.load_model()[0].model.norm.weight)
        data = (asset / "main.mlirb").read_bytes()
        assert data.count(norm.tobytes()) == 1
        larger = norm.copy()
        larger[3] += 0.5
        data = data.replace(norm.tobytes(), larger.tobytes())
        (asset / "main.mlirb").write_bytes(data)
        (asset / "main.hash").write_bytes(hashlib.sha256(data).digest())
        command = ["verify", str(copy), "--against", str(mlx_ttt.bundled_model()), "--tokens", "100"]
        result = CliRunner().invoke(convert, command)
        assert result.exit_code == 1, result.output
        assert "beyond the bound" in result.stderr

    def test_verify_of_what_ends_the_runtime(self, exported, tmp_path):
        copy = Path(shutil.copytree(exported, tmp_path / "copy"))
        asset = next(copy.glob("*.aimodel"))
        (asset / "main.mlirb").write_bytes(b"none")
        (asset / "main.hash").write_bytes(hashlib.sha256(b"none").digest())
        command = ["verify", str(copy), "--against", str(mlx_ttt.bundled_model()), "--tokens", "64"]
        result = CliRunner().invoke(convert, command)
        assert result.exit_code == 2
        assert re.fullmatch(r"error: [^\n]*runtime ended itself \(SIGABRT\)[^\n]*\n", result.stderr.split("\r")[-1])

    def test_another_model(self, exported, model_dirs):
        command = ["verify", str(exported), "--against", str(model_dirs("mlp-mamba"))]
        result = CliRunner().invoke(convert, command)
        assert result.exit_code == 2
        assert "exported from another model" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float16", "int8", "int4", "lut4"])
def test_formats_on_the_runtime(programs, model_dirs, weights):
    """The same numbers in MLX: what differs is only the order of sums."""
    model, runtime = programs("linear-transformer", weights, "float32", ("decode", "prefill"))
    same, _ = mlx_ttt.load_model(model_dirs("linear-transformer"))
    store(same, weights, "float32")
    layout, K = StateLayout.of(model.args), model.args.mini_batch_size
    ids = [int(id) for id in np.random.default_rng(0).integers(1, model.args.vocab_size, 2 * K + 3)]
    session = start_session(runtime, layout, np.float32)
    positions, logits = feed(session, ids[: K + 5], *singly(ids[K + 5 :]))
    wanted, state = expected(same, ids)
    assert error(logits, wanted[positions]) <= 1e-4
    assert error(session.state, state) <= 1e-4
    assert error(wanted, expected(model, ids)[0]) > 1e-4  # the formats do change the numbers


class TestBadInput:
    @pytest.fixture(autouse=True)
    def nothing_left(self, tmp_path):
        (tmp_path / "kept").mkdir()
        yield
        assert os.listdir(tmp_path) == ["kept"]

    def test_out_exists(self, tmp_path):
        (tmp_path / "kept/out").mkdir()
        with pytest.raises(OutputError, match="out: exists already"):
            export(mlx_ttt.bundled_model(), tmp_path / "kept/out")

    def test_no_model(self, tmp_path):
        with pytest.raises(CheckpointError, match="no such model directory"):
            export(tmp_path / "kept/nowhere", tmp_path / "out")

    def test_no_tokenizer(self, model_dirs, tmp_path):
        with pytest.raises(TokenizerError, match="no tokenizer"):
            export(model_dirs("linear-mamba"), tmp_path / "out")

    def test_options_that_do_not_go_together(self, tmp_path):
        with pytest.raises(TTTError, match="--weights float32"):
            export(mlx_ttt.bundled_model(), tmp_path / "out", weights="float32")

    def test_a_full_disk_while_writing(self, tmp_path, monkeypatch):
        def fill(*_):
            raise RuntimeError("failed to persist") from OSError(errno.ENOSPC, "No space left")

        monkeypatch.setattr(bundle, "build", lambda *_: None)
        monkeypatch.setattr(bundle, "save", fill)
        with pytest.raises(OutputError, match="the disk is full"):
            export(mlx_ttt.bundled_model(), tmp_path / "out")

    def test_interrupted(self, tmp_path, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(bundle, "build", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(mlx_ttt.bundled_model(), tmp_path / "out")

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "no such bundle"), ("{}", "not a bundle that this version"), ("{", r"metadata\.json")],
    )
    def test_no_bundle_of_ours(self, tmp_path, content, message):
        if content is not None:
            (tmp_path / "kept/metadata.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_bundle(tmp_path / "kept")

    def test_another_version_of_coreai(self, monkeypatch):
        monkeypatch.setattr(room.metadata, "version", lambda name: "1.0.0b4")
        with pytest.raises(TTTError, match=r'coreai-core is 1\.0\.0b4.*pip install "coreai-core==1\.0\.0b3"'):
            room.require_coreai()

    def test_no_coreai(self, monkeypatch):
        def missing(name):
            raise room.metadata.PackageNotFoundError

        monkeypatch.setattr(room.metadata, "version", missing)
        for python, system, machine, message in (
            (("3", "10", "1"), "linux", "x86_64", "wants Python 3.11"),
            (("3", "12", "1"), "linux", "aarch64", "not made for Linux on aarch64"),
            (("3", "12", "1"), "linux", "x86_64", r"pip install \"mlx-ttt\[coreai\]\""),
        ):
            monkeypatch.setattr(room.platform, "python_version_tuple", lambda python=python: python)
            monkeypatch.setattr(room.platform, "machine", lambda machine=machine: machine)
            monkeypatch.setattr(room.sys, "platform", system)
            with pytest.raises(TTTError, match=message):
                room.require_coreai()
