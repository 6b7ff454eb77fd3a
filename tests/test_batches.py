"""Batches of texts of different lengths, and tokens taken back: each text gets what it gets alone."""

from __future__ import annotations

import gc
import random

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_ttt.cache import RewindableTTTCache, TTTCache

from .test_model import build, largest_error

BOUND = 1e-4  # of the largest absolute logit
VOCABULARY = 61


@pytest.fixture(scope="module", params=["linear-000", "linear-111", "mlp-000", "mlp-111"])
def model(request):
    kind, flags = request.param.split("-")
    return build(kind, flags)


class Batch:
    """A batch and, for each of its texts, the tokens that it has read: the reference reads them alone, from scratch."""

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
        """Texts come in that have read something, or nothing."""
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
        """One text goes on alone; some others stay, in another order."""
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

    def read(self) -> None:
        """Every text reads another number of tokens, padded on one side, in one call or two."""
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
        chance.choice([batch.join, batch.leave, batch.read, batch.read, batch.trim])()
        assert [c.offset for c in batch.cache] == [[len(text) for text in batch.texts]] * len(batch.cache)
    batch.read()


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


# Memory


def memory() -> int:
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def test_a_text_that_left_does_not_keep_the_others():
    model = build("linear", "111")
    cache = model.make_cache()
    mx.eval(model(mx.zeros((20, 9), mx.int32), cache=cache), [c.state for c in cache])
    before = memory()
    alone = [c.extract(3) for c in cache]
    size = sum(c.nbytes for c in alone)
    assert sum(c.nbytes for c in cache) > 15 * size
    del cache
    assert memory() <= before - 15 * size


def test_rewinding_takes_constant_memory_when_a_text_completes_no_mini_batch():
    model = build("linear", "111")
    K = model.args.mini_batch_size
    cache, used = model.make_cache(rewind=True), []
    for _ in range(12):
        for c in cache:
            c.prepare(lengths=[K, 0])
        mx.eval(model(mx.zeros((2, K), mx.int32), cache=cache))
        used.append(memory())
    assert used[-1] < 1.2 * used[2]


# Taking tokens back


@pytest.mark.parametrize("read", [(40,), (5, 3), (1,) * 20, (6, 6), (17, 1)])
def test_all_within_reach_can_be_taken_back(model, read):
    """After reading n tokens at least min(K, n) are within reach."""
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
    """Each has completed its last mini-batch at another token of the last call, or before it."""
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
