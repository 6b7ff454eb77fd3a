"""Back to the official PyTorch layout: every golden checkpoint, there and back, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_ttt.checkpoint import convert as convert_module
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.checkpoint.official import convert_to_torch
from mlx_ttt.checkpoint.parameters import Parameters
from mlx_ttt.checkpoint.quantization import Scheme
from mlx_ttt.checkpoint.source import open_source
from mlx_ttt.cli import main
from mlx_ttt.errors import CheckpointError, OutputError, QuantizationError
from mlx_ttt.loading import bundled_model
from mlx_ttt.model import ModelArgs

from ..conftest import GOLDEN
from .test_memory import CONFIG, CONVERT, STATUS

TORCH = [name for name in GOLDEN if not name.startswith("jax")]
TOKENIZER = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}


def arrays(folder: Path) -> dict[str, mx.array]:
    return {name: tensor.load() for name, tensor in open_source(folder).tensors.items()}


def identical(one: mx.array, other: mx.array) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and mx.array_equal(one, other).item()


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def converted(golden_dir, tmp_path):
    """A golden checkpoint's name -> the model directory, and what `convert torch` makes of it."""

    def make(name: str) -> tuple[Path, Path]:
        convert(golden_dir / name, tmp_path / "mlx")
        convert_to_torch(tmp_path / "mlx", tmp_path / "torch")
        return tmp_path / "mlx", tmp_path / "torch"

    return make


class TestRoundTrip:
    @pytest.mark.parametrize("name", TORCH)
    def test_the_tensors_are_the_original_ones(self, golden_dir, converted, name):
        """In name, shape, and value. The inner model's are float32 in any model directory; wider is not different."""
        original, (_, torch) = arrays(golden_dir / name), converted(name)
        written = arrays(torch)
        if json.loads((torch / "config.json").read_text())["tie_word_embeddings"]:
            original.pop("lm_head.weight", None)
        assert written.keys() == original.keys()
        for name, array in written.items():
            wider = original[name].astype(mx.float32) if array.dtype == mx.float32 else original[name]
            assert identical(array, wider), name

    @pytest.mark.parametrize("name", GOLDEN)
    def test_there_and_back(self, converted, tmp_path, name):
        mlx, torch = converted(name)
        convert(torch, tmp_path / "again")
        before, after = content(mlx), content(tmp_path / "again")
        assert after["model.safetensors"] == before["model.safetensors"]
        configs = [json.loads(files["config.json"]) for files in (before, after)]
        assert configs[1] | configs[0] == configs[1]  # nothing changed; the official fields with defaults are added

    def test_the_bundled_model_with_its_tokenizer(self, tmp_path):
        convert_to_torch(bundled_model(), tmp_path / "torch")
        written, bundled = content(tmp_path / "torch"), content(bundled_model())
        assert written.keys() == {"config.json", "model.safetensors", *TOKENIZER}
        assert all(written[name] == bundled[name] for name in TOKENIZER)
        convert(tmp_path / "torch", tmp_path / "again")
        again = content(tmp_path / "again")
        assert all(again[name] == bundled[name] for name in ("model.safetensors", *TOKENIZER))

    def test_shards(self, tmp_path, monkeypatch):
        monkeypatch.setattr(convert_module, "LARGEST_SHARD", 2_000_000)
        convert_to_torch(bundled_model(), tmp_path / "torch")
        assert len(list((tmp_path / "torch").glob("model-*.safetensors"))) > 2
        written, bundled = arrays(tmp_path / "torch"), arrays(bundled_model())
        assert written.keys() == bundled.keys()
        for name, array in bundled.items():
            is_convolution = ".conv" in name and array.ndim == 3
            assert identical(written[name], array.swapaxes(1, 2) if is_convolution else array)


class TestConfig:
    @pytest.mark.parametrize("name", TORCH)
    def test_what_the_official_config_says(self, golden_dir, converted, name):
        """Every field of ours that the official implementation wrote has its value."""
        official = json.loads((golden_dir / name / "config.json").read_text())
        written = json.loads((converted(name)[1] / "config.json").read_text())
        assert {field: official[field] for field in written} == written

    def test_fields_of_the_tokenizer_and_training_are_kept(self, tmp_path):
        convert_to_torch(bundled_model(), tmp_path / "torch")
        written = json.loads((tmp_path / "torch" / "config.json").read_text())
        assert written["max_position_embeddings"] == 512
        assert written["torch_dtype"] == "float16"
        assert "model_file" not in written

    def test_the_weights_say_that_they_are_pytorchs(self, converted):
        _, metadata = mx.load(str(converted("linear-mamba")[1] / "model.safetensors"), return_metadata=True)
        assert metadata["format"] == "pt"


class TestQuantized:
    @pytest.fixture
    def quantized(self, tmp_path) -> Path:
        convert(bundled_model(), tmp_path / "quantized", quantize=Scheme(64, 8))
        return tmp_path / "quantized"

    def test_only_if_asked(self, quantized, tmp_path):
        with pytest.raises(QuantizationError, match="say --dequantize"):
            convert_to_torch(quantized, tmp_path / "torch")
        with pytest.raises(QuantizationError, match="leave out --dequantize"):
            convert_to_torch(bundled_model(), tmp_path / "torch", dequantize=True)
        assert not (tmp_path / "torch").exists()

    @pytest.mark.slow
    def test_dequantized(self, quantized, tmp_path):
        convert_to_torch(quantized, tmp_path / "torch", dequantize=True)
        convert(quantized, tmp_path / "mlx", dequantize=True)
        convert(tmp_path / "torch", tmp_path / "again")
        assert "quantization" not in json.loads((tmp_path / "torch" / "config.json").read_text())
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mlx", "again")]
        assert files[0] == files[1]


class TestErrors:
    def test_nothing_is_left_where_the_weights_are_damaged(self, tmp_path):
        model = Path(shutil.copytree(bundled_model(), tmp_path / "model"))
        weights = mx.load(str(model / "model.safetensors"))
        weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
        mx.save_safetensors(str(model / "model.safetensors"), weights)
        with pytest.raises(CheckpointError, match=r"model.norm.weight has 256 values that are NaN"):
            convert_to_torch(model, tmp_path / "torch")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_a_place_that_is_taken(self, tmp_path):
        convert_to_torch(bundled_model(), tmp_path / "torch")
        with pytest.raises(OutputError, match="exists already"):
            convert_to_torch(bundled_model(), tmp_path / "torch")
        convert_to_torch(bundled_model(), tmp_path / "torch", overwrite=True)
        (tmp_path / "torch" / "notes.txt").write_text("mine")
        with pytest.raises(OutputError, match=r"notes.txt"):
            convert_to_torch(bundled_model(), tmp_path / "torch", overwrite=True)

    def test_onto_itself(self, tmp_path):
        model = Path(shutil.copytree(bundled_model(), tmp_path / "model"))
        with pytest.raises(OutputError, match="which is to be read"):
            convert_to_torch(model, model, overwrite=True)

    def test_the_disk_is_full(self, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OutputError, match="the disk is full"):
            convert_to_torch(bundled_model(), tmp_path / "torch")

    @pytest.mark.parametrize(
        ("model", "message"),
        [("nowhere", "nowhere: no such file or folder"), ("tests/cli", "no weights in this folder")],
    )
    def test_one_line(self, model, message, tmp_path, monkeypatch):
        monkeypatch.chdir(Path(__file__).parents[2])
        result = CliRunner().invoke(main, ["convert", "torch", model, str(tmp_path / "out")])
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_command_line(golden_dir, tmp_path):
    convert(golden_dir / "linear-mamba", tmp_path / "mlx")
    result = CliRunner().invoke(main, ["convert", "torch", str(tmp_path / "mlx"), str(tmp_path / "torch")])
    assert result.exit_code == 0, result.output
    assert "M parameters" in result.stdout
    assert "warning: no tokenizer files" in result.stderr
    assert (tmp_path / "torch" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="peak memory is read from /proc")
def test_one_tensor_at_a_time(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    shapes = Parameters(ModelArgs.from_dict(CONFIG)).shapes()
    mx.save_safetensors(str(source / "model.safetensors"), {n: mx.zeros(s) for n, s in shapes.items()})
    script = CONVERT.replace(
        "import convert\n", "import convert\nfrom mlx_ttt.checkpoint.official import convert_to_torch\n", 1
    )
    *_, last, shown = script.strip().splitlines()
    script = script.replace(last, "convert_to_torch(sys.argv[1], sys.argv[2])")
    assert shown == "print(peak() - before)"
    result = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "out"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) * 1024 < 55e6  # the largest tensor has 11 MB
