"""The model card of a converted model."""

from __future__ import annotations

import hashlib
import re
import runpy
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import ModelCard

import mlx_ttt
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.checkpoint.quantization import Scheme

CHECKPOINT = "linear-mamba-sharded"


@pytest.fixture
def card(golden_dir, tmp_path):
    def card(name: str = "out", **options) -> tuple[str, float]:
        """The text of the card and the size of all weights in bits per weight."""
        report = convert(golden_dir / CHECKPOINT, tmp_path / name, **options)
        return (tmp_path / name / "README.md").read_text(encoding="utf-8"), 8 * report.nbytes / report.parameters

    return card


def test_front_matter(card):
    """As the Hub and mlx-lm read it."""
    text, _ = card()
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("mlx", "text-generation", None)
    assert "mlx" in data.tags and "ttt" in data.tags


def test_what_it_is(card):
    text, bits = card(dtype=mx.float16)
    assert "A TTT-Linear language model of 0.1" in text and "hidden size 64, 2 heads of 32" in text
    assert f"**Converted from** `{CHECKPOINT}` (safetensors" in text
    assert f"with `mlx_ttt` {mlx_ttt.__version__}. " in text
    assert "**Precision**: float16" in text and f" MB, {bits:.2f} bits per weight" in text
    assert "\n".join(re.findall("/.*", text)).count("/tmp") == 0  # no paths of this machine


def test_precision_of_a_quantized_model(card):
    text, bits = card(dtype=mx.bfloat16, quantize=Scheme(32, 4))
    assert "projections and embeddings whose rows divide into groups in 4 bits in groups of 32, affine" in text
    assert f"{bits:.2f} bits per weight" in text and 5 < bits < 12


def test_hashes_of_every_file_of_weights(card, golden_dir):
    text, _ = card()
    files = [*(golden_dir / CHECKPOINT).glob("model-*.safetensors"), *(golden_dir / CHECKPOINT).glob("*-of-*.bin")]
    assert len(files) > 1
    for file in files:
        assert f"| `{file.name}` | `{hashlib.sha256(file.read_bytes()).hexdigest()}` |" in text
    assert len(re.findall("[0-9a-f]{64}", text)) == len(files)


def test_names_that_are_no_markdown(card):
    """The title stays one line, whatever characters the folder's name has."""
    text, _ = card('a\n---\n"b')
    assert text.count("\n---\n") == 1
    assert text.splitlines()[5] == '# a\\n---\\n"b'


def test_a_file_name_ends_no_table_cell(golden_dir, tmp_path):
    folder = tmp_path / "a`|<b>"
    shutil.copytree(golden_dir / "linear-mamba", folder)
    convert(folder, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "**Converted from** `a'/<b>` (PyTorch)" in text


def test_the_name_is_python(card):
    text, _ = card("a😀")
    assert 'mlx_ttt.load("a😀")' in text


@pytest.mark.slow
def test_its_code_runs(shakespeare_dir, tmp_path, monkeypatch, capsys):
    convert(shakespeare_dir, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("```python\n(.*?)```", Path("model/README.md").read_text(encoding="utf-8"), re.S)
    written = []
    for block in blocks:
        Path("block.py").write_text(block.replace("max_tokens=100", "max_tokens=5"))
        runpy.run_path("block.py")
        written.append(capsys.readouterr().out)
    assert written[0].strip() and written == written[:1] * 2
