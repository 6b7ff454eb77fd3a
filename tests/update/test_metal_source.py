"""The Metal source itself: what Metal would reject, and what the other tests would miss if it were changed."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

from mlx_ttt.update import metal
from tests.metal_host import CompileError, HostCall, HostKernel, KernelError, trace_call, why_unavailable
from tests.metal_host.lint import lint

from .metal_cases import KERNEL, KINDS, REFERENCE, assert_matches, kernel_case

FORMS = [(kind, form) for kind in KINDS for form in ("chunk", "step")]


def tiny_call(kind: str, form: str, D: int, K: int, dtype: mx.Dtype, tiles: int = 1):
    """A kernel as MLX made it, and the arguments of a call."""
    variant = metal._Variant(kind, form, D, K, dtype)
    kernel, call = metal._call(variant, tiles, metal._tiny_arrays(variant), [0], [1])
    return getattr(kernel, "_kernel", kernel), call


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize(("D", "K", "dtype"), [(16, 5, mx.float16), (64, 16, mx.float32), (128, 32, mx.bfloat16)])
def test_metal_would_accept_it(kind, form, D, K, dtype):
    kernel, call = tiny_call(kind, form, D, K, dtype, tiles=2 if (kind, form, D) == ("linear", "chunk", 128) else 1)
    call = HostKernel.from_mlx(kernel, **call)
    call.check_address_spaces()
    call.check_conversions()
    assert lint(call.source) == []


def test_the_swift_example_is_the_kernel_that_python_builds():
    kernel, call = tiny_call("linear", "step", 64, 16, mx.float32)
    body = trace_call(kernel, **call).split("constexpr int SIZE", 1)[1].split("thread_index_in_simdgroup);", 1)[0]
    swift = (metal.metal_dir() / "README.md").read_text(encoding="utf-8").split("```swift", 1)[1]
    assert "".join(body.split()) in "".join(swift.split())


# ---- Mutations ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mutate(kernels, monkeypatch):
    """Changes one place of a Metal file for the rest of the test."""
    if kernels is None:
        pytest.skip("the host compiles mutants; a device need not")
    original = metal.metal_source

    def to(kind: str, old: str, new: str, occurrence: int = 0) -> None:
        source = original(f"ttt_{kind}.metal")
        at = [m.start() for m in re.finditer(re.escape(old), source)][occurrence]
        mutant = source[:at] + new + source[at + len(old) :]
        monkeypatch.setattr(metal, "metal_source", lambda name: mutant)
        metal._kernel.cache_clear()
        metal._tiles.cache_clear()

    yield to
    metal._kernel.cache_clear()
    metal._tiles.cache_clear()


def two_sequences(kind: str, form: str, D: int, K: int) -> dict:
    """A case for a kernel; in the chunk form, one of the sequences ends as its mini-batch does."""
    phase, T, lengths = ([2, 5], 1, None) if form == "step" else ([3, K - 1], 2 * K + 3, [2 * K + 3, K + 1])
    return kernel_case(kind, B=2, T=T, H=2, D=D, K=K, phase=phase, lengths=lengths)


def is_caught(kind: str, form: str, D: int = 16, K: int = 8, seeds=(0,), launches=None) -> str | None:
    """How a kernel fails, by a wrong result or an error of the harness; None if it does not."""
    case = two_sequences(kind, form, D, K)
    expected = REFERENCE[kind](**case)
    try:
        for seed in seeds:
            if launches is not None:
                launches.seed = seed
            assert_matches(kind, KERNEL[kind](**case), expected, case)
    except CompileError:
        raise
    except (AssertionError, KernelError) as failure:
        return type(failure).__name__
    finally:
        if launches is not None:
            launches.seed = 0
    return None


# What changes, in which form, from, to.
MUTATIONS = {
    "no +1 beside q k": ("linear", "chunk", "(pair(dots) + 1.0f)", "pair(dots)"),
    "no +1 beside q k in a step": (
        "linear",
        "step",
        "(Cols::dot(q_row, k_past[r]) + 1)",
        "Cols::dot(q_row, k_past[r])",
    ),
    "no +1 beside the step's own q k": ("linear", "step", "(Cols::dot(q_row, k_row) + 1)", "Cols::dot(q_row, k_row)"),
    "no +1 beside q2 x2": ("mlp", "chunk", "weight = 1;", "weight = 0;"),
    "no +1 beside q2 x2 in a step": ("mlp", "step", "float weight = 1;", "float weight = 0;"),
    "no +1 beside q k in an MLP step": ("mlp", "step", "(dot + 1)", "dot"),
    "lr of the next token": (
        "linear",
        "chunk",
        "span.start + thread_index) * H]",
        "span.start + (thread_index ^ 1)) * H]",
    ),
    "lr of another sequence": ("linear", "step", "lr[head_at]", "lr[head_at ^ 1]"),
    "lr of the next row": ("mlp", "chunk", "ks[row * STRIDE + D]", "ks[(row ^ 1) * STRIDE + D]"),
    "a token does not see itself": ("linear", "chunk", "col <= row ?", "col < row ?"),
    "a token sees the next": ("linear", "chunk", "col + 1 <= row ?", "col <= row ?"),
    "a token does not see its own x2": (
        "mlp",
        "chunk",
        "j <= row; ++j) Cols::add(z, e2s",
        "j < row; ++j) Cols::add(z, e2s",
    ),
    "a step forgets a row": ("linear", "step", "if (j >= p)", "if (j >= p - 1)"),
    "an MLP step forgets a row": (
        "mlp",
        "step",
        "for (int j = 0; j < p; ++j) q2[u]",
        "for (int j = 1; j < p; ++j) q2[u]",
    ),
    "e1 stays after the commit": ("linear", "chunk", "commits ? float2(0.0f) : e)", "e)"),
    "k stays after the commit": (
        "linear",
        "chunk",
        "commits ? 0.0f : ks[row * STRIDE + col]",
        "ks[row * STRIDE + col]",
    ),
    "x2 stays after the commit": ("mlp", "chunk", "commits ? float2(0.0f) : x)", "x)"),
    "e2 stays after the commit": (
        "mlp",
        "chunk",
        "commits ? 0.0f : e2s[row * STRIDE + col]",
        "e2s[row * STRIDE + col]",
    ),
    "gamma for beta": ("linear", "chunk", "shift[c] = pair_at(beta", "shift[c] = pair_at(gamma"),
    "beta for gamma": ("mlp", "chunk", "Cols::load(scale, gamma", "Cols::load(scale, beta"),
    "gamma for beta in a step": ("linear", "step", "Cols::load(shift, beta", "Cols::load(shift, gamma"),
    "variance over D - 1": ("linear", "chunk", "row_sum(squares) / D", "row_sum(squares) / (D - 1)"),
    "variance over D - 1 in a row": ("mlp", "chunk", "dot(z, z) / D", "dot(z, z) / (D - 1)"),
    "t of another token commits": ("linear", "chunk", "t_last = t[K - 1]", "t_last = t[K - 2]"),
    "b2 is not committed": (
        "mlp",
        "chunk",
        "Cols::add(bias2, e2s + row * STRIDE, -t_last",
        "Cols::add(bias2, e2s + row * STRIDE, 0",
    ),
    "W2 takes x2 for its transpose": ("mlp", "chunk", "x2[h][r] = transposed(x2[h][r], lane);", ";"),
    "W1 stays as it was": ("mlp", "chunk", "W1_now = has_committed ? W1_out : W1", "W1_now = W1"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_formula_is_caught(mutate, name):
    kind, form, old, new = MUTATIONS[name]
    mutate(kind, old, new)
    assert is_caught(kind, form) is not None


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_the_kernel_as_it_is_passes_the_same_check(kernels, kind, form):
    assert is_caught(kind, form) is None


# ---- Barriers -------------------------------------------------------------------------------------------------------


def barriers(kind: str) -> list[tuple[str, str]]:
    """(form, statement) of each barrier in a Metal file, in order."""
    chunk, step = metal.metal_source(f"ttt_{kind}.metal").split("---- Step form", 1)
    found = [(form, m[0]) for form, text in (("chunk", chunk), ("step", step)) for m in BARRIER.finditer(text)]
    return found


BARRIER = re.compile(r"threadgroup_barrier\([^()]*\);")
EVERY_BARRIER = [(kind, i) for kind in KINDS for i in range(len(barriers(kind)))]
# Sizes at which every barrier is reached: TTT-Linear's last waits for the only copy of k, and TTT-MLP's turns need a
# copy with several members.
BARRIER_SIZES = {"linear": (64, 32), "mlp": (64, 16)}


def remove_barrier(mutate, kind: str, index: int) -> str:
    """Returns the form that the barrier was in."""
    form, statement = barriers(kind)[index]
    same = [other for _, other in barriers(kind)[:index]].count(statement)
    mutate(kind, statement, ";", occurrence=same)
    return form


@pytest.mark.parametrize("index", range(4))
def test_a_missing_barrier_is_caught(mutate, index):
    assert remove_barrier(mutate, "linear", index) == "chunk"
    assert is_caught("linear", "chunk", *BARRIER_SIZES["linear"]) is not None


@pytest.mark.long
@pytest.mark.parametrize(("kind", "index"), EVERY_BARRIER)
def test_every_missing_barrier_is_caught(mutate, launches, kind, index):
    form = remove_barrier(mutate, kind, index)
    D, K = BARRIER_SIZES[kind]
    assert is_caught(kind, form, D, K, range(5), launches) is not None


@pytest.mark.long
@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize(("D", "K"), [(16, 8), (64, 16), (96, 32)])
def test_the_intact_kernels_race_under_no_schedule(launches, kind, form, D, K):
    launches.allow_unwritten = True  # the padding of TTT-MLP's workspace, where that is device memory
    assert is_caught(kind, form, D, K, range(6), launches) is None


def test_device_memory_needs_its_own_barrier(mutate, launches):
    """Where TTT-MLP's workspace is device memory, a barrier for threadgroup memory alone is not enough."""
    launches.allow_unwritten = True
    mutate("mlp", "mem_flags::mem_threadgroup | mem_flags::mem_device", "mem_flags::mem_threadgroup")
    assert is_caught("mlp", "chunk", 96, 25, launches=launches) == "DataRace"


# ---- ThreadSanitizer ------------------------------------------------------------------------------------------------


def host_call(kind: str, form: str, D: int, K: int) -> HostCall:
    """The launch that reads two sequences."""
    case = two_sequences(kind, form, D, K)
    arrays = [*(case[name] for name in ("q", "k", "v", "lr", "t", "gamma", "beta")), *case["weights"], case["rows"]]
    variant = metal._Variant(kind, form, D, K, case["q"].dtype)
    kernel, call = metal._call(variant, 1, arrays, case["phase"], case["lengths"] or [1, 1])
    return HostKernel.from_mlx(getattr(kernel, "_kernel", kernel), **call)


@pytest.mark.slow
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize(("D", "K"), [(16, 8), (64, 16)])
def test_thread_sanitizer_reports_nothing_on_the_intact_kernels(kind, form, D, K):
    call = host_call(kind, form, D, K)
    for seed in range(5):
        assert call.thread_sanitizer(seed=seed) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "index"), EVERY_BARRIER)
def test_thread_sanitizer_reports_every_missing_barrier(mutate, kind, index):
    form = remove_barrier(mutate, kind, index)
    assert host_call(kind, form, *BARRIER_SIZES[kind]).thread_sanitizer() != []
