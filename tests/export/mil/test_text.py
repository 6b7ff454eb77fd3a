"""The trained model through its package: the text it writes, and what a long text costs in bits."""

from __future__ import annotations

import pytest

pytest.importorskip("coremltools", reason='needs coremltools: pip install "mlx-ttt[coreml]"')

import math

import mlx.core as mx
import numpy as np

import mlx_ttt
from mlx_ttt.export.verify import log_softmax

from ...conftest import DATA
from ..texts import feed_all, singly
from .packages import Package

BLOCK = 128  # of the packages that read long texts


@pytest.fixture(scope="module")
def tempest() -> np.ndarray:
    """The Tempest as token ids with BOS in front."""
    _, tokenizer = mlx_ttt.load()
    return np.array(tokenizer.encode((DATA / "tempest.txt").read_bytes().decode("utf-8")))


@pytest.mark.slow
def test_greedy_text(packages):
    """The same 100 tokens as MLX; or the first other one is nearly as good, and is shown."""
    package = packages("trained")
    _, tokenizer = mlx_ttt.load()
    prompt = tokenizer.encode("ROMEO:\n")
    session, cache = package.session(), package.model.make_cache()
    logits = package.model(mx.array([prompt]), cache=cache)[0, -1]
    *_, (_, found) = session.feed(prompt)
    for n in range(100):
        ours, theirs = int(found[-1].argmax()), mx.argmax(logits).item()
        if ours != theirs:
            gap = (logits[theirs] - logits[ours]).item() / mx.abs(logits).max().item()
            print(f"token {n}: {ours} for {theirs}, whose logit is larger by {gap:.1e} of the largest")
            assert gap < 2e-3
            break
        logits = package.model(mx.array([[theirs]]), cache=cache)[0, -1]
        ((_, found),) = session.feed([theirs])


def bits(session, ids: np.ndarray) -> float:
    """That the tokens after the first one cost."""
    logits = feed_all(session, ids[:-1])
    return float(-log_softmax(logits)[np.arange(len(logits)), ids[1:]].sum() / math.log(2))


def bits_in_mlx(model, ids: np.ndarray) -> float:
    cache, total = model.make_cache(), 0.0
    for start in range(0, len(ids) - 1, 2048):
        logits = np.array(model(mx.array(ids[None, start : min(start + 2048, len(ids) - 1)]), cache=cache)[0])
        total -= log_softmax(logits)[np.arange(len(logits)), ids[start + 1 :][: len(logits)]].sum()
    return total / math.log(2)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "bound"), [("float16", 1e-3), ("int8", 1e-2), ("int4", 5e-2)])
def test_a_long_text_costs_the_same(tmp_path, tempest, weights, bound):
    model, _ = mlx_ttt.load_model()
    package = Package(model, tmp_path, weights=weights, prefill_tokens=BLOCK, all_logits=True)
    ids = tempest[:6001]
    assert bits(package.session(), ids) == pytest.approx(bits_in_mlx(model, ids), rel=bound)


@pytest.mark.slow
def test_decode_agrees_with_prefill_over_a_long_text(packages, tempest):
    """2000 tokens one by one and in blocks: the same graph in half precision, rounded in another order."""
    model = packages("trained").model
    ids = tempest[:2001]
    session = packages("trained").session()
    by_one = np.concatenate([logits for token in singly(ids[:-1]) for _, logits in session.feed(token)])
    cost = float(-log_softmax(by_one)[np.arange(2000), ids[1:]].sum() / math.log(2))
    in_blocks = bits(Package(model, prefill_tokens=BLOCK, all_logits=True).session(), ids)
    assert cost == pytest.approx(in_blocks, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("compute", ["float16", "mixed"])
def test_the_state_does_not_drift(tempest, compute):
    """The whole play: the price of a state in float16 without a carried residue."""
    model, _ = mlx_ttt.load_model()
    package = Package(model, compute=compute, prefill_tokens=BLOCK, all_logits=True)
    assert bits(package.session(), tempest) == pytest.approx(bits_in_mlx(model, tempest), rel=5e-3)
