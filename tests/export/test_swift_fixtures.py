"""What the tests of the Swift code compare with is still what Python gives."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import mlx_ttt
from mlx_ttt.export.functions import SIGNALS
from mlx_ttt.loading import load_model
from mlx_ttt.text.state import fingerprint
from tests.export.swift_fixtures import FIXTURES, MLP, write_bundles, write_layouts


def load(name: str):
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def test_the_bundled_model():
    model, tokenizer = mlx_ttt.load()
    expected, arrays = load("linear.json"), mx.load(str(FIXTURES / "linear.safetensors"))
    assert expected["fingerprint"] == fingerprint(model, tokenizer)
    assert expected["prompt_ids"] == tokenizer.encode(expected["prompt"])
    assert expected["greedy_text"] == tokenizer.decode(expected["greedy_ids"])
    model.set_dtype(mx.float32)
    logits = np.array(model(arrays["ids"][None])[0, arrays["positions"].tolist()])
    np.testing.assert_allclose(logits, np.array(arrays["logits"]), atol=1e-4)
    text = mx.array([[*expected["prompt_ids"], *expected["greedy_ids"]]])
    after = np.array(model(text)[0, len(expected["prompt_ids"]) - 1 : -1])
    np.testing.assert_allclose(np.sort(after)[:, :-3:-1], np.array(expected["best_logits"]), atol=1e-4)


@pytest.mark.parametrize("name, source", [pytest.param("linear", None, marks=pytest.mark.slow), ("mlp", MLP)])
def test_the_learning_scales_and_signals(name, source):
    model, _ = load_model(source or mlx_ttt.bundled_model())
    model.set_dtype(mx.float32)
    arrays = mx.load(str(FIXTURES / f"{name}-learning.safetensors"))
    for case in ("one", "uneven", "frozen"):
        expected = {key.removeprefix(f"{case}."): np.array(x) for key, x in arrays.items() if key.startswith(case)}
        seen = mlx_ttt.observe(model, arrays["ids"][None], learning=expected["learning"])
        found = {key: np.array(getattr(seen, field))[:, 0] for key, field in SIGNALS.items()}
        logits = np.array(model(arrays["ids"][None], learning=expected["learning"])[0, arrays["positions"].tolist()])
        for key, x in (found | {"logits": logits}).items():
            bound = 1e-5 * np.abs(expected[key]).max()
            np.testing.assert_allclose(x, expected[key], rtol=0, atol=bound, err_msg=f"{case}, {key}")


def test_the_layouts(tmp_path):
    write_layouts(tmp_path)
    for kind in ("linear", "mlp"):
        name = f"layout-{kind}.safetensors"
        found, metadata = mx.load(str(tmp_path / name), return_metadata=True)
        expected, expected_metadata = mx.load(str(FIXTURES / name), return_metadata=True)
        assert metadata == expected_metadata
        assert found.keys() == expected.keys()
        for key in found:
            np.testing.assert_array_equal(np.array(found[key]), np.array(expected[key]), key)


@pytest.mark.slow
def test_the_bundles(tmp_path):
    """What Apple's runtime says of `main`, and our metadata."""
    pytest.importorskip("coreai.authoring")
    write_bundles(tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json"))
    assert len(files) == 6
    for file in files:
        found, expected = json.loads((tmp_path / file).read_text()), load(str(file))
        for content in (found, expected):
            content.pop("source", None)  # the version
        assert found == expected, file


def test_the_saved_state():
    model, tokenizer = mlx_ttt.load(FIXTURES / "small")
    state = mlx_ttt.load_state(FIXTURES / "small" / "python.state", model, tokenizer)
    text = mlx_ttt.generate(model, tokenizer, state=state, max_tokens=40)
    assert text == load("small/expected.json")["text"]


def test_token_ids():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FIXTURES / "tokenizers" / "symbols")
    for case in load("tokenizers/symbols/cases.json")["texts"]:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
