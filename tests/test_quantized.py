"""The trained model, quantized: precision, states, and bits per byte."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlx_ttt
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.checkpoint.quantization import Scheme
from mlx_ttt.errors import StateError

from .conftest import DATA
from .models import bits_per_byte

TOLERATED = 0.005  # what 8 bits may cost, of float32's bits per byte


@pytest.fixture(scope="module")
def four_bits(shakespeare_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "model"
    convert(shakespeare_dir, out, quantize=Scheme(bits=4), dtype=mx.float16)
    return mlx_ttt.load(out)


def test_what_is_computed_is_float32_on_a_cpu(four_bits):
    model, _ = four_bits
    if mx.default_device() == mx.cpu:
        assert model(mx.array([[1, 2, 3]])).dtype == mx.float32
    assert model.model.embed_tokens.weight.dtype == mx.uint32


def test_a_state_belongs_to_its_precision(four_bits, tmp_path):
    """Also that a text goes on as if it had never been saved."""
    model, tokenizer = four_bits
    whole = mlx_ttt.generate(model, tokenizer, "ROMEO:\n", max_tokens=24)
    state = mlx_ttt.read(model, tokenizer, "ROMEO:\n")
    first = mlx_ttt.generate(model, tokenizer, state=state, max_tokens=8)
    mlx_ttt.save_state(tmp_path / "state", state, model, tokenizer)
    resumed = mlx_ttt.load_state(tmp_path / "state", model, tokenizer)
    assert first + mlx_ttt.generate(model, tokenizer, state=resumed, max_tokens=16) == whole
    with pytest.raises(StateError, match="another model"):
        mlx_ttt.load_state(tmp_path / "state", mlx_ttt.load_model()[0], tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Scheme(bits=8), Scheme(mode="mxfp8")], ids=str)
def test_eight_bits_cost_little(trained, tempest, shakespeare_dir, tmp_path, scheme):
    n = tempest.shape[1] // 10
    convert(shakespeare_dir, tmp_path / "model", quantize=scheme, dtype=mx.float16)
    quantized, _ = mlx_ttt.load_model(tmp_path / "model")
    nbytes = (DATA / "tempest.txt").stat().st_size
    exact, found = (bits_per_byte(model, tempest[:, : n + 1], [n // 2], nbytes) for model in (trained[0], quantized))
    assert found != exact
    assert found == pytest.approx(exact, rel=TOLERATED)
