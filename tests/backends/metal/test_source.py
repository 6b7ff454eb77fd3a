"""The Metal source itself: Metal would accept it, and the other tests notice when a formula or barrier is wrong."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

from mlx_ttt.backends.metal import rule
from mlx_ttt.network import reference
from mlx_ttt.network.dual import observe, update
from tests.backends.metal.host import (
    CompileError,
    HostCall,
    HostKernel,
    KernelError,
    check_source,
    trace_call,
    why_unavailable,
)
from tests.backends.metal.host.lint import lint

from ...models import KINDS
from ...network.cases import BOUND, Case, Sizes, relative_error
from .cases import assert_matches, kernel_case, launch_arrays

FORMS = [(kind, form) for kind in KINDS for form in ("chunk", "step")]


def source_of(kind: str, form: str, D: int, K: int, dtype: mx.Dtype, shown: bool = False) -> str:
    """The source that MLX makes of a kernel."""
    variant = rule._Variant(kind, form, D, K, dtype, shown)
    tiles = 2 if (kind, form, D) == ("linear", "chunk", 128) else 1
    kernel, call = rule._call(rule._Kernel(variant, tiles), rule._tiny_arrays(variant), [0], [1])
    return trace_call(getattr(kernel, "_kernel", kernel), **call)


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize(
    ("D", "K", "dtype"),
    [
        pytest.param(16, 5, mx.float16, marks=pytest.mark.slow),
        pytest.param(64, 16, mx.float32, marks=pytest.mark.slow),
        (128, 32, mx.bfloat16),
    ],
)
def test_metal_would_accept_it(kind, form, D, K, dtype, shown):
    source = source_of(kind, form, D, K, dtype, shown)
    check_source(source)
    assert lint(source) == []


def test_the_swift_example_is_the_kernel_that_python_builds():
    source = source_of("linear", "step", 64, 16, mx.float32)
    body = source.split("constexpr int SIZE", 1)[1].split("thread_index_in_simdgroup);", 1)[0]
    swift = (rule.metal_dir() / "README.md").read_text(encoding="utf-8").split("```swift", 1)[1]
    assert "".join(body.split()) in "".join(swift.split())


# ---- Mutations ------------------------------------------------------------------------------------------------------


def two_sequences(kind: str, form: str, D: int, K: int) -> Case:
    """A case for a kernel. In the chunk form, one of the sequences ends as its mini-batch does."""
    phase, T, lengths = ([2, 5], 1, None) if form == "step" else ([3, K - 1], 2 * K + 3, [2 * K + 3, K + 1])
    return kernel_case(kind, T=T, sizes=Sizes(2, D, K), phase=phase, lengths=lengths)


def is_caught(
    kind: str, form: str, D: int = 16, K: int = 8, seeds=(0,), launches=None, shown: bool = False
) -> str | None:
    """How a kernel fails, by a wrong result or an error of the harness; None if it does not.

    shown: of the kernel that also shows what the learner does.
    """
    case = two_sequences(kind, form, D, K)
    *expected, expected_signals = reference.observe(*case)
    try:
        for seed in seeds:
            if launches is not None:
                launches.seed = seed
            if shown:
                *found, signals = observe(*case)
            else:
                found, signals = update(*case), ()
            assert_matches(found, expected, case)
            for x, x_expected in zip(signals, expected_signals, strict=shown):
                assert relative_error(x, x_expected) <= BOUND
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
        "span.start + thread_index) * from.H]",
        "span.start + (thread_index ^ 1)) * from.H]",
    ),
    "lr of another sequence": ("linear", "step", "lr[head_at]", "lr[head_at ^ 1]"),
    "lr of the next row": ("mlp", "chunk", "ks[row * STRIDE + D]", "ks[(row ^ 1) * STRIDE + D]"),
    "a token does not see itself": ("linear", "chunk", "col <= row ?", "col < row ?"),
    "a token sees the next": ("linear", "chunk", "col + 1 <= row ?", "col <= row ?"),
    "W1 never learns": ("mlp", "chunk", "is_due = true;", "is_due = false;"),
    "W1 learns of the mini-batch's own keys": (
        "mlp",
        "chunk",
        "load_transposed(past_ks + 8 * r",
        "load_transposed(ks + 8 * r",
    ),
    "W1 learns twice": ("mlp", "chunk", "      is_due = false;\n", ""),
    "the last mini-batch is not learned": ("mlp", "chunk", "is_due && r < BLOCKS", "false && r < BLOCKS"),
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
        "for (int j = 0; j < p; ++j) {\n      const float past",
        "for (int j = 1; j < p; ++j) {\n      const float past",
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
    "W1 stays as it was": ("mlp", "chunk", "W1_now = W1_out;", ""),
}


FAST = ("a token sees the next", "a step forgets a row", "b2 is not committed", "an MLP step forgets a row")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MUTATIONS])
def test_a_wrong_formula_is_caught(mutate, name):
    kind, form, old, new = MUTATIONS[name]
    mutate(kind, old, new)
    assert is_caught(kind, form) is not None


# The same of what the learner shows.
SHOWN_MUTATIONS = {
    "twice the loss": ("linear", "chunk", "= 0.5f * missed", "= missed"),
    "the loss of v": ("linear", "chunk", "v_own[r][c] - pair_at(ks + row * STRIDE + column + 8 * c)", "v_own[r][c]"),
    "the loss without beta": ("linear", "chunk", "+ shift[c] - target", "- target"),
    "a loss of this simdgroup alone": ("linear", "chunk", "(row * S + s) * Q_SUM + MISSED", "row * S * Q_SUM + MISSED"),
    "a write norm without the bias": ("linear", "chunk", "(k_squares[SHOWN ? r : 0] + 1)", "k_squares[SHOWN ? r : 0]"),
    "a write norm with another t": ("linear", "chunk", "t_last * precise::sqrt", "t[0] * precise::sqrt"),
    "signals of the first mini-batch only": ("linear", "chunk", "loss[(span.start + row) * H]", "loss[row * H]"),
    "a write norm of the next token": (
        "linear",
        "chunk",
        "norm[(span.start + row) * H]",
        "norm[(span.start + (row ^ 1)) * H]",
    ),
    "padding that shows a loss": ("linear", "chunk", "loss[i * H] = 0;", ";"),
    "padding that shows a write norm": ("linear", "chunk", "write_norm[i * H] = 0;", ";"),
    "signals of another head": ("linear", "step", "loss[head_at] = lost", "loss[head_at ^ 1] = lost"),
    "a step's loss after the token": ("linear", "step", "SHOWN ? Cols::loss(zk,", "SHOWN ? Cols::loss(zq,"),
    "a step's write norm without the bias": (
        "linear",
        "step",
        "(Cols::dot(k_row, k_row) + 1)",
        "Cols::dot(k_row, k_row)",
    ),
    "a step's write norm with its own t": (
        "linear",
        "step",
        "t[K - 1] * precise::sqrt(squares)",
        "t[p] * precise::sqrt(squares)",
    ),
    "twice the loss of a row": ("mlp", "chunk", "return 0.5f * dot(missed", "return dot(missed"),
    "an MLP's padding that shows a loss": ("mlp", "chunk", "loss[i * H] = 0;", ";"),
    "the first map without its bias": ("mlp", "chunk", "(k_total + 1)", "k_total"),
    "the second map without its bias": ("mlp", "chunk", "(x2_total + 1)", "x2_total"),
    "the maps' errors changed": ("mlp", "chunk", "(k_total + 1) * e1_total", "(k_total + 1) * e2_total"),
    "a copy is left out": ("mlp", "chunk", "e1_total += q2W2[c * Chunk::VIEW", "e1_total = q2W2[c * Chunk::VIEW"),
    "a turn is left out": ("mlp", "chunk", "(turn == 0 ? 0.0f : to[1])", "0.0f"),
    "an MLP step's simdgroup is left out": (
        "mlp",
        "step",
        "e1_squares += squares[2 * s + 1]",
        "e1_squares = squares[2 * s + 1]",
    ),
    "an MLP step's maps without biases": ("mlp", "step", "(Cols::dot(part, part) + 1)", "Cols::dot(part, part)"),
    "an MLP step's write norm with its own t": (
        "mlp",
        "step",
        "t[K - 1] * precise::sqrt(write)",
        "t[p] * precise::sqrt(write)",
    ),
}
SHOWN_FAST = "signals of another head"


def when(index: int, name: str):
    """Each is a kernel to compile, so of those for the same thing, which are side by side, one in three is slow."""
    if name == SHOWN_FAST:
        return name
    return pytest.param(name, marks=pytest.mark.long if index % 3 else pytest.mark.slow)


@pytest.mark.parametrize("name", [when(*n) for n in enumerate(SHOWN_MUTATIONS)])
def test_a_wrong_signal_is_caught(mutate, name):
    kind, form, old, new = SHOWN_MUTATIONS[name]
    mutate(kind, old, new)
    D, K = (64, 16) if kind == "mlp" and form == "chunk" else (16, 8)  # where simdgroups take turns
    assert is_caught(kind, form, D, K, shown=True) is not None


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("shown", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_kernel_as_it_is_passes_the_same_check(kernels, kind, form, shown):
    assert is_caught(kind, form, shown=shown) is None


# ---- Barriers -------------------------------------------------------------------------------------------------------


def barriers(kind: str) -> list[tuple[str, str]]:
    """(form, statement) of each barrier in a Metal file, in order."""
    chunk, step = rule.metal_source(f"ttt_{kind}.metal").split("---- Step form", 1)
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


@pytest.mark.parametrize("index", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 4))])
def test_a_missing_barrier_is_caught(mutate, index):
    assert remove_barrier(mutate, "linear", index) == "chunk"
    assert is_caught("linear", "chunk", *BARRIER_SIZES["linear"]) is not None


@pytest.mark.long
@pytest.mark.parametrize(("kind", "index"), EVERY_BARRIER)
@pytest.mark.parametrize("shown", [False, True])
def test_every_missing_barrier_is_caught(mutate, launches, kind, index, shown):
    form = remove_barrier(mutate, kind, index)
    D, K = BARRIER_SIZES[kind]
    assert is_caught(kind, form, D, K, range(5), launches, shown) is not None


# A barrier behind which other simdgroups' shares of a signal are read, and one of those shares.
SHARES = {
    "linear chunk": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    TTT_UNROLL for (int r = 0; r < BLOCKS; ++r) {\n"
        "      const int row = 8 * r + lane.row;\n      const Norm norm",
        "q_sums[((simdgroup + 1) % S) * Q_SUM + MISSED]",
    ),
    "mlp chunk": (
        "threadgroup_barrier(Work::FLAGS);\n\n    if (!is_last) next.fetch",
        "q2W2[copy * Chunk::VIEW + D]",
    ),
    "mlp step": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n  if (simdgroup > 0) return;",
        "squares[2 * ((simdgroup + 1) % S)]",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARES)
def test_a_share_of_a_signal_that_is_read_before_its_barrier_is_caught(mutate, name):
    """These barriers are there for other sums, too. This is about what the signals put beside them."""
    kind, form = name.split()
    barrier, share = SHARES[name]
    mutate(kind, barrier, f"if (SHOWN && {share} == 12345.0f) return;\n{barrier}")
    assert is_caught(kind, form, *BARRIER_SIZES[kind]) is None
    assert is_caught(kind, form, *BARRIER_SIZES[kind], shown=True) == "DataRace"


@pytest.mark.long
@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize(("D", "K"), [(16, 8), (64, 16), (96, 32)])
@pytest.mark.parametrize("shown", [False, True])
def test_the_intact_kernels_race_under_no_schedule(launches, kind, form, D, K, shown):
    launches.allow_unwritten = True  # the padding of TTT-MLP's workspace, where that is device memory
    assert is_caught(kind, form, D, K, range(6), launches, shown) is None


@pytest.mark.slow
def test_device_memory_needs_its_own_barrier(mutate, launches):
    """Where TTT-MLP's workspace is device memory, a barrier for threadgroup memory alone is not enough."""
    launches.allow_unwritten = True
    mutate("mlp", "mem_flags::mem_threadgroup | mem_flags::mem_device", "mem_flags::mem_threadgroup")
    assert is_caught("mlp", "chunk", 96, 25, launches=launches) == "DataRace"


# ---- ThreadSanitizer ------------------------------------------------------------------------------------------------


def host_call(kind: str, form: str, D: int, K: int) -> HostCall:
    """The launch for two sequences."""
    case = two_sequences(kind, form, D, K)
    kernel = rule._Kernel(rule._Variant(kind, form, D, K, case.tokens.q.dtype), 1)
    kernel, call = rule._call(kernel, launch_arrays(case), case.state.phase, case.tokens.counts)
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
