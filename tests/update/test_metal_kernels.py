"""Every kernel against the definition, in float64: all phases and lengths, all sizes and dtypes, any order of forms."""

from __future__ import annotations

import itertools
import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.update import metal

from .cases import relative_error
from .metal_cases import DUAL, KERNEL, KINDS, REFERENCE, assert_matches, kernel_case, tokens_of

HEAD_DIMENSIONS = metal.HEAD_DIMENSIONS
MINI_BATCHES = (1, 5, 8, 16, 32)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)


@pytest.fixture(scope="module", params=KINDS)
def trajectory(request):
    """All phases of D = 16 and K = 8 side by side: the case, and what the definition makes of its first n tokens."""
    kind, K, T = request.param, 8, 3 * 8 + 5
    case = kernel_case(kind, B=K, T=T, H=1, D=16, K=K, phase=list(range(K)))
    expected, y, state = [], [], {}
    for n in range(T):
        state["phase"] = [(p + n) % K for p in range(K)]
        out, state["weights"], state["rows"] = REFERENCE[kind](**(tokens_of(case, n, n + 1) | state))
        y.append(out)
        expected.append((mx.concatenate(y, axis=1, stream=mx.cpu), state["weights"], state["rows"]))
    return kind, case, expected


def test_every_phase_and_number_of_tokens(kernels, trajectory):
    kind, case, expected = trajectory
    for n in range(1, len(expected) + 1):
        tokens = tokens_of(case, 0, n)
        assert_matches(kind, KERNEL[kind](**tokens), expected[n - 1], tokens)


def test_every_phase_of_one_token(kernels, trajectory):
    """Each sequence alone, so that all but the last are read by the step form."""
    kind, case, expected = trajectory
    y, weights, rows = expected[0]
    for b, phase in enumerate(case["phase"]):
        one = tokens_of(case, 0, 1) | {"phase": [phase], "weights": tuple(w[b : b + 1] for w in case["weights"])}
        one |= {name: one[name][b : b + 1] for name in ("q", "k", "v", "lr", "rows")}
        found = KERNEL[kind](**one)
        assert (found[1] is one["weights"]) == (phase < 7)
        with mx.stream(mx.cpu):
            alone = y[b : b + 1], [w[b : b + 1] for w in weights], rows[b : b + 1]
        assert_matches(kind, found, alone, one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "K", "dtype"), [(64, 16, mx.float32), (96, 16, mx.bfloat16)])
def test_sizes_of_released_models(kernels, kind, D, K, dtype):
    check(kernels, kind, D, K, dtype, phase=[3, K - 1], T=2 * K + 3, lengths=[2 * K + 3, K])
    check(kernels, kind, D, K, dtype, phase=[K - 2, 0], T=1, lengths=None)


def check(kernels, kind, D, K, dtype, phase, T, lengths, seed=0, H=2):
    case = kernel_case(kind, B=len(phase), T=T, H=H, D=D, K=K, phase=phase, lengths=lengths, dtype=dtype, seed=seed)
    if kernels is not None:  # the padding of TTT-MLP's workspace is never written, where that is device memory
        kernels.allow_unwritten = kind == "mlp" and metal._scratch(D, K) > 0
    assert_matches(kind, KERNEL[kind](**case), REFERENCE[kind](**case), case)


# ---- A pairwise cover of everything that a kernel depends on --------------------------------------------------------

PHASES = ("first", "middle", "last", "mixed")
COUNTS = ("one", "within", "mini-batch", "many")
BATCHES = ("one", "three", "lengths")
TILES = (1, 2)
FACTORS = (KINDS, HEAD_DIMENSIONS, MINI_BATCHES, DTYPES, PHASES, COUNTS, BATCHES, TILES)


def pairwise(*factors: tuple, seed: int = 0) -> list[tuple]:
    """Rows that hold every pair of values of two factors: the best of some random rows, until none is left."""
    rng = random.Random(seed)
    pairs = list(itertools.combinations(range(len(factors)), 2))
    left = {(i, a, j, b) for i, j in pairs for a in factors[i] for b in factors[j]}
    rows = []
    while left:
        i, a, j, b = min(left, key=repr)
        candidates = [[rng.choice(f) for f in factors] for _ in range(50)]
        for row in candidates:
            row[i], row[j] = a, b
        covered = [{(i, row[i], j, row[j]) for i, j in pairs} & left for row in candidates]
        best = max(range(50), key=lambda c: len(covered[c]))
        rows.append(tuple(candidates[best]))
        left -= covered[best]
    return rows


COVER = pairwise(*FACTORS)


@pytest.mark.slow
@pytest.mark.parametrize("row", COVER, ids=lambda row: "-".join(map(str, row)))
def test_pairwise_cover(kernels, row, monkeypatch):
    kind, D, K, dtype, phases, count, batch, tiles = row
    if not (kind == "linear" and D == 128 and K == 32):  # which fits with 2 only
        monkeypatch.setattr(metal, "_tiles", lambda variant: tiles)
    rng = random.Random(repr(row))
    B = 1 if batch == "one" else 3
    T = {"one": 1, "within": max(1, K - 1), "mini-batch": K, "many": rng.randint(2 * K, 3 * K + 5)}[count]
    phase = {
        "first": [0] * B,
        "middle": [K // 2] * B,
        "last": [K - 1] * B,
        "mixed": [rng.randrange(K) for _ in range(B)],
    }
    lengths = [rng.randint(0, T) for _ in range(B)] if batch == "lengths" else None
    check(kernels, kind, D, K, dtype, phase[phases], T, lengths, seed=rng.randrange(1000))


def test_the_cover_is_pairwise():
    for i, j in itertools.combinations(range(len(FACTORS)), 2):
        assert {(row[i], row[j]) for row in COVER} == set(itertools.product(FACTORS[i], FACTORS[j]))


# ---- State ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_state_carried_through_any_order_of_forms(kernels, kind, seed):
    """Pieces of random length, read by the kernels or by dual.py: one call of the definition."""
    rng = random.Random(seed)
    case = kernel_case(kind, B=2, T=40, H=1, D=16, K=8, phase=[rng.randrange(8) for _ in range(2)], seed=seed)
    state = {"weights": case["weights"], "rows": case["rows"], "phase": case["phase"]}
    pieces, start = [], 0
    while start < 40:
        n = min(rng.choice([1, 1, 1, 2, 7, 13]), 40 - start)
        rule = rng.choice([KERNEL, KERNEL, DUAL])[kind]
        y, state["weights"], state["rows"] = rule(**(tokens_of(case, start, start + n) | state))
        state["phase"] = [(p + n) % 8 for p in state["phase"]]
        pieces.append(y)
        start += n
    found = mx.concatenate(pieces, axis=1), state["weights"], state["rows"]
    assert_matches(kind, found, REFERENCE[kind](**case), case)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_past_a_length_change_nothing(kernels, kind):
    case = kernel_case(kind, B=3, T=11, H=2, D=16, K=8, phase=[5, 0, 7], lengths=[4, 0, 1])
    y, weights, rows = KERNEL[kind](**case)
    for b, n in enumerate(case["lengths"]):
        assert not y[b, n:].any()
    assert mx.array_equal(rows[1], case["rows"][1])
    for w, before in zip(weights, case["weights"], strict=True):
        assert mx.array_equal(w[1], before[1])
        assert not mx.array_equal(w[0], before[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_mean_costs_no_digits(kernels, kind):
    """The variance of z is not taken as the mean of squares less the square of the mean."""
    case = kernel_case(kind, T=21, H=1, D=64, K=16, phase=[3])
    *others, bias = case["weights"]
    case["weights"] = (*others, bias + 300)
    y, weights, _ = KERNEL[kind](**case)
    y_expected, weights_expected, _ = REFERENCE[kind](**case)
    # Float32 holds z + 300 to 2e-5; the mean of squares would hold the variance to 5e-3.
    assert relative_error(y, y_expected) <= 3e-4
    assert relative_error(weights[0], weights_expected[0]) <= 3e-4


@pytest.mark.parametrize("kind", KINDS)
def test_any_schedule_gives_the_same_bits(launches, kind):
    """The harness also reports a race under each of them."""
    case = kernel_case(kind, B=2, T=21, H=2, D=32, K=16, phase=[3, 14])
    one = tokens_of(case, 0, 1) | {"phase": [3, 5]}
    results = []
    for launches.seed in range(6):
        y, weights, rows = KERNEL[kind](**case)
        y_one, _, rows_one = KERNEL[kind](**one)
        results.append([np.array(x).tobytes() for x in (y, *weights, rows, y_one, rows_one)])
    launches.seed = 0
    assert all(result == results[0] for result in results)
