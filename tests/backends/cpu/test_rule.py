"""The update rule in C against the definition, as in tests/network/test_dual.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.network import reference
from mlx_ttt.network.dual import dual_form, update
from mlx_ttt.network.rule import State

from ...models import KINDS
from ...network.cases import Sizes, assert_agrees, make_case, relative_error, scalar
from .c_code import needs_c

pytestmark = needs_c


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", range(5))
def test_any_number_of_tokens_from_any_phase(kind, phase, spy):
    for T in range(16, 21):
        case = make_case(kind, T=T, sizes=Sizes(K=5), phase=[phase], seed=T)
        assert_agrees(update(*case), reference.update(*case))
        assert spy.taken() == {"update"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "phase"), [(16, 0), (16, 1), (17, 15), (31, 1), (32, 0), (33, 9), (40, 8)])
def test_around_the_ends_of_mini_batches(kind, T, phase):
    case = make_case(kind, T=T, sizes=Sizes(K=16), phase=[phase], seed=T)
    assert_agrees(update(*case), reference.update(*case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("H", "D", "K"),
    [(3, 8, 1), (1, 16, 16), (2, 24, 16), (1, 64, 16), (1, 96, 20), (2, 10, 5), (2, 20, 16), (1, 17, 8)],
)
def test_sizes(kind, H, D, K, spy):
    case = make_case(kind, T=37, sizes=Sizes(H, D, K), phase=[K - 1, K // 2])
    assert_agrees(update(*case), reference.update(*case))
    assert spy.taken() == {"update"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [None, [40, 5, 0], [1, 39, 16], [2, 4, 8], [0, 0, 0]])
def test_sequences_in_different_phases_and_of_different_lengths(kind, lengths, spy):
    case = make_case(kind, T=40, sizes=Sizes(K=16), phase=[0, 3, 15], lengths=lengths)
    assert_agrees(update(*case), reference.update(*case), lengths)
    assert spy.taken() == {"update"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mini_batch_larger_than_the_stack(kind):
    """Its scores alone take 16 MB."""
    case = make_case(kind, T=2050, sizes=Sizes(H=1, K=2048), phase=[2])
    assert_agrees(update(*case), dual_form.in_mlx(*case), bound=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "lengths"), [(16, [3, 16]), (40, [40, 33])])
def test_arguments_stay_as_they_are(kind, T, lengths):
    """The open mini-batch is filled, once without and once with a commit."""
    case = make_case(kind, T=T, sizes=Sizes(K=32), phase=[2, 5], lengths=lengths)
    before = [np.array(x) for x in case.arrays]
    _, state = update(*case)
    learned = [state.rows, *state.weights]
    kept = [np.array(x) for x in learned]
    update(*case._replace(state=State(state.weights, state.rows, [2, 5])))
    for x, y in zip([*case.arrays, *learned], before + kept, strict=True):
        assert np.array_equal(np.array(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_in_any_layout(kind):
    case = make_case(kind, T=20, sizes=Sizes(H=3), phase=[1, 4])
    expected = reference.update(*case)
    q, k, v, lr, t, gamma, beta, rows, *weights = case.arrays
    q, k, v = (mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
    lr = mx.concatenate([lr, lr + 1], axis=2)[..., :3]
    gamma = mx.contiguous(gamma.T).T
    rows = mx.contiguous(rows[..., ::-1])[..., ::-1]
    weights = [mx.contiguous(w.swapaxes(2, 3)).swapaxes(2, 3) for w in weights]
    assert_agrees(update(*case.with_arrays([q, k, v, lr, t, gamma, beta, rows, *weights])), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "rounding"), [(mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
def test_half_precision_is_float32_inside(kind, dtype, rounding, spy):
    case = make_case(kind, T=21, phase=[3], dtype=dtype)
    y, state = update(*case)
    assert spy.taken() == {"update"}
    y_expected, state_expected = reference.update(*case)
    assert y.dtype == dtype
    assert {x.dtype for x in (*state.weights, state.rows)} == {mx.float32}
    assert_agrees((y_expected, state), (y_expected, state_expected))
    assert relative_error(y, y_expected) <= rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("phase", "lengths"), [([0, 2], None), ([1, 4], [19, 6])])
def test_gradients_are_those_of_the_dual_form(kind, phase, lengths, spy):
    case = make_case(kind, T=20, sizes=Sizes(H=1, K=5), phase=phase, lengths=lengths)

    def gradients(rule):
        def function(arrays):
            return scalar(*rule(*case.with_arrays(arrays)), lengths)

        value, grads = mx.value_and_grad(function)(case.arrays)
        return [value, *grads]

    found = gradients(update)
    assert spy.taken() == {"update", "update_backward"}
    for x, expected in zip(found, gradients(dual_form.in_mlx), strict=True):
        assert relative_error(x, expected) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_inside_transformations_it_is_the_dual_form(kind, spy, tmp_path):
    """By mx.vmap; and exported, which traces like mx.compile but needs no C++ compiler."""
    case = make_case(kind, T=20, phase=[3])
    q, other = case.tokens.q, -case.tokens.q
    expected, state_expected = reference.update(*case)

    def function(q):
        y, state = update(*case.changed("q", q))
        return [y, *state.weights, state.rows]

    file = str(tmp_path / "update.mlxfn")
    mx.export_function(file, function, q)
    y, *weights, rows = mx.import_function(file)(q)
    assert_agrees((y, State(tuple(weights), rows, state_expected.phase)), (expected, state_expected))
    y = mx.vmap(lambda q: function(q)[0])(mx.stack([q, other]))
    assert relative_error(y[0], expected) <= 1e-5
    assert relative_error(y[1], reference.update(*case.changed("q", other))[0]) <= 1e-5
    assert not spy.taken()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [15, 0])
def test_few_tokens_are_left_to_the_dual_form(kind, T, spy):
    case = make_case(kind, T=T, phase=[3])
    assert_agrees(update(*case), dual_form.in_mlx(*case))
    assert not spy.taken()
