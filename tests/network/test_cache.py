"""The state: constant in size, copied for nothing, and known to mlx-lm."""

from __future__ import annotations

import gc

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

from ..models import KINDS, shared


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_constant(kind):
    model = shared(kind, "111")
    cache = model.make_cache()
    gc.collect()  # what other tests have left
    sizes, memory = set(), []
    for _ in range(40):
        mx.eval(model(mx.random.randint(0, 61, (1, 50)), cache=cache), [c.state for c in cache])
        mx.clear_cache()
        sizes.add(sum(c.nbytes for c in cache))
        memory.append(mx.get_active_memory())
    assert cache[0].offset == [2000]
    assert len(sizes) == 1
    assert memory[-1] - memory[1] < 1e5


def test_the_state_is_what_the_design_says():
    """K rows of (k | e1), W1 and b1 per head, in float32; conv_kernel - 1 inputs of the two convolutions."""
    model = shared("linear", "111")
    cache = model.make_cache()
    model(mx.zeros((1, 10), mx.int32), cache=cache)
    H, D, K, C, kept = 2, 12, 6, 24, 2
    assert cache[0].nbytes == 4 * (H * (D * D + D + K * 2 * D) + 2 * kept * C)
    assert cache[0].offset == [10]
    assert cache[0].phase == [4]
    assert mx.all(cache[0].rows[:, :, 4:] == 0)
    assert mx.all(mx.any(cache[0].rows[:, :, :4] != 0, axis=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_its_own_way(kind):
    model = shared(kind, "111")
    ids = mx.random.randint(0, 61, (2, 20))
    cache = model.make_cache()
    model(ids[:1], cache=cache)
    copies = [[c.copy() for c in cache] for _ in range(2)]
    first = model(ids[1:], cache=copies[0])
    model(ids[:1], cache=cache)
    assert mx.array_equal(model(ids[1:], cache=copies[1]), first)


@pytest.mark.parametrize("flags", ["000", "111"])
@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_saves_and_loads_it(kind, flags, tmp_path):
    model = shared(kind, flags)
    ids = mx.random.randint(0, 61, (1, 20))
    cache = make_prompt_cache(model)
    model(ids[:, :9], cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert [c.offset for c in loaded] == [[9], [9]]
    assert mx.array_equal(model(ids[:, 9:], cache=loaded), model(ids[:, 9:], cache=cache))


def test_a_batch_of_another_size_is_refused():
    model = shared("linear", "000")
    cache = model.make_cache()
    model(mx.zeros((2, 3), mx.int32), cache=cache)
    with pytest.raises(ValueError, match="holds 2 sequences, the call has 3"):
        model(mx.zeros((3, 3), mx.int32), cache=cache)


def test_reading_all_at_once_keeps_no_more_than_reading_in_pieces():
    """The history is a copy. A view would keep the activations of the whole text alive."""
    model = shared("linear", "111")
    mx.eval(model.parameters())
    gc.collect()
    before = mx.get_active_memory()
    cache = model.make_cache()
    mx.eval(model(mx.zeros((1, 5000), mx.int32), cache=cache)[:, -1], [c.state for c in cache])
    assert mx.get_active_memory() - before < 2 * sum(c.nbytes for c in cache) + 50_000
