"""The state: constant in size, copied for nothing, and known to mlx-lm."""

from __future__ import annotations

import gc
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

from .test_model import build, largest_error

KINDS = ["linear", "mlp"]


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_constant(kind):
    model = build(kind, "111")
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
    model = build("linear", "111")
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
    model = build(kind, "111")
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
    model = build(kind, flags)
    ids = mx.random.randint(0, 61, (1, 20))
    cache = make_prompt_cache(model)
    model(ids[:, :9], cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert [c.offset for c in loaded] == [[9], [9]]
    assert mx.array_equal(model(ids[:, 9:], cache=loaded), model(ids[:, 9:], cache=cache))


def test_a_batch_of_another_size_is_refused():
    model = build("linear", "000")
    cache = model.make_cache()
    model(mx.zeros((2, 3), mx.int32), cache=cache)
    with pytest.raises(ValueError, match="holds 2 sequences, the call has 3"):
        model(mx.zeros((3, 3), mx.int32), cache=cache)


def test_reading_all_at_once_keeps_no_more_than_reading_in_pieces():
    """The history is a copy: a view would keep the whole text's activations alive."""
    model = build("linear", "111")
    mx.eval(model.parameters())
    gc.collect()
    before = mx.get_active_memory()
    cache = model.make_cache()
    mx.eval(model(mx.zeros((1, 5000), mx.int32), cache=cache)[:, -1], [c.state for c in cache])
    assert mx.get_active_memory() - before < 2 * sum(c.nbytes for c in cache) + 50_000


@pytest.mark.parametrize("order", ["mlx_ttt, mlx_lm.models.cache", "mlx_lm.models.cache, mlx_ttt"])
def test_mlx_lm_knows_the_architecture_and_the_cache(order):
    program = f"""
import importlib
import {order}
assert mlx_lm.models.cache.TTTCache.__module__ == "mlx_ttt.cache"
assert importlib.import_module("mlx_lm.models.ttt").Model.__module__ == "mlx_ttt.model"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_package_imports_neither_mlx_nor_mlx_lm():
    program = """
import sys, mlx_ttt.cli
assert not {"mlx.core", "mlx_lm", "transformers", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_largest_error_is_relative_to_the_largest_logit():
    assert largest_error(mx.array([1.0, 11.0]), mx.array([2.0, -10.0])) == pytest.approx(2.1)
