"""Every kernel against the definition, in float64: all phases and lengths, all sizes and dtypes, any order of forms."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.backends.metal import rule
from mlx_ttt.network import reference
from mlx_ttt.network.dual import dual_form, update

from ...models import KINDS
from ...network.cases import Sizes, relative_error, sequence
from .cases import assert_matches, kernel_case

MINI_BATCHES = (1, 5, 8, 16, 32)


@pytest.fixture(scope="module", params=KINDS)
def trajectory(request):
    """All phases of D = 16 and K = 8 side by side: the case, and what the definition makes of its first n tokens."""
    K, T = 8, 3 * 8 + 5
    case = kernel_case(request.param, T=T, sizes=Sizes(H=1, D=16, K=K), phase=list(range(K)))
    expected, y, state = [], [], case.state
    for n in range(T):
        out, state = reference.update(*case.part(n, n + 1)._replace(state=state))
        y.append(out)
        expected.append((mx.concatenate(y, axis=1, stream=mx.cpu), state))
    return case, expected


def test_every_phase_and_number_of_tokens(kernels, trajectory):
    case, expected = trajectory
    for n in range(1, len(expected) + 1):
        tokens = case.part(0, n)
        assert_matches(update(*tokens), expected[n - 1], tokens)


def test_every_phase_of_one_token(kernels, trajectory):
    """Each sequence alone, so that all but the last are for the step form."""
    case, expected = trajectory
    y, state = expected[0]
    for b, phase in enumerate(case.state.phase):
        one = case.part(0, 1).alone(b)
        found = update(*one)
        assert (found[1].weights[0] is one.state.weights[0]) == (phase < 7)
        with mx.stream(mx.cpu):
            alone = y[b : b + 1], sequence(state, b)
        assert_matches(found, alone, one)


def test_a_frozen_state(kernels, trajectory):
    """Cleared rows at every phase, and learning rates of 0: the weights stay bit for bit through a commit."""
    case, _ = trajectory
    frozen = case.part(0, 11).changed("rows", mx.zeros_like(case.state.rows)).changed("lr", mx.zeros((8, 11, 1)))
    found = update(*frozen)
    assert_matches(found, reference.update(*frozen), frozen)
    for w, before in zip(found[1].weights, case.state.weights, strict=True):
        assert mx.array_equal(w, before)
    for one in (frozen.part(0, 1).alone(b) for b in range(7)):
        assert_matches(update(*one), reference.update(*one), one)


@pytest.mark.parametrize(
    ("kind", "sizes", "dtype"),
    [
        ("linear", Sizes(D=64, K=16), mx.float32),
        pytest.param("mlp", Sizes(D=64, K=16), mx.float32, marks=pytest.mark.slow),
        pytest.param("linear", Sizes(D=96, K=16), mx.bfloat16, marks=pytest.mark.slow),
        pytest.param("mlp", Sizes(D=96, K=16), mx.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sizes_of_released_models(kernels, kind, sizes, dtype):
    K = sizes.K
    many = kernel_case(kind, sizes=sizes, dtype=dtype, phase=[3, K - 1], T=2 * K + 3, lengths=[2 * K + 3, K])
    check(kernels, many)
    check(kernels, kernel_case(kind, sizes=sizes, dtype=dtype, phase=[K - 2, 0], T=1))


def check(kernels, case) -> None:
    if kernels is not None:  # the padding of TTT-MLP's workspace is never written, where that is device memory
        D, K = case.tokens.q.shape[-1], case.learner.mini_batch_size
        kernels.allow_unwritten = case.kind == "mlp" and rule._scratch(D, K) > 0
    assert_matches(update(*case), reference.update(*case), case)


# ---- A pairwise cover of everything that a kernel depends on --------------------------------------------------------


class Row(NamedTuple):
    kind: str
    D: int
    K: int
    dtype: mx.Dtype
    phases: str
    count: str
    batch: str
    tiles: int


FACTORS = Row(
    kind=("linear", "mlp"),
    D=rule.HEAD_DIMENSIONS,
    K=MINI_BATCHES,
    dtype=rule.DTYPES,
    phases=("first", "middle", "last", "mixed"),
    count=("one", "within", "mini-batch", "many"),
    batch=("one", "three", "lengths"),
    tiles=(1, 2),
)


def pairwise(factors: tuple, seed: int = 0) -> list[Row]:
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
        rows.append(Row(*candidates[best]))
        left -= covered[best]
    return rows


COVER = pairwise(FACTORS)


@pytest.mark.slow
@pytest.mark.parametrize("row", COVER, ids=lambda row: "-".join(map(str, row)))
def test_pairwise_cover(kernels, row, monkeypatch):
    D, K = row.D, row.K
    if not (row.kind == "linear" and D == 128 and K == 32):  # which fits with 2 only
        monkeypatch.setattr(rule, "_tiles", lambda variant: row.tiles)
    rng = random.Random(repr(tuple(row)))
    B = 1 if row.batch == "one" else 3
    T = {"one": 1, "within": max(1, K - 1), "mini-batch": K, "many": rng.randint(2 * K, 3 * K + 5)}[row.count]
    phase = {
        "first": [0] * B,
        "middle": [K // 2] * B,
        "last": [K - 1] * B,
        "mixed": [rng.randrange(K) for _ in range(B)],
    }[row.phases]
    lengths = [rng.randint(0, T) for _ in range(B)] if row.batch == "lengths" else None
    call = {"phase": phase, "T": T, "lengths": lengths, "dtype": row.dtype, "seed": rng.randrange(1000)}
    check(kernels, kernel_case(row.kind, sizes=Sizes(2, D, K), **call))


def test_the_cover_is_pairwise():
    for i, j in itertools.combinations(range(len(FACTORS)), 2):
        assert {(row[i], row[j]) for row in COVER} == set(itertools.product(FACTORS[i], FACTORS[j]))


# ---- State ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_state_goes_through_the_forms_in_any_order(kernels, kind, seed):
    """Pieces of random length, read by the kernels or by MLX operations, against one call of the definition."""
    rng = random.Random(seed)
    phase = [rng.randrange(8) for _ in range(2)]
    case = kernel_case(kind, T=40, sizes=Sizes(H=1, D=16, K=8), phase=phase, seed=seed)
    pieces, state, start = [], case.state, 0
    while start < 40:
        n = min(rng.choice([1, 1, 1, 2, 7, 13]), 40 - start)
        read = rng.choice([update, update, dual_form.in_mlx])
        y, state = read(*case.part(start, start + n)._replace(state=state))
        pieces.append(y)
        start += n
    assert_matches((mx.concatenate(pieces, axis=1), state), reference.update(*case), case)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_past_a_length_change_nothing(kernels, kind):
    case = kernel_case(kind, T=11, phase=[5, 0, 7], lengths=[4, 0, 1])
    y, state = update(*case)
    for b, n in enumerate(case.tokens.lengths):
        assert not y[b, n:].any()
    assert mx.array_equal(state.rows[1], case.state.rows[1])
    for w, before in zip(state.weights, case.state.weights, strict=True):
        assert mx.array_equal(w[1], before[1])
        assert not mx.array_equal(w[0], before[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_mean_costs_no_digits(kernels, kind):
    """The variance of z is not taken as the mean of squares less the square of the mean."""
    case = kernel_case(kind, T=21, sizes=Sizes(H=1, D=64, K=16), phase=[3])
    last = case.learner.inner.weight_names[-1]
    case = case.changed(last, case.value(last) + 300)
    y, state = update(*case)
    y_expected, state_expected = reference.update(*case)
    # Float32 holds z + 300 to 2e-5; the mean of squares would hold the variance to 5e-3.
    assert relative_error(y, y_expected) <= 3e-4
    assert relative_error(state.weights[0], state_expected.weights[0]) <= 3e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_schedule_gives_the_same_bits(launches, kind):
    """The harness also reports a race under each of them."""
    case = kernel_case(kind, T=21, sizes=Sizes(H=2, D=32, K=16), phase=[3, 14])
    one = case.part(0, 1).changed("phase", [3, 5])
    results = []
    for launches.seed in range(6):
        (y, state), (y_one, state_one) = update(*case), update(*one)
        arrays = (y, *state.weights, state.rows, y_one, state_one.rows)
        results.append([np.array(x).tobytes() for x in arrays])
    launches.seed = 0
    assert all(result == results[0] for result in results)
