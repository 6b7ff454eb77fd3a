"""The kernels move and compute hardly more than they must, and metal/README.md says what they do."""

from __future__ import annotations

import pytest

from benchmarks.metal_cost import PREFILL, README, K, measure, row, run
from tests.backends.metal.host import why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

# Bytes and multiplies against the least, barriers per mini-batch (in a step, per token).
TARGETS = {
    ("linear", "chunk", 64): (1.02, 1.05, 2),
    ("linear", "chunk", 96): (1.02, 1.05, 2),
    ("linear", "step", 64): (1.02, None, 2),
    ("linear", "step", 96): (1.02, None, 2),
    ("mlp", "chunk", 64): (8.4, 1.02, 12),  # W1 is streamed
    ("mlp", "chunk", 96): (26.9, 1.02, 16),  # so is W2
    ("linear", "backward", 64): (2.2, 1.13, 9),  # dW1 is written for every mini-batch, W1 read by columns and by rows
    ("linear", "backward", 96): (2.6, 1.13, 9),
    ("mlp", "backward", 64): (7.1, 1.16, 18),  # weights, their cotangents and what is [K, F] are streamed
    ("mlp", "backward", 96): (6.6, 1.16, 18),
    ("mlp", "step", 64): (1.02, None, 3),
    ("mlp", "step", 96): (1.02, None, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "form", "D"), TARGETS)
def test_cost(model, form, D):
    of_bytes, of_multiplies, barriers = TARGETS[model, form, D]
    cost = measure(model, form, D)
    assert 1 <= cost.bytes / cost.least_bytes <= of_bytes
    if of_multiplies:
        assert 1 <= cost.multiplies / cost.least_multiplies <= of_multiplies
    assert cost.barriers == barriers
    assert cost.threadgroup_memory <= 32768
    assert row(cost) in README.read_text(encoding="utf-8"), "run python -m benchmarks.metal_cost"


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 96])
def test_a_mini_batch_reads_and_writes_its_streamed_weights_once(D):
    """Of those in device memory. At D = 96 that is W2, too, which three products need, each after the other."""
    long, short = (run("mlp", "chunk", D, PREFILL - n * K, 0).buffers for n in (0, 1))
    nbytes = 4 * D * 4 * D
    moved = {name: (long[name].fetched - short[name].fetched, long[name].stored - short[name].stored) for name in long}
    assert moved["W1_out"] == (nbytes, nbytes)
    assert moved["W1"] == moved["W2"] == (0, 0)
    read, written = moved["W2_out"]
    assert (read, written) == (0, 0) if D == 64 else read <= 3 * nbytes and written == nbytes
