"""Whole models with the kernels in them: the official implementation's logits."""

from __future__ import annotations

import mlx.core as mx
import pytest

from ...conftest import GOLDEN
from ...models import BOUND, largest_error

PROMPT, STEPS = 13, 20
FAST = ("linear-mamba",)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in GOLDEN])
def test_prefill_and_decode(kernels, name, golden_model):
    model, expected = golden_model(name)
    ids, n = expected["input_ids"], PROMPT + STEPS

    cache = model.make_cache()
    logits = [model(ids[:, :PROMPT], cache=cache), model(ids[:, PROMPT : PROMPT + 1], cache=cache)]
    if kernels is not None:
        del kernels.names[:]
    logits += [model(ids[:, i : i + 1], cache=cache) for i in range(PROMPT + 1, n)]
    assert largest_error(mx.concatenate(logits, axis=1), expected["logits"][:, :n]) <= BOUND

    if kernels is not None:  # one launch for each token and layer
        assert len(kernels.names) == (STEPS - 1) * len(model.layers)
