"""Tokens that are taken back: as if they had never been read."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_ttt.network.rewind import RewindableTTTCache

from ..models import VOCABULARY, largest_error

BOUND = 1e-4  # of the largest absolute logit


@pytest.mark.parametrize(
    "read", [(5, 3), (17, 1), *(pytest.param(read, marks=pytest.mark.slow) for read in ((40,), (1,) * 20, (6, 6)))]
)
def test_all_within_reach_can_be_taken_back(model, read):
    """After n tokens, at least the last min(K, n) are within reach."""
    K = model.args.mini_batch_size
    text = mx.random.randint(0, VOCABULARY, (1, sum(read) + 9))
    cache, offset = model.make_cache(rewind=True), 0
    for n in read:
        model(text[:, offset : offset + n], cache=cache)
        offset += n
    assert cache[0].reach[0] >= min(K, read[-1])
    for n in range(cache[0].reach[0] + 1):
        back = [c.copy() for c in cache]
        for c in back:
            assert c.trim(n) == n
        again = model(text[:, offset - n :], cache=back)
        assert largest_error(again, model(text)[:, offset - n :]) <= BOUND


@pytest.mark.parametrize("calls", [(16,), (16, 2)])
def test_texts_at_different_phases_go_back_together(model, calls):
    """Their last mini-batches were completed at different tokens of the last call, or before it."""
    K = model.args.mini_batch_size
    texts = [[(7 * i + b) % VOCABULARY for i in range(n)] for b, n in enumerate([5, 0, 3, 9])]
    caches = [model.make_cache(rewind=True) for _ in texts]
    for text, cache in zip(texts, caches, strict=True):
        if text:
            model(mx.array([text]), cache=cache)
    cache = [layer[0].merge(layer) for layer in zip(*caches, strict=True)]
    new = mx.random.randint(0, VOCABULARY, (4, sum(calls)))
    for call in mx.split(new, list(calls[:-1]), axis=1):
        model(call, cache=cache)
    alone = mx.stack([model(mx.array([text + new[b].tolist()]))[0, -K:] for b, text in enumerate(texts)])
    for n in range(1, K + 1):
        back = [c.copy() for c in cache]
        for c in back:
            c.trim(n)
        assert largest_error(model(new[:, -n:], cache=back), alone[:, -n:]) <= BOUND


def test_beyond_reach_nothing_is_taken_back(model):
    K = model.args.mini_batch_size
    cache = model.make_cache(rewind=True)
    model(mx.zeros((1, 2 * K + 2), mx.int32), cache=cache)
    for c in cache:
        assert c.reach == [K]
        with pytest.raises(ValueError, match=f"cannot take back {K + 1} tokens: within reach are {K}"):
            c.trim(K + 1)
        with pytest.raises(ValueError, match="within reach"):
            c.trim(-1)
        assert c.offset == [2 * K + 2]
        c.trim(4)  # two of them from the mini-batch before
        assert c.reach == [K - 4]
        c.trim(1)
        assert c.reach == [K - 5]


def test_plain_caches_are_not_trimmable(model):
    assert not any(c.is_trimmable() for c in model.make_cache())
    assert all(c.is_trimmable() for c in model.make_cache(rewind=True))


def test_a_rewindable_cache_from_a_plain_one_and_back(model):
    text = mx.random.randint(0, VOCABULARY, (1, 30))
    plain = model.make_cache()
    model(text[:, :10], cache=plain)
    cache = [RewindableTTTCache(c) for c in plain]
    assert cache[0].reach == [0]
    model(text[:, 10:20], cache=cache)
    for c in cache:
        c.trim(5)
    plain = [c.plain() for c in cache]
    assert largest_error(model(text[:, 15:], cache=plain), model(text)[:, 15:]) <= BOUND


def test_mlx_lm_saves_and_loads_a_rewindable_cache(model, tmp_path):
    text = mx.random.randint(0, VOCABULARY, (1, 20))
    cache = model.make_cache(rewind=True)
    model(text[:, :14], cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert [c.reach for c in loaded] == [c.reach for c in cache]
    for c in loaded:
        c.trim(4)
    assert largest_error(model(text[:, 10:], cache=loaded), model(text)[:, 10:]) <= BOUND


def test_rewinding_keeps_to_twice_the_memory(model):
    plain, cache = model.make_cache(), model.make_cache(rewind=True)
    for c in (plain, cache):
        model(mx.zeros((1, 50), mx.int32), cache=c)
    for p, c in zip(plain, cache, strict=True):
        kept = model.args.mini_batch_size * len(p.history) * model.args.hidden_size * 4
        assert c.nbytes == p.nbytes + sum(w.nbytes for w in p.weights) + p.rows.nbytes + kept
