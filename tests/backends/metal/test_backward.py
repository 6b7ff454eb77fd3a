"""The gradients of the kernels, against automatic differentiation of the definition in float64."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ttt.backends.differentiable import Signature
from mlx_ttt.backends.metal import rule
from mlx_ttt.network import reference
from mlx_ttt.network.dual import dual_form, update
from mlx_ttt.training import gradients
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

from ...models import KINDS, VOCABULARY, build
from ...network.cases import BOUND, Case, Sizes, counted, relative_error, scalar
from .cases import ROUNDING, kernel_case
from .test_kernels import MINI_BATCHES


@pytest.fixture(autouse=True)
def scratch_is_written_as_needed(with_scratch):
    pass


def cotangents_of(case: Case) -> list[mx.array]:
    """Of y, and of the weights and rows after the call."""
    outputs = [case.tokens.q, *case.state.weights, case.state.rows]
    return [
        mx.random.normal(x.shape, key=mx.random.key(i), stream=mx.cpu).astype(x.dtype) for i, x in enumerate(outputs)
    ]


def by_definition(case: Case, cotangents: list[mx.array]) -> list[mx.array]:
    """The cotangents of the arrays of a case, in float64."""
    call = Signature(*case)

    def outputs(*arrays: mx.array) -> list[mx.array]:
        y, state = reference.update(*call.arguments(arrays))
        return [counted(y, call.lengths), *state.weights, state.rows]

    with mx.stream(mx.cpu):
        exact = [[x.astype(mx.float64) for x in arrays] for arrays in (call.arrays(*case), cotangents)]
        *found, rows = mx.vjp(outputs, *exact)[1]
        slots = mx.arange(case.learner.mini_batch_size)
        written = (slots < mx.array(case.state.phase)[:, None])[:, None, :, None]
        return [*found, mx.where(written, rows, mx.zeros_like(rows))]  # rows that are not open are not read


def by_kernel(case: Case, cotangents: list[mx.array]) -> list[mx.array]:
    call = Signature(*case)
    found = rule._backward(call, call.arrays(*case), cotangents)
    assert found is not NotImplemented
    return found


def assert_exact(found: list[mx.array], expected: list[mx.array], case: Case) -> None:
    """Each cotangent within BOUND, and those in half precision within one rounding besides."""
    names = ["q", "k", "v", "lr", "t", "gamma", "beta", *case.learner.inner.weight_names, "rows"]
    arrays = Signature(*case).arrays(*case)
    for name, x, g, g_expected in zip(names, arrays, found, expected, strict=True):
        assert (g.shape, g.dtype) == (x.shape, x.dtype), name
        a, e = (np.array(y.astype(mx.float64, stream=mx.cpu)) for y in (g, g_expected))
        assert np.isfinite(a).all(), name
        smallest = 2.0**-25 if g.dtype == mx.float16 else 0  # of its subnormal numbers, half
        excess = np.maximum(np.abs(a - e) - ROUNDING[g.dtype] * np.abs(e) - smallest, 0)
        # The cotangent of t sums up all tokens, heads and columns. Its terms are around 1, and may cancel.
        size = max(np.linalg.norm(e), 1) if name == "t" else np.linalg.norm(e) or 1
        assert np.linalg.norm(excess) <= BOUND * size, name


def check(case: Case) -> None:
    cotangents = cotangents_of(case)
    assert_exact(by_kernel(case, cotangents), by_definition(case, cotangents), case)


# ---- Against the definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [n if n in (1, 21) else pytest.param(n, marks=pytest.mark.slow) for n in range(1, 22)])
def test_every_phase_and_number_of_tokens(kernels, kind, T):
    check(kernel_case(kind, T=T, sizes=Sizes(H=1, D=16, K=8), phase=list(range(8))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("phase", "T", "lengths"),
    [([3, 7, 0], 13, [13, 1, 0]), ([3, 0, 7], 3, [0, 3, 1]), ([0, 2, 5], 24, [24, 14, 3])],
)
def test_padding(kernels, kind, phase, T, lengths):
    check(kernel_case(kind, T=T, phase=phase, lengths=lengths))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [[0.0] * 8, [1.0, 0.5, 0.0, 0.25, 0.2, 0.0, 0.1, 0.0], [-0.5, 0.5] * 4])
def test_token_factors_of_any_sign(kernels, kind, t):
    case = kernel_case(kind, T=19, phase=[3, 0])
    check(case._replace(learner=replace(case.learner, t=mx.array(t))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("D", "K", "dtype"),
    [
        (64, 16, mx.float32),
        pytest.param(96, 16, mx.bfloat16, marks=pytest.mark.slow),
        pytest.param(128, 16, mx.float16, marks=pytest.mark.slow),
    ],
)
def test_sizes_of_released_models(kernels, kind, D, K, dtype):
    check(kernel_case(kind, sizes=Sizes(1, D, K), dtype=dtype, phase=[3, K - 1], T=2 * K + 3, lengths=[2 * K + 3, K]))


@pytest.mark.slow
@pytest.mark.parametrize("D", rule.HEAD_DIMENSIONS)
@pytest.mark.parametrize("K", MINI_BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_sizes(kernels, kind, D, K, monkeypatch):
    rng = random.Random(1000 * D + K)
    tiles, dtype = rng.choice((1, 2)), rng.choice(rule.DTYPES)
    monkeypatch.setattr(rule, "_tiles", lambda variant: tiles)
    T = rng.randint(2 * K, 2 * K + 5)
    phase = [rng.randrange(K), rng.randrange(K)]
    check(kernel_case(kind, sizes=Sizes(1, D, K), dtype=dtype, phase=phase, T=T, lengths=[T, rng.randint(0, T)]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_do_not_depend_on_the_schedule(launches, kind):
    case = kernel_case(kind, T=21, phase=[3, 6], lengths=[21, 9])
    cotangents = cotangents_of(case)
    first = by_kernel(case, cotangents)
    for launches.seed in range(1, 4):
        assert all(mx.array_equal(a, b) for a, b in zip(first, by_kernel(case, cotangents), strict=True))
    launches.seed = 0


# ---- As the gradient of the update rule -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_is_one_launch(launches, kind):
    case = kernel_case(kind, T=21, phase=[3, 6], lengths=[21, 9])

    def gradient(rule):
        return mx.grad(lambda arrays: scalar(*rule(*case.with_arrays(arrays)), case.tokens.lengths))(case.arrays)

    gradient(update)  # probes the kernels
    del launches.names[:]
    found = gradient(update)
    assert sorted(launches.names) == [f"ttt_{kind}_backward", f"ttt_{kind}_chunk"]
    for name, g, g_expected in zip(case.names, found, gradient(dual_form.in_mlx), strict=True):
        if name != "rows":  # those that are not open pass through MLX operations
            assert relative_error(g, g_expected) <= BOUND, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_call_takes_several_launches(launches, kind, monkeypatch):
    monkeypatch.setattr(rule, "LAUNCH", 8)
    case = kernel_case(kind, T=21, phase=[3, 6], lengths=[21, 6])
    check(case)
    del launches.names[:]
    check(case)
    assert launches.names == [f"ttt_{kind}_chunk"] * 2 + [f"ttt_{kind}_backward"] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_those_of_mlx_operations(kernels, kind):
    case = kernel_case(kind, T=7, phase=[2])

    def of(rule, q):
        return mx.grad(lambda q: (rule(*case.changed("q", q))[0] ** 2).sum())(q)

    found, expected = (
        mx.grad(lambda q, rule=rule: of(rule, q).sum())(case.tokens.q) for rule in (update, dual_form.in_mlx)
    )
    assert relative_error(found, expected) <= BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_segments(launches, kind, monkeypatch):
    """Segments that end anywhere in a mini-batch, through a whole model."""
    model, ids = build(kind, "111", hidden_size=32), mx.random.randint(0, VOCABULARY, (2, 24), key=mx.random.key(0))

    def of_kernels(available: bool) -> dict[str, mx.array]:
        monkeypatch.setattr(rule, "available", lambda: available)
        return dict(tree_flatten(gradients(model, ids, 9)[1]))

    expected = of_kernels(False)
    del launches.names[:]
    found = of_kernels(True)
    assert f"ttt_{kind}_backward" in launches.names
    largest = max(mx.abs(g).max().item() for g in expected.values())
    for name, g in expected.items():
        assert mx.abs(found[name] - g).max().item() <= BOUND * largest, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_kernel_leaves_the_gradient_to_mlx_operations(kernels, kind, monkeypatch, recwarn):
    launch = rule._launch

    def refusing(kernel, *args):
        if kernel.variant.form == "backward":
            raise ValueError("[metal::Device] Thread group size (64) is greater than the maximum allowed")
        return launch(kernel, *args)

    rule._tiles.cache_clear()
    monkeypatch.setattr(rule, "_launch", refusing)
    case = kernel_case(kind, T=7, phase=[2])

    def gradient(rule):
        return mx.grad(lambda arrays: scalar(*rule(*case.with_arrays(arrays))))(case.arrays)

    for _ in range(2):
        found = gradient(update)
    for g, g_expected in zip(found, gradient(dual_form.in_mlx), strict=True):
        assert relative_error(g, g_expected) <= BOUND
    assert [f"ttt_{kind}_backward" in str(w.message) for w in recwarn] == [True]
    rule._tiles.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_kernel_supports_goes_to_mlx_operations(kernels, kind):
    case = kernel_case(kind, T=3, sizes=Sizes(D=24), phase=[2])
    call = Signature(*case)
    assert rule._backward(call, call.arrays(*case), cotangents_of(case)) is NotImplemented


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_depends_on_nothing_but_name_and_template(kernels, kind):
    sources = {}
    for B, T, H, dtype in itertools.product((1, 9), (1, 9), (1, 8), (mx.float32, mx.float16)):
        case = kernel_case(kind, T=T, sizes=Sizes(H, D=16, K=5), phase=[1] * B, dtype=dtype)
        arrays = [*Signature.arrays(*case), *cotangents_of(case)]
        kernel = rule._Kernel(rule._Variant(kind, "backward", 16, 5, dtype), 1)
        kernel, call = rule._call(kernel, arrays, [1] * B, [T] * B)
        source = trace_call(getattr(kernel, "_kernel", kernel), **call)
        assert sources.setdefault(tuple(call["template"]), source) == source


# ---- The source -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("D", "K", "dtype"),
    [
        pytest.param(16, 5, mx.float16, marks=pytest.mark.slow),
        (64, 16, mx.float32),
        pytest.param(128, 32, mx.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_metal_would_accept_it(kind, D, K, dtype):
    variant = rule._Variant(kind, "backward", D, K, dtype)
    kernel, call = rule._call(rule._Kernel(variant, 1), rule._tiny_arrays(variant), [0], [1])
    source = trace_call(getattr(kernel, "_kernel", kernel), **call)
    check_source(source)
    assert lint(source) == []
    assert len(re.findall(r"\[\[buffer\(", source)) <= 31  # Metal's limit


def two_sequences(kind: str, D: int, K: int) -> Case:
    """One of the sequences ends as its mini-batch does."""
    return kernel_case(kind, T=2 * K + 3, sizes=Sizes(2, D, K), phase=[3, K - 1], lengths=[2 * K + 3, K + 1])


def is_caught(kind: str, D: int = 16, K: int = 8, seeds=(0,), launches=None) -> str | None:
    """How a kernel fails, by a wrong result or an error of the harness; None if it does not."""
    case = two_sequences(kind, D, K)
    cotangents = cotangents_of(case)
    expected = by_definition(case, cotangents)
    try:
        for seed in seeds:
            if launches is not None:
                launches.seed = seed
            assert_exact(by_kernel(case, cotangents), expected, case)
    except CompileError:
        raise
    except (AssertionError, KernelError) as failure:
        return type(failure).__name__
    finally:
        if launches is not None:
            launches.seed = 0
    return None


# What changes, from, to, and which of several places.
MUTATIONS = {
    "no +1 beside q k": ("linear", "pair(dots) + 1.0f, r", "pair(dots), r"),
    "+1 in dS": ("linear", "-t_row[r] * pair(dots)", "-t_row[r] * (pair(dots) + 1.0f)"),
    "dS without t": ("linear", "causal(-t_row[r] * pair(dots)", "causal(-pair(dots)"),
    "a token sees the next": ("linear", "col + 1 <= row ?", "col <= row ?"),
    "a token does not see itself": ("linear", "col <= row ?", "col < row ?"),
    "the commit has no cotangent for e": ("linear", "own -= t_last * pair(pulled[r][c]);", ";"),
    "the commit has no cotangent for k": (
        "linear",
        "pair(dk_own[r][c]) - t_last * pair(taken[r])",
        "pair(dk_own[r][c])",
    ),
    "the commit has no cotangent for t": ("linear", "dt_commit -= ", "dt_commit -= 0 * "),
    "t of another token commits": ("linear", "t_last = t[K - 1]", "t_last = t[K - 2]"),
    "t of the next token": ("linear", "? t[8 * r + lane.row] :", "? t[(8 * r + lane.row) ^ 1] :"),
    "open rows end without cotangents of k": (
        "linear",
        "dk_pair += pair_at(drows_out + row * 2 * D + column",
        "dk_pair += 0 * pair_at(drows_out + row * 2 * D + column",
    ),
    "open rows end without cotangents of e": ("linear", "own += pair_at(drows_out + at)", "own += 0"),
    "cleared rows have cotangents": ("linear", "leaves_open = !commits", "leaves_open = true"),
    "open rows begin without cotangents of k": (
        "linear",
        "row < span.first ? pair(dk_own[r][c]) :",
        "false ? pair(dk_own[r][c]) :",
    ),
    "open rows begin without cotangents of e": ("linear", "row < span.first ? own :", "false ? own :"),
    "an open row's e is made anew": ("linear", "own = pair_at(rows +", "own = 0 * pair_at(rows +"),
    "an open row's e is made anew, forwards": ("linear", "e = pair_at(rows +", "e = 0 * pair_at(rows +"),
    "the weights of the mini-batch before": ("linear", "m > 0 ? starts + (m - 1)", "m > 1 ? starts + (m - 2)"),
    "the first weights have no e": ("linear", "step[c] = tile_of(-t_last * e);", "step[c] = tile_of(0 * e);"),
    "b stays as it was": ("linear", "multiply_add(bias[c], ones, step[c]);", ";"),
    "dW is not what it was": ("linear", "    dW_now = dW1;\n", "\n"),
    "dW without q": ("linear", "multiply_add(own[c], q_tile, dz[r][c]);", ";"),
    "dW without k": ("linear", "multiply_add(own[c], k_tile, dZ[r][c]);", ";"),
    "db without dZ": ("linear", "pair(total[c]) + pair(dz[r][c]) + own", "pair(total[c]) + pair(dz[r][c])"),
    "dq without dS": ("linear", "multiply_add(dq_own[r], weight, k_tile);", ";"),
    "dk without dS": ("linear", "multiply_add(dk_own[r][c], weight, q_tile);", ";"),
    "dk without dZ": ("linear", "multiply_add(dk_own[r][c], dZ_tile, W_tile);", ";"),
    "dk without the target": ("linear", "dk_pair = scale[c] * du", "dk_pair = 0 * du"),
    "dlr of another token": ("linear", "dlr[size_t(span.start + row) * H]", "dlr[size_t(span.start + (row ^ 1)) * H]"),
    "dv of the wrong sign": ("linear", "-scale[c] * du);", "scale[c] * du);"),
    "no slope in the output's LayerNorm": ("linear", "- pulls - z_hat * slopes)", "- pulls)"),
    "no mean in the output's LayerNorm": ("linear", "- pulls - z_hat * slopes)", "- z_hat * slopes)"),
    "no std in the gradient": ("linear", "- z_hat * of_std;", ";"),
    "no tilt in du": ("linear", "dG - dG_mean - z_hat * tilt", "dG - dG_mean"),
    "no u in dz^": ("linear", "- dG * mean_uz - u * tilt", "- dG * mean_uz"),
    "mean(u z^) is constant": ("linear", "du - dG * mean_uz - u * tilt", "du - u * tilt"),
    "tilt counts once": ("linear", "du_tilt - 2 * tilt * mean_uz", "du_tilt - tilt * mean_uz"),
    "u has no mean": ("linear", "- tilt * norm[r].mean_u;", ";"),
    "gamma counts once": ("linear", "du * (2 * scale[c] * z_hat", "du * (scale[c] * z_hat"),
    "gamma without the output": ("linear", "dgamma[c] += pull * z_hat;", ";"),
    "beta without the output": ("linear", "dbeta[c] += pull;", ";"),
    "beta without the gradient": ("linear", "dbeta[c] += scale[c] * du;", ";"),
    "a simdgroup's share of dt is missing": (
        "linear",
        "s < S; ++s) total += k_sums",
        "s < S - 1; ++s) total += k_sums",
    ),
    "MLP: no +1 beside q k": ("mlp", "S1, qs, ks, STRIDE, ones_row, 1.0f", "S1, qs, ks, STRIDE, ones_row, 0.0f"),
    "MLP: no +1 beside q2 x2": ("mlp", "S2, q2s, x2s, F, ones_row, 1.0f", "S2, q2s, x2s, F, ones_row, 0.0f"),
    "MLP: +1 in dS2": ("mlp", "es, STRIDE, minus_t, 0.0f", "es, STRIDE, minus_t, 1.0f"),
    "MLP: +1 in dS1": ("mlp", "e1s, F, minus_t, 0.0f", "e1s, F, minus_t, 1.0f"),
    "MLP: dS2 without t": ("mlp", "es, STRIDE, minus_t, 0.0f", "es, STRIDE, ones_row, 0.0f"),
    "MLP: a token does not see itself": ("mlp", "j <= row; ++j) Cols::add(seen", "j < row; ++j) Cols::add(seen"),
    "MLP: the commit has no cotangent for e2": ("mlp", "total -= t_last * pair(c2);", ";"),
    "MLP: the commit has no cotangent for e1": ("mlp", "total -= t_last * pair(c1[r]);", ";"),
    "MLP: the commit has no cotangent for x2": ("mlp", "pair(dx2[r]) - t_last * pair(taken[r])", "pair(dx2[r])"),
    "MLP: the commit has no cotangent for k": ("mlp", "total = -t_last * pair(taken[r])", "total = 0 * pair(taken[r])"),
    "MLP: the commit of W2 has no cotangent for t": (
        "mlp",
        "dt_commit -= sum(pair(e2)",
        "dt_commit -= 0 * sum(pair(e2)",
    ),
    "MLP: the commit of W1 has no cotangent for t": (
        "mlp",
        "dt_commit -= sum(pair(e1[r])",
        "dt_commit -= 0 * sum(pair(e1[r])",
    ),
    "MLP: z2 has no cotangent for t": ("mlp", "dt_rows[row] -= share", "dt_rows[row] -= 0 * share"),
    "MLP: z1 has no cotangent for t": ("mlp", "dt[r] -= sum(", "dt[r] -= 0 * sum("),
    "MLP: cleared rows have cotangents": ("mlp", "leaves_open = !commits", "leaves_open = true"),
    "MLP: open rows end without e2": (
        "mlp",
        "total += pair_at(drows_out + row * WIDTH + D + 2 * F",
        "total += 0 * pair_at(drows_out + row * WIDTH + D + 2 * F",
    ),
    "MLP: open rows end without e1": (
        "mlp",
        "total += pair_at(drows_out + row * WIDTH + D + own",
        "total += 0 * pair_at(drows_out + row * WIDTH + D + own",
    ),
    "MLP: open rows end without x2": (
        "mlp",
        "+ pair_at(drows_out + row * WIDTH + D + F",
        "+ 0 * pair_at(drows_out + row * WIDTH + D + F",
    ),
    "MLP: open rows end without k": (
        "mlp",
        "total += pair_at(drows_out + row * WIDTH + own",
        "total += 0 * pair_at(drows_out + row * WIDTH + own",
    ),
    "MLP: open rows begin without e2": ("mlp", "row < span.first ? pair(de2[r]) :", "false ? pair(de2[r]) :"),
    "MLP: open rows begin without e1": ("mlp", "row < span.first ? total :", "false ? total :"),
    "MLP: open rows begin without x2": ("mlp", "row < span.first ? pair(dx2[r]) :", "false ? pair(dx2[r]) :"),
    "MLP: open rows begin without k": ("mlp", "row < span.first ? pair(dk_own[r]) :", "false ? pair(dk_own[r]) :"),
    "MLP: an open row's x2 is made anew": ("mlp", "x = pair_at(rows +", "x = 0 * pair_at(rows +"),
    "MLP: an open row's e1 is made anew": ("mlp", "e = pair_at(rows +", "e = 0 * pair_at(rows +"),
    "MLP: an open row's e2 is made anew": ("mlp", "Cols::load(e2, rows + row * WIDTH + D + 2 * F, lane_index);", ";"),
    "MLP: the weights of the mini-batch before": ("mlp", "m > 0 ? starts + (m - 1)", "m > 1 ? starts + (m - 2)"),
    "MLP: b1 stays as it was": ("mlp", "b1_m + unit, e1, -t_last", "b1_m + unit, e1, 0"),
    "MLP: b2 stays as it was": ("mlp", "b2_m + column, e2, -t_last", "b2_m + column, e2, 0"),
    "MLP: W1 stays as it was": ("mlp", "multiply_add(first, k_tile, e1[r]);", ";"),
    "MLP: W2 stays as it was": ("mlp", "multiply_add(second, x2_transposed[r], e2);", ";"),
    "MLP: dW1 is not what it was": ("mlp", "    dW1_now = dW1;\n", "\n"),
    "MLP: dW2 is not what it was": ("mlp", "    dW2_now = dW2;\n", "\n"),
    "MLP: db1 is not what it was": ("mlp", "    db1_now = db1;\n", "\n"),
    "MLP: db2 is not what it was": ("mlp", "    db2_now = db2;\n", "\n"),
    "MLP: dW1 without q": ("mlp", "multiply_add(first, q_tile, dp1[r]);", ";"),
    "MLP: dW2 without q2": ("mlp", "multiply_add(second, q2[r], dp2);", ";"),
    "MLP: dW2 without h": ("mlp", "multiply_add(second, h[r], e2);", ";"),
    "MLP: dW2 without x2": ("mlp", "multiply_add(second, x2[r], dz2);", ";"),
    "MLP: db2 without dz2": ("mlp", "tile_of(pair(dp2) + pair(dz2))", "tile_of(pair(dp2))"),
    "MLP: dq without dS1": ("mlp", "add_causal<BLOCKS>(dq_own, S1, tiles);", ";"),
    "MLP: dk without dS1": ("mlp", "add_causal_transposed<BLOCKS>(dk_own, S1, tiles);", ";"),
    "MLP: dq2 without dS2": ("mlp", "add_causal<BLOCKS>(dp1, dS2, tiles);", ";"),
    "MLP: dx2 without dS2": ("mlp", "add_causal_transposed<BLOCKS>(dx2, dS2, tiles);", ";"),
    "MLP: dx2 without dz2": ("mlp", "add_product<BLOCKS, D, true>(dx2, de2s, STRIDE, W2_m + unit * D, D);", ";"),
    "MLP: de2 without h": ("mlp", "add_product<BLOCKS, F, false>(de2, hs, F, W2_m + column, D);", ";"),
    "MLP: no curve of the gelu": ("mlp", "dz1 = total * pair(a) * curve_of(pair(z1));", ";"),
    "MLP: gelu'' without its last term": ("mlp", "(curve - 2.0f * tanh_u * slope * slope)", "curve"),
    "MLP: dk without the target": ("mlp", "+= scale[i] * du;\n        }", "+= 0 * du;\n        }"),
    "MLP: dv of the wrong sign": ("mlp", "T(-scale[i] * du)", "T(scale[i] * du)"),
    "MLP: no std in the gradient": ("mlp", "- z[i] * rate * inv_std * share / D;", ";"),
    "MLP: no u in dz^": ("mlp", "- dG[i] * mean_uz - u[i] * tilt;", "- dG[i] * mean_uz;"),
    "MLP: no tilt in du": ("mlp", "dG_mean - z[i] * tilt;", "dG_mean;"),
    "MLP: no tilt in the output's LayerNorm": ("mlp", "- mean - z[i] * tilt)", "- mean)"),
    "MLP: gamma counts once": ("mlp", "du * (2 * scale[i]", "du * (scale[i]"),
    "MLP: beta without the output": ("mlp", "dbeta[i] += pull[i];", ";"),
    "MLP: dlr of another token": (
        "mlp",
        "dlr[size_t(span.start + row) * H]",
        "dlr[size_t(span.start + (row ^ 1)) * H]",
    ),
}
FAST = ("a token sees the next", "the commit has no cotangent for k", "u has no mean", "MLP: dq2 without dS2")


def when(index: int, name: str):
    """Each is a kernel to compile, so of those for the same thing, which are side by side, one in three is slow."""
    if name in FAST:
        return name
    return pytest.param(name, marks=pytest.mark.long if index % 3 else pytest.mark.slow)


@pytest.mark.parametrize("name", [when(*n) for n in enumerate(MUTATIONS)])
def test_a_wrong_formula_is_caught(mutate, name):
    kind, old, new = MUTATIONS[name]
    mutate(f"{kind}_backward", old, new)
    assert is_caught(kind) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_as_it_is_passes_the_same_check(kernels, kind):
    assert is_caught(kind) is None


# ---- Barriers -------------------------------------------------------------------------------------------------------

BARRIER = re.compile(r"threadgroup_barrier\([^()]*\);")


def barriers(kind: str) -> list[str]:
    """The statements, in order."""
    return BARRIER.findall(rule.metal_source(f"ttt_{kind}_backward.metal"))


EVERY_BARRIER = [(kind, i) for kind in KINDS for i in range(len(barriers(kind)))]


def remove_barrier(mutate, kind: str, index: int) -> None:
    statement = barriers(kind)[index]
    mutate(f"{kind}_backward", statement, ";", occurrence=barriers(kind)[:index].count(statement))


@pytest.mark.parametrize(
    ("kind", "index"), [pytest.param(*b, marks=[pytest.mark.slow] * (b[1] > 1)) for b in EVERY_BARRIER]
)
def test_every_missing_barrier_is_caught(mutate, launches, kind, index):
    remove_barrier(mutate, kind, index)
    assert is_caught(kind) in ("DataRace", "UninitializedRead")


@pytest.mark.long
@pytest.mark.parametrize(("kind", "name"), [("linear", "ALL"), ("linear", "VIEWS"), ("mlp", "ALL")])
def test_device_memory_needs_its_own_barriers(mutate, launches, kind, name):
    """Views that do not fit threadgroup memory, and the weights, pass through device memory."""
    source = rule.metal_source(f"ttt_{kind}_backward.metal")
    for i in range(source.count(f"threadgroup_barrier({name})")):
        mutate(f"{kind}_backward", f"threadgroup_barrier({name})", "threadgroup_barrier(mem_flags::mem_threadgroup)", i)
        assert is_caught(kind, 96, 25) in ("DataRace", "UninitializedRead"), i


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "K"), [(16, 8), (64, 16), (96, 32)])
def test_the_intact_kernels_race_under_no_schedule(launches, kind, D, K):
    assert is_caught(kind, D, K, range(6), launches) is None


def host_call(kind: str, D: int, K: int) -> HostCall:
    """The launch for two sequences."""
    case = two_sequences(kind, D, K)
    kernel = rule._Kernel(rule._Variant(kind, "backward", D, K, case.tokens.q.dtype), 1)
    arrays = [*Signature.arrays(*case), *cotangents_of(case)]
    kernel, call = rule._call(kernel, arrays, case.state.phase, case.tokens.counts)
    return HostKernel.from_mlx(getattr(kernel, "_kernel", kernel), **call)


@pytest.mark.slow
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "K"), [(16, 8), (64, 16)])
def test_thread_sanitizer_reports_nothing_on_the_intact_kernels(kind, D, K):
    call = host_call(kind, D, K)
    for seed in range(5):
        assert call.thread_sanitizer(seed=seed) == []
