"""A trained model, converted from the official checkpoint: the official implementation's text and bits per byte."""

from __future__ import annotations

import itertools
import json
import math

import mlx.core as mx
import numpy as np
import pytest

import mlx_ttt
from mlx_ttt.checkpoint.convert import convert

from .. import models
from ..conftest import DATA

BYTES = (DATA / "tempest.txt").stat().st_size


@pytest.fixture(scope="module")
def expected(shakespeare_dir) -> dict:
    return json.loads((shakespeare_dir / "expected.json").read_text())


def bits_per_byte(model, ids: mx.array, cuts) -> float:
    return models.bits_per_byte(model, ids, cuts, BYTES)


def test_greedy_text(trained, expected):
    model, tokenizer = trained
    for case in expected["greedy"]:
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        n = len(case["generated_ids"])
        responses = list(mlx_ttt.stream_generate(model, tokenizer, case["prompt"], max_tokens=n))
        assert [response.token for response in responses] == case["generated_ids"]
        assert "".join(response.text for response in responses) == case["text"]


def test_logits_after_a_prompt(trained, expected):
    model, _ = trained
    for case in expected["greedy"]:
        logits = model(mx.array([case["prompt_ids"]]))[0, -1]
        for token, logit in case["top5_after_prompt"]:
            assert logits[token].item() == pytest.approx(logit, abs=2e-4 * mx.abs(logits).max().item())


def test_nats_per_token_of_the_first_tenth(trained, tempest, expected):
    """The whole text takes longer: see the slow tests."""
    model, _ = trained
    n = tempest.shape[1] // 10
    nats = bits_per_byte(model, tempest[:, : n + 1], range(1000, n, 1000)) * BYTES * math.log(2)
    assert nats / n == pytest.approx(expected["tempest"]["nll_nats_per_token_by_tenth"][0], rel=1e-3)


@pytest.mark.slow
def test_bits_per_byte_of_a_long_text(trained, tempest, expected):
    model, _ = trained
    assert tempest.shape[1] - 1 == expected["tempest"]["tokens"]
    found = bits_per_byte(model, tempest, range(2048, tempest.shape[1] - 1, 2048))
    assert found == pytest.approx(expected["tempest"]["bits_per_byte"], rel=1e-3)


@pytest.mark.slow
def test_bits_per_byte_in_one_call(trained, tempest, expected):
    model, _ = trained
    assert bits_per_byte(model, tempest, []) == pytest.approx(expected["tempest"]["bits_per_byte"], rel=1e-3)


@pytest.mark.slow
def test_bits_per_byte_in_random_pieces(trained, tempest, expected):
    model, _ = trained
    rng = np.random.default_rng(0)
    cuts = np.cumsum(rng.integers(1, 400, 400))
    cuts = [int(n) for n in cuts if n < tempest.shape[1] - 1]
    assert bits_per_byte(model, tempest, cuts) == pytest.approx(expected["tempest"]["bits_per_byte"], rel=1e-3)


@pytest.mark.slow
def test_it_learns_while_it_reads(trained, tempest, expected):
    """With learning rates of zero the text costs more bits, as many as in the official implementation."""
    model, _ = trained
    layers = [layer.seq_modeling_block for layer in model.layers]
    rates = [layer.base_lr for layer in layers]
    try:
        for layer in layers:
            layer.base_lr = 0.0
        found = bits_per_byte(model, tempest, range(2048, tempest.shape[1] - 1, 2048))
    finally:
        for layer, rate in zip(layers, rates, strict=True):
            layer.base_lr = rate
    assert found == pytest.approx(expected["tempest"]["bits_per_byte_without_inner_learning"], rel=1e-3)


@pytest.mark.slow
def test_the_state_does_not_grow(trained, tempest):
    """After 40 tokens and after 40 000."""
    model, _ = trained
    ids = mx.concatenate([tempest, tempest], axis=1)[:, :40_000]
    cache, sizes, memory = model.make_cache(), [], []
    for start, end in itertools.pairwise([0, 40, *range(1000, 40_001, 1000)]):
        model(ids[:, start:end], cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        sizes.append(sum(c.nbytes for c in cache))
        memory.append(mx.get_active_memory())
    assert cache[0].offset == [40_000]
    assert len(set(sizes)) == 1
    assert memory[-1] - memory[1] < 1e5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_weights(shakespeare_dir, tmp_path, tempest, expected, dtype):
    convert(shakespeare_dir, tmp_path / "model", dtype=dtype)
    model, _ = mlx_ttt.load_model(tmp_path / "model")
    found = bits_per_byte(model, tempest, range(2048, tempest.shape[1] - 1, 2048))
    assert found == pytest.approx(expected["tempest"]["bits_per_byte"], rel=2e-3)
