"""A prompt on a CPU: some tokens at a time, so that what is between the layers stays in the caches."""

from __future__ import annotations

import mlx.core as mx

from ...network.cache import TTTCache
from ...network.model import TTTModel, hidden_states

CHUNK = 512  # tokens: fewer are slower, more take more memory


@hidden_states.register
def prefill(model: TTTModel, ids: mx.array, cache: list[TTTCache] | None, scales: mx.array | None = None) -> mx.array:
    T = ids.shape[1]
    if cache is None or T <= CHUNK or mx.default_device() != mx.cpu:
        return NotImplemented
    chunks = (ids[:, start : start + CHUNK] for start in range(0, T, CHUNK))
    return mx.concatenate([hidden_states.in_mlx(model, chunk, cache, scales) for chunk in chunks], axis=1)
