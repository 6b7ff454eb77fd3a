"""mlx-ttt perplexity: tables, figure, errors, and what goes on to mlx-lm's command."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_ttt
from mlx_ttt.text.tokenizer import encode_long
from mlx_ttt.training.evaluate import losses

from .test_cli import ROOT, assert_one_line, run

TEXT = (ROOT / "tests" / "data" / "tempest.txt").read_bytes()[:4000]


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_bytes(TEXT)
    return tmp_path / "text.txt"


def measured(*args) -> list[str]:
    result = run("perplexity", *args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout.splitlines()


def row(lines: list[str], name: str) -> list[float]:
    """The numbers of a table's row, without the intervals."""
    (line,) = [line for line in lines if re.match(rf"{re.escape(name)}  ", line)]
    return [float(number) for number in re.findall(r"(?<!± )[+-]?\d+\.\d+", line.removeprefix(name))]


def test_the_whole_text(text):
    model, tokenizer = mlx_ttt.load()
    ids = encode_long(tokenizer, TEXT.decode())
    nats = losses(model, ids).sum(dtype=np.float64)
    lines = measured("--text", text)
    assert lines[0] == f"{text}: 4000 bytes, {len(ids) - 1} tokens, read in one pass"
    per_byte, per_token, perplexity = row(lines, "carried")
    assert per_byte == pytest.approx(nats / math.log(2) / 4000, abs=1e-4)
    assert per_token == pytest.approx(nats / math.log(2) / (len(ids) - 1), abs=1e-3)
    assert perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), abs=1e-2)


@pytest.mark.slow
def test_several_resets_and_positions(text):
    lines = measured("--text", text, "--reset", 512, "--reset", 64, "--reset", 512, "--by-position")
    carried, *resets = (row(lines, name) for name in ("carried", "reset 512", "reset 64"))
    for name, reset in zip(("512", "64"), resets, strict=True):
        difference = row(lines, f"carried - reset {name}")
        assert difference == pytest.approx([carried[0] - reset[0], carried[1] - reset[1]], abs=2e-3)
    assert sum(line.startswith("reset 512 ") for line in lines) == 1
    (end,) = {line.split()[0] for line in lines if re.match(r"0-\d+ ", line)}
    by_token, by_byte = (line for line in lines if line.startswith(f"{end} "))
    assert len(re.findall("±", by_token)) == len(re.findall("±", by_byte)) == 5
    first, *_ = re.findall(r"\d+\.\d+", by_token)
    assert float(first) == pytest.approx(carried[1], abs=1e-3)  # the text is shorter than the first band


@pytest.mark.slow
def test_needle(text):
    lines = measured("--text", text, "--needle")
    assert [line.split()[0] for line in lines if re.match(r"\d+  ", line)] == ["100", "300", "1000"]


def test_a_text_too_short_for_a_needle(tmp_path):
    (tmp_path / "short.txt").write_text("PROSPERO.\nNo.\n")
    assert_one_line(run("perplexity", "--text", tmp_path / "short.txt", "--needle"), "too short for --needle: it has")


@pytest.mark.slow
def test_plot(text, tmp_path):
    pytest.importorskip("matplotlib")
    for options in ([], ["--reset", 100]):
        measured("--text", text, "--plot", tmp_path / "curve.png", *options)
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "text.txt"]


def test_plot_without_matplotlib(text, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_one_line(run("perplexity", "--text", text, "--plot", tmp_path / "a.png"), "pip install matplotlib")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no text: give --text FILE"),
        (["--reset", "10"], "no text: give --text FILE"),
        (["--text", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--text", "tests"], "tests: Is a directory"),
        (["--text", sys.executable], "not UTF-8 text"),
        (["--text", "tests/__init__.py"], "tests/__init__.py: is empty"),
        (["--text", "README.md", "--model", "nowhere"], "nowhere: no such model directory"),
        (["--text", "README.md", "--plot", "no/such/folder/a.png"], "there is no such folder"),
        (["--text", "README.md", "--plot", "a.pdf"], "must end in .png"),
    ],
)
def test_bad_input(arguments, message, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    assert_one_line(run("perplexity", *arguments), message)


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_bad_reset(text, value):
    result = run("perplexity", "--text", text, "--reset", value)
    assert result.exit_code == 2
    assert "Invalid value for '--reset'" in result.stderr


def test_damaged_weights(text, tmp_path):
    model = Path(shutil.copytree(mlx_ttt.bundled_model(), tmp_path / "model"))
    weights = mx.load(str(model / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    assert_one_line(run("perplexity", "--text", text, "--model", model), r"the loss of token 0 \(carried\) is nan")


def test_a_tokenizer_without_bos(text, tmp_path):
    """The first token is then not predicted, and its bytes do not count."""
    model = Path(shutil.copytree(mlx_ttt.bundled_model(), tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    first = len(mlx_ttt.load(model)[1].decode(encode_long(mlx_ttt.load(model)[1], TEXT.decode())[:1].tolist()).encode())
    assert measured("--text", text, "--model", model)[0].startswith(f"{text}: {4000 - first} bytes")


def test_mlx_lms_options_reach_it(monkeypatch):
    seen = []
    monkeypatch.setattr("mlx_lm.perplexity.main", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["mlx-ttt"])
    arguments = ["--model", "x", "--data-path", "some/data", "--num-samples=3", "--batch-size", "2"]
    assert run("perplexity", *arguments).exit_code == 0
    assert [args[1:] for args in seen] == [arguments]


def test_help_names_both():
    shown = run("perplexity", "--help").stdout
    for option in ("--text", "--reset", "--by-position", "--plot", "--needle", "--data-path", "--sequence-length"):
        assert option in shown


def test_a_long_text_is_encoded_in_pieces():
    _, tokenizer = mlx_ttt.load()
    content = TEXT.decode() + "\n\n\n  indented\n\tline\nno break at the end"
    whole = tokenizer.encode(content)
    for characters in (1, 17, 500, 10**6):
        assert encode_long(tokenizer, content, characters).tolist() == whole
    assert encode_long(tokenizer, "").size == 0
