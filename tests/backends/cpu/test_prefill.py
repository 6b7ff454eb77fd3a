"""Prompts that are read some tokens at a time."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_ttt.backends.cpu import prefill
from mlx_ttt.network.model import hidden_states

from ...models import largest_error, shared

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="only a CPU reads prompts in chunks")


@pytest.mark.parametrize("padding", [{}, {"left_padding": [0, 9, 23]}, {"lengths": [31, 2, 11]}])
def test_a_long_prompt_goes_through_the_layers_in_chunks(padding, monkeypatch):
    model = shared("linear", "111")
    ids = mx.random.randint(0, 61, (3, 31))
    counts = mx.arange(31) < mx.array(padding.get("lengths", [31] * 3))[:, None]
    counts = counts & (mx.arange(31) >= mx.array(padding.get("left_padding", [0] * 3))[:, None])

    widths, in_mlx = [], hidden_states.in_mlx

    def counted(model, ids, *others):
        widths.append(ids.shape[1])
        return in_mlx(model, ids, *others)

    monkeypatch.setattr(hidden_states, "in_mlx", counted)

    def logits():
        cache = model.make_cache()
        for c in cache:
            c.expand(3)
            c.prepare(**padding)
        return model(ids, cache=cache) * counts[..., None], mx.concatenate([c.rows for c in cache])

    expected, calls = logits(), len(widths)
    monkeypatch.setattr(prefill, "CHUNK", 7)
    for found, whole in zip(logits(), expected, strict=True):
        assert largest_error(found, whole) <= 1e-5
    assert (widths[:calls], widths[calls:]) == ([31], [7, 7, 7, 7, 3])
