"""Quantized models at work: products on a CPU, states, and bits per byte of the trained model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_ttt
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.checkpoint.quantization import Scheme
from mlx_ttt.cpu import prepare
from mlx_ttt.errors import StateError

from .test_trained import bits_per_byte, tempest, trained  # noqa: F401  fixtures

TOLERATED = 0.005  # what 8 bits may cost, of float32's bits per byte


@pytest.fixture(scope="module")
def four_bits(shakespeare_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "model"
    convert(shakespeare_dir, out, quantize=Scheme(bits=4), dtype=mx.float16)
    return mlx_ttt.load(out)


class TestLayers:
    @pytest.mark.parametrize("rows", [(1,), (4,), (5,), (2, 3), (40,)])
    @pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
    def test_products(self, rows, mode):
        """The same as with the dequantized matrix, for few rows and many, in float32."""
        model = nn.Sequential(nn.Embedding(7, 64), nn.Linear(64, 13, bias=False))
        nn.quantize(model, mode=mode)
        prepare(model)
        embedding, linear = model.layers
        x = mx.random.normal((*rows, 64))
        for found, layer in ((linear(x), linear), (embedding.as_linear(x), embedding)):
            weight = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), mode=mode, dtype=mx.float32)
            assert found.dtype == mx.float32 and found.shape == (*rows, weight.shape[0])
            assert mx.allclose(found, x @ weight.T, rtol=1e-4, atol=1e-4)
        rows = embedding(mx.array([3, 5]))
        weight = mx.dequantize(embedding.weight, embedding.scales, embedding.get("biases"), mode=mode)
        assert rows.dtype == mx.float32 and mx.allclose(rows, weight[mx.array([3, 5])])


def test_everything_is_float32_on_a_cpu(four_bits):
    model, _ = four_bits
    if mx.default_device() == mx.cpu:
        assert model.layers[0].mlp.up_proj.scales.dtype == mx.float32
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
def test_eight_bits_cost_little(trained, tempest, shakespeare_dir, tmp_path, scheme):  # noqa: F811
    n = tempest.shape[1] // 10
    convert(shakespeare_dir, tmp_path / "model", quantize=scheme, dtype=mx.float16)
    quantized, _ = mlx_ttt.load_model(tmp_path / "model")
    exact, found = (bits_per_byte(model, tempest[:, : n + 1], [n // 2]) for model in (trained[0], quantized))
    assert found != exact
    assert found == pytest.approx(exact, rel=TOLERATED)
