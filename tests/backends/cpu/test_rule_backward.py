"""The update rule's backward: its formulas against automatic differentiation of the definition, and C against them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.network import reference
from mlx_ttt.network.dual import dual_form, update
from mlx_ttt.network.rule import State

from ...models import KINDS
from ...network.cases import Sizes, make_case, relative_error, scalar
from .c_code import needs_c
from .rule_backward import rule_backward


def cotangents(case, seed=1):
    """Some for each output: of y, zero for tokens that do not count, and of (rows, *weights)."""
    random = np.random.default_rng(seed)
    dy, *dstate = (random.normal(size=x.shape) for x in (case.tokens.q, case.state.rows, *case.state.weights))
    for b, n in enumerate(case.tokens.counts):
        dy[b, n:] = 0
    return mx.array(dy, mx.float32), [mx.array(0.3 * d, mx.float32) for d in dstate]


def by_definition(case, dy, dstate):
    """The cotangents by automatic differentiation of the definition in float64."""

    def function(*arrays):
        y, state = reference.update(*case.with_arrays(arrays))
        return [y, state.rows, *state.weights]

    with mx.stream(mx.cpu):
        arrays, given = ([x.astype(mx.float64) for x in xs] for xs in (case.arrays, (dy, *dstate)))
        found = [np.array(x) for x in mx.vjp(function, arrays, given)[1]]
    return dict(zip(case.names, found, strict=True))


def open_rows(case, drows):
    """Of the open mini-batch's rows alone: the definition reads the others, too, which are zero."""
    K, phases = case.learner.mini_batch_size, np.array(case.state.phase)
    return drows * (np.arange(K) < phases[:, None])[:, None, :, None]


def with_gates(case, t):
    """With other token factors: zero and negative ones among them."""
    return case.changed("t", mx.array(t, mx.float32))


def distance(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1))


def assert_formulas(case):
    given = cotangents(case)
    found = dict(zip(case.names, rule_backward(case, *given), strict=True))
    expected = by_definition(case, *given)
    found["rows"], expected["rows"] = (open_rows(case, d["rows"]) for d in (found, expected))
    for name, d in expected.items():
        assert distance(found[name], d) <= 1e-12, name


class TestFormulas:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("T", "phase"), [(1, 0), (1, 3), (2, 1), (4, 0), (5, 2), (9, 0), (10, 3)])
    def test_any_number_of_tokens_from_any_phase(self, kind, T, phase):
        assert_formulas(make_case(kind, T=T, sizes=Sizes(K=4), phase=[phase]))

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_mini_batch_of_one_token(self, kind):
        assert_formulas(make_case(kind, T=3, sizes=Sizes(K=1), phase=[0]))

    @pytest.mark.parametrize("kind", KINDS)
    def test_padding_and_gates(self, kind):
        case = make_case(kind, T=7, sizes=Sizes(K=4), phase=[0, 3, 1, 2], lengths=[7, 0, 6, 1])
        assert_formulas(with_gates(case, [1.0, 0.0, -0.3, 0.5]))
        assert_formulas(with_gates(case, [1.0, 0.2, 0.3, 0.0]))


def by_c(case, dy, dstate):
    def function(*arrays):
        y, state = update(*case.with_arrays(arrays))
        return [y, state.rows, *state.weights]

    return mx.vjp(function, case.arrays, [dy.astype(case.tokens.q.dtype), *dstate])[1]


def assert_c(case, bound=1e-5):
    given = cotangents(case)
    for name, found, expected, x in zip(
        case.names, by_c(case, *given), rule_backward(case, *given), case.arrays, strict=True
    ):
        assert found.dtype == x.dtype
        assert distance(np.array(found.astype(mx.float32)), expected) <= bound, name


@needs_c
class TestC:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("phase", range(5))
    def test_any_number_of_tokens_from_any_phase(self, kind, phase, spy):
        for T in range(16, 21):
            assert_c(make_case(kind, T=T, sizes=Sizes(K=5), phase=[phase], seed=T))
            assert spy.taken() == {"update", "update_backward"}

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("T", "phase"), [(16, 0), (16, 1), (17, 15), (31, 1), (32, 0), (33, 9), (40, 8)])
    def test_around_the_ends_of_mini_batches(self, kind, T, phase):
        assert_c(make_case(kind, T=T, sizes=Sizes(K=16), phase=[phase], seed=T))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("H", "D", "K"),
        [
            *[(3, 8, 1), (1, 16, 32), (2, 24, 5), (1, 32, 3), (1, 40, 7), (1, 48, 16), (1, 64, 16), (1, 96, 20)],
            *[(1, 128, 32), (2, 10, 5), (1, 17, 8), (2, 20, 16), (1, 36, 7), (1, 100, 16), (1, 127, 2)],
        ],
    )
    def test_sizes(self, kind, H, D, K, spy):
        """Head dimensions that are multiples of 8, and others."""
        assert_c(make_case(kind, T=37, sizes=Sizes(H, D, K), phase=[K - 1, K // 2], lengths=[37, 30]))
        assert spy.taken() == {"update", "update_backward"}

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("T", "K", "phase"), [(32, 1, 0), (33, 1, 0), (64, 2, 1), (131, 2, 1), (193, 2, 0)])
    def test_groups_of_mini_batches(self, kind, T, K, phase):
        """32 mini-batches are a group."""
        assert_c(make_case(kind, T=T, sizes=Sizes(H=1, K=K), phase=[phase]))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("lengths", [[40, 5, 0], [1, 39, 16], [2, 4, 8], [0, 0, 0], [16, 13, 1]])
    def test_padding(self, kind, lengths, spy):
        assert_c(make_case(kind, T=40, sizes=Sizes(K=16), phase=[0, 3, 15], lengths=lengths))
        assert spy.taken() == {"update", "update_backward"}

    @pytest.mark.parametrize("kind", KINDS)
    def test_gates(self, kind):
        case = make_case(kind, T=21, sizes=Sizes(K=4), phase=[1, 3])
        assert_c(with_gates(case, [1.0, 0.0, -0.3, 0.5]))
        assert_c(with_gates(case, [0.0, 0.2, 0.3, 0.0]))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("dtype", "rounding"), [(mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
    def test_half_precision_is_float32_inside(self, kind, dtype, rounding, spy):
        case = make_case(kind, T=21, phase=[3], dtype=dtype)
        dy, dstate = cotangents(case)
        dy = dy.astype(dtype).astype(mx.float32)
        found, expected = by_c(case, dy, dstate), rule_backward(case, dy, dstate)
        assert spy.taken() == {"update", "update_backward"}
        for x, d, d_expected in zip(case.arrays, found, expected, strict=True):
            bound = 1e-5 if x.dtype == mx.float32 else rounding
            assert d.dtype == x.dtype and distance(np.array(d.astype(mx.float32)), d_expected) <= bound

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_same_to_the_last_bit_and_arguments_stay_as_they_are(self, kind):
        case = make_case(kind, T=70, sizes=Sizes(H=3, K=4), phase=[2, 1], lengths=[70, 33])
        dy, dstate = cotangents(case)
        given = [*case.arrays, dy, *dstate]
        before = [np.array(x) for x in given]
        first, second = (by_c(case, dy, dstate) for _ in range(2))
        assert all(np.array_equal(np.array(x), np.array(y)) for x, y in zip(first, second, strict=True))
        assert all(np.array_equal(np.array(x), y) for x, y in zip(given, before, strict=True))

    def test_large_activations(self):
        """Where the GELU is straight its derivatives are 0 and 1, however large the numbers are."""
        case = make_case("mlp", T=20, sizes=Sizes(K=5), phase=[2])
        W1, b1, *others = case.state.weights
        for scale in (1e2, 1e8, 1e15):
            state = State((scale * W1, b1, *others), case.state.rows, case.state.phase)
            for d in by_c(case._replace(state=state), *cotangents(case)):
                assert mx.isfinite(d).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_second_derivatives_are_those_of_the_dual_form(self, kind):
        case = make_case(kind, T=17, sizes=Sizes(H=1, K=5), phase=[3])
        small = [0.3 * x for x in case.arrays]

        def gradient_norm(rule):
            def loss(arrays):
                return scalar(*rule(*case.with_arrays(arrays)))

            return mx.grad(lambda arrays: sum(g.square().sum() for g in mx.grad(loss)(arrays)))(small)

        for found, expected in zip(gradient_norm(update), gradient_norm(dual_form.in_mlx), strict=True):
            assert relative_error(found, expected) <= 1e-4

    @pytest.mark.parametrize("kind", KINDS)
    def test_tangents_are_those_of_the_dual_form(self, kind, spy):
        case = make_case(kind, T=18, sizes=Sizes(H=1, K=5), phase=[3])
        arrays, tangents = list(case.arrays), [mx.sin(7 * x) for x in case.arrays]

        def tangent(rule):
            def function(*arrays):
                y, state = rule(*case.with_arrays(arrays))
                return [y, *state.weights, state.rows]

            return mx.jvp(function, arrays, tangents)[1]

        found, expected = tangent(update), tangent(dual_form.in_mlx)
        assert spy.taken() == {"update"}
        for a, b in zip(found, expected, strict=True):
            assert b.abs().max() > 0 and relative_error(a, b) <= 1e-4

    @pytest.mark.parametrize("kind", KINDS)
    def test_cotangents_inside_transformations_go_through_the_dual_form(self, kind, spy):
        case = make_case(kind, T=17, sizes=Sizes(H=1, K=5), phase=[3])
        dy, dstate = cotangents(case)
        expected = by_c(case, dy, dstate)[0]
        spy.taken()
        found = mx.vmap(lambda dy: by_c(case, dy, dstate)[0])(mx.stack([dy, -dy]))
        assert spy.taken() == {"update"}
        assert relative_error(found[0], expected) <= 1e-5
