"""The states of texts that were read before."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_ttt.serve.prompt_store import PromptStore
from tests.models import shared

TEXT = [1, 5, 9, 2, 7, 7, 3, 1, 8, 4, 6, 2, 5, 5, 9]


def prefill(model, n: int) -> list:
    cache = model.make_cache()
    model(mx.array([TEXT[:n]]), cache)
    return cache


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        ([4, 9], 12, 9),  # the longest prefix
        ([4, 14], 12, 4),  # not a longer text: it cannot be cut
        ([14], 12, 0),
        ([11, 12], 12, 12),
    ],
)
def test_what_it_finds(stored, asked, found):
    model = shared("linear", "111")
    store = PromptStore(8, 1 << 30)
    for n in stored:
        store.keep(1.0, TEXT[:n], prefill(model, n))
    cache, read = store.find(1.0, TEXT[:asked])
    assert read == found
    cache = cache or model.make_cache()
    assert {n for c in cache for n in c.offset} == {found}
    logits = model(mx.array([TEXT[found:]]), cache=cache)
    assert mx.allclose(logits, model(mx.array([TEXT]))[:, found:], atol=1e-5)


def test_going_on_leaves_the_stored_one_as_it_was():
    model = shared("mlp", "111")
    store = PromptStore(8, 1 << 30)
    store.keep(1.0, TEXT[:9], prefill(model, 9))
    results = []
    for _ in range(2):
        cache, read = store.find(1.0, TEXT)
        results.append(model(mx.array([TEXT[read:]]), cache))
    assert mx.array_equal(*results)


def test_what_was_read_with_another_learning_scale_is_another_text():
    store = PromptStore(8, 1 << 30)
    store.keep(0.5, TEXT[:9], prefill(shared("linear", "111"), 9))
    assert store.find(1.0, TEXT) == (None, 0)
    assert store.find(0.5, TEXT)[1] == 9


def test_it_forgets_what_was_used_least_recently():
    model = shared("linear", "111")
    size = sum(c.nbytes for c in prefill(model, 1))
    for store in (PromptStore(2, 1 << 30), PromptStore(8, 2 * size)):
        for n in (3, 5):
            store.keep(1.0, TEXT[:n], prefill(model, n))
        assert store.find(1.0, TEXT[:4])[1] == 3
        store.keep(1.0, TEXT[:9], prefill(model, 9))
        assert (len(store), store.nbytes) == (2, 2 * size)
        assert [store.find(1.0, TEXT[:n])[1] for n in (4, 6, 10)] == [3, 3, 9]
        store.keep(1.0, TEXT[:9], prefill(model, 9))  # again: counted once
        assert store.nbytes == 2 * size
    nothing = PromptStore(0, 0)
    nothing.keep(1.0, TEXT[:3], prefill(model, 3))
    assert len(nothing) == nothing.nbytes == 0
