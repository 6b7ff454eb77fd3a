"""The dual form against the definition, from every phase, in any split, and its gradients."""

from __future__ import annotations

import itertools

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ttt.network import reference
from mlx_ttt.network.dual import dual_form

from ..models import KINDS
from .cases import Sizes, assert_agrees, make_case, relative_error, scalar, sequence

update = dual_form.in_mlx


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", range(5))
def test_any_number_of_tokens_from_any_phase(kind, phase):
    """From one to two whole mini-batches and more. The definition reads the longest text once."""
    case = make_case(kind, T=12, sizes=Sizes(K=5), phase=[phase])
    y, state = [], case.state
    for T in range(1, 13):
        out, state = reference.update(*case.part(T - 1, T)._replace(state=state))
        y.append(out)
        assert_agrees(update(*case.part(0, T)), (mx.concatenate(y, axis=1, stream=mx.cpu), state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("H", "D", "K"), [(1, 4, 1), (3, 6, 2), (2, 16, 16), (1, 64, 16), (1, 96, 32)])
def test_sizes(kind, H, D, K):
    case = make_case(kind, T=2 * K + 3, sizes=Sizes(H, D, K), phase=[K - 1, K - 1])
    assert_agrees(update(*case), reference.update(*case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [None, [20, 5, 0], [1, 19, 8], [12, 5, 0], [0, 0, 0]])
def test_sequences_in_different_phases_and_of_different_lengths(kind, lengths):
    case = make_case(kind, T=20, phase=[0, 3, 7], lengths=lengths)
    assert_agrees(update(*case), reference.update(*case), lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_never_depends_on_its_neighbours(kind):
    case = make_case(kind, T=11, phase=[2, 5, 7], lengths=[11, 4, 9])
    y, state = update(*case)
    for b in range(3):
        alone = case.alone(b)
        found = y[b : b + 1], sequence(state, b)
        assert_agrees(found, update(*alone), alone.tokens.lengths, bound=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", [[0], [6], [0, 3, 6]])
def test_one_token_with_an_array_as_phase(kind, phase):
    """The same, and the weights stay the arrays that they were."""
    case = make_case(kind, T=1, phase=phase)
    expected = update(*case)
    y, state = update(*case.changed("phase", mx.array(phase)))
    assert_agrees((y, state), expected, bound=1e-6)
    assert state.weights is case.state.weights


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), phase=st.integers(0, 7), cuts=st.sets(st.integers(1, 29)), seed=st.integers(0, 99))
def test_any_split_into_calls_is_one_call(kind, phase, cuts, seed):
    case = make_case(kind, T=30, phase=[phase], seed=seed)
    pieces, state = [], case.state
    for start, end in itertools.pairwise([0, *sorted(cuts), 30]):
        y, state = update(*case.part(start, end)._replace(state=state))
        pieces.append(y)
    assert_agrees((mx.concatenate(pieces, axis=1), state), update(*case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "rounding"), [(mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
def test_half_precision_is_float32_inside(kind, dtype, rounding):
    case = make_case(kind, T=21, phase=[3], dtype=dtype)
    y, state = update(*case)
    y_expected, state_expected = reference.update(*case)
    assert y.dtype == dtype
    assert {x.dtype for x in (*state.weights, state.rows)} == {mx.float32}
    assert_agrees((y_expected, state), (y_expected, state_expected))
    assert relative_error(y, y_expected) <= rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("phase", "lengths"), [([0, 0], None), ([2, 2], None), ([1, 4], [9, 6])])
def test_gradients_are_those_of_the_definition(kind, phase, lengths):
    """Of a scalar in which every output takes part, through two commits, in every input."""
    case = make_case(kind, T=9, sizes=Sizes(H=1, D=4, K=5), phase=phase, lengths=lengths)

    def gradient(rule, dtype):
        arrays = [x.astype(dtype) for x in case.arrays]
        return mx.grad(lambda arrays: scalar(*rule(*case.with_arrays(arrays)), lengths))(arrays)

    with mx.stream(mx.cpu):
        expected = gradient(reference.update, mx.float64)
    found = gradient(update, mx.float32)
    written = mx.arange(5) < mx.array(phase)[:, None]  # a row that is not written is no input
    for name, g, g_expected in zip(case.names, found, expected, strict=True):
        if name == "rows":
            g, g_expected = (mx.where(written[:, None, :, None], x, 0, stream=mx.cpu) for x in (g, g_expected))
        assert relative_error(g, g_expected) <= 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_change_nothing(kind):
    case = make_case(kind, T=0, phase=[3])
    y, state = update(*case)
    assert y.shape == (1, 0, 2, 8)
    assert state.weights is case.state.weights
    assert state.rows is case.state.rows
    assert state.phase == [3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "phase"), [(1, 0), (6, 3), (8, 0)])
def test_forward_mode_agrees_with_reverse_mode(kind, T, phase):
    case = make_case(kind, T=T, sizes=Sizes(H=1, K=4), phase=[phase])

    def function(*arrays):
        y, state = dual_form.in_mlx(*case.with_arrays(arrays))
        return [y, *state.weights, state.rows]

    arrays = list(case.arrays)
    tangents = [mx.sin(7 * x) for x in arrays]
    outputs, along = mx.jvp(function, arrays, tangents)
    cotangents = [mx.cos(5 * x) for x in outputs]
    back = mx.vjp(function, arrays, cotangents)[1]
    forward = sum((a * b).sum().item() for a, b in zip(along, cotangents, strict=True))
    reverse = sum((a * b).sum().item() for a, b in zip(back, tangents, strict=True))
    assert forward == pytest.approx(reverse, rel=1e-4)
