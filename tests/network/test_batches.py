"""Batches of texts of different lengths: each text gets what it gets alone."""

from __future__ import annotations

import gc
import random

import mlx.core as mx
import pytest

from mlx_ttt.network.cache import TTTCache

from ..models import VOCABULARY, largest_error, shared

BOUND = 1e-4  # of the largest absolute logit


class Batch:
    """A batch, and the tokens that each of its texts has read. To check a text, they are read again, alone."""

    def __init__(self, model, rewind: bool, random: random.Random):
        self.model, self.rewind, self.random = model, rewind, random
        self.texts: list[list[int]] = []
        self.cache: list[TTTCache] = []

    def tokens(self, least: int, most: int) -> list[int]:
        return [self.random.randrange(VOCABULARY) for _ in range(self.random.randint(least, most))]

    def check(self, logits: mx.array, text: list[int], n: int) -> None:
        """`logits` [n, V] are those of the last n tokens of the text."""
        if n:
            assert largest_error(logits, self.model(mx.array([text]))[0, -n:]) <= BOUND

    def join(self) -> None:
        """Some texts join. Each has read some tokens, or none."""
        texts = [self.tokens(0, 9) for _ in range(self.random.randint(1, 3))]
        caches = [self.model.make_cache(rewind=self.rewind) for _ in texts]
        for text, cache in zip(texts, caches, strict=True):
            if text:
                self.model(mx.array([text]), cache=cache)
        joining = [layer[0].merge(layer) for layer in zip(*caches, strict=True)]
        if self.texts:
            for c, other in zip(self.cache, joining, strict=True):
                c.extend(other)
        else:
            self.cache = joining
        self.texts += texts

    def leave(self) -> None:
        """One text leaves and goes on alone. The others stay, in another order."""
        leaver = self.random.randrange(len(self.texts))
        alone, new = [c.extract(leaver) for c in self.cache], self.tokens(1, 7)
        self.check(self.model(mx.array([new]), cache=alone)[0], self.texts[leaver] + new, len(new))
        stay = [i for i in range(len(self.texts)) if i != leaver]
        self.random.shuffle(stay)
        for c in self.cache:
            c.filter(stay)
        self.texts = [self.texts[i] for i in stay]
        if not stay:
            self.join()

    def prefill(self) -> None:
        """Each text reads its own number of tokens, padded on one side, in one call or two."""
        new = [self.tokens(0, 14) for _ in self.texts]
        T = max(1, *map(len, new))
        padding = [T - len(tokens) for tokens in new]
        left = self.random.random() < 0.5
        ids = [[0] * n + tokens if left else tokens + [0] * n for tokens, n in zip(new, padding, strict=True)]
        for c in self.cache:
            if left:
                c.prepare(left_padding=padding)
            else:
                c.prepare(lengths=[len(tokens) for tokens in new], right_padding=padding)
        cut = self.random.randint(0, T - 1)
        calls = [ids[:, part] for ids in [mx.array(ids)] for part in (slice(cut), slice(cut, None))]
        logits = mx.concatenate([self.model(call, cache=self.cache) for call in calls if call.size], axis=1)
        for c in self.cache:
            c.finalize()
        for b, tokens in enumerate(new):
            self.texts[b] = self.texts[b] + tokens
            first = padding[b] if left else 0
            self.check(logits[b, first : first + len(tokens)], self.texts[b], len(tokens))

    def trim(self) -> None:
        if not self.rewind:
            return
        n = self.random.randint(0, min(self.cache[0].reach))
        assert [c.trim(n) for c in self.cache] == [n] * len(self.cache)
        self.texts = [text[: len(text) - n] for text in self.texts]


def run(model, seed: int) -> None:
    chance = random.Random(seed)
    batch = Batch(model, chance.random() < 0.6, chance)
    batch.join()
    for _ in range(6):
        chance.choice([batch.join, batch.leave, batch.prefill, batch.prefill, batch.trim])()
        assert [c.offset for c in batch.cache] == [[len(text) for text in batch.texts]] * len(batch.cache)
    batch.prefill()


@pytest.mark.parametrize("seed", range(3))
def test_a_text_in_a_batch_gets_what_it_gets_alone(model, seed):
    run(model, seed)


@pytest.mark.slow
def test_two_hundred_mixes(model):
    for seed in range(100, 150):
        run(model, seed)


def test_padding_without_lengths_is_refused(model):
    (cache, *_) = model.make_cache()
    with pytest.raises(ValueError, match="give lengths"):
        cache.prepare(right_padding=[2])


def test_padding_of_a_single_text_continues_it_that_many_ways(model):
    cache = model.make_cache()
    for c in cache:
        c.prepare(left_padding=[2, 0])
    logits = model(mx.array([[0, 0, 5, 6], [1, 2, 3, 4]]), cache=cache)
    for found, text in ((logits[0, 2:], [5, 6]), (logits[1], [1, 2, 3, 4])):
        assert largest_error(found, model(mx.array([text]))[0]) <= BOUND


@pytest.mark.parametrize("order", [1, -1])
def test_rewindable_and_plain_caches_do_not_merge(model, order):
    caches = [model.make_cache()[0], model.make_cache(rewind=True)[0]][::order]
    with pytest.raises(ValueError, match="do not go together"):
        caches[0].merge(caches)
    with pytest.raises(ValueError, match="do not go together"):
        caches[0].extend(caches[1])


# ---- Memory ----------------------------------------------------------------------------------------------------------


def memory() -> int:
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def test_a_text_that_left_does_not_keep_the_others():
    model = shared("linear", "111")
    cache = model.make_cache()
    mx.eval(model(mx.zeros((20, 9), mx.int32), cache=cache), [c.state for c in cache])
    before = memory()
    alone = [c.extract(3) for c in cache]
    size = sum(c.nbytes for c in alone)
    assert sum(c.nbytes for c in cache) > 15 * size
    del cache
    assert memory() <= before - 15 * size


def test_rewinding_takes_constant_memory_when_a_text_completes_no_mini_batch():
    model = shared("linear", "111")
    K = model.args.mini_batch_size
    cache, used = model.make_cache(rewind=True), {}
    for i in range(12):
        for c in cache:
            c.prepare(lengths=[K, 0])
        mx.eval(model(mx.zeros((2, K), mx.int32), cache=cache))
        if i in (2, 11):
            used[i] = memory()
    assert used[11] < 1.2 * used[2]
