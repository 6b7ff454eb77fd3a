"""The dual form against the definition, from every phase, in any split, and its gradients."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ttt.update import dual, reference

from .cases import assert_agrees, counted, make_case, relative_error

DUAL = {"linear": dual.ttt_linear, "mlp": dual.ttt_mlp}
REFERENCE = {"linear": reference.ttt_linear, "mlp": reference.ttt_mlp}
DUAL_STEP = {"linear": dual.ttt_linear_step, "mlp": dual.ttt_mlp_step}
KINDS = ["linear", "mlp"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", range(5))
def test_any_number_of_tokens_from_any_phase(kind, phase):
    for T in range(1, 13):
        case = make_case(kind, T=T, K=5, phase=[phase], seed=T)
        assert_agrees(DUAL[kind](**case), REFERENCE[kind](**case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("H", "D", "K"), [(1, 4, 1), (3, 6, 2), (2, 16, 16), (1, 64, 16), (1, 96, 32)])
def test_sizes(kind, H, D, K):
    case = make_case(kind, B=2, T=2 * K + 3, H=H, D=D, K=K, phase=[K - 1, K - 1])
    assert_agrees(DUAL[kind](**case), REFERENCE[kind](**case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [None, [20, 5, 0], [1, 19, 8], [12, 5, 0], [0, 0, 0]])
def test_sequences_in_different_phases_and_of_different_lengths(kind, lengths):
    case = make_case(kind, B=3, T=20, phase=[0, 3, 7], lengths=lengths)
    assert_agrees(DUAL[kind](**case), REFERENCE[kind](**case), lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_never_depends_on_its_neighbours(kind):
    case = make_case(kind, B=3, T=11, phase=[2, 5, 7], lengths=[11, 4, 9])
    y, weights, rows = DUAL[kind](**case)
    for b in range(3):
        alone = {name: x[b : b + 1] for name, x in case.items() if name in ("q", "k", "v", "lr", "rows")}
        alone |= {"weights": tuple(w[b : b + 1] for w in case["weights"])}
        alone |= {"phase": case["phase"][b : b + 1], "lengths": case["lengths"][b : b + 1]}
        expected = DUAL[kind](**(case | alone))
        found = y[b : b + 1], [w[b : b + 1] for w in weights], rows[b : b + 1]
        assert_agrees(found, expected, alone["lengths"], bound=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", [[0], [6], [0, 3, 6]])
def test_the_step_form_is_one_token(kind, phase):
    """With its row at the phase, the state after the token."""
    case = make_case(kind, B=len(phase), T=1, phase=phase)
    expected = DUAL[kind](**case)
    arguments = {name: x for name, x in case.items() if name != "lengths"}
    y, row = DUAL_STEP[kind](**(arguments | {"phase": mx.array(phase)}))
    for phases in (phase, mx.array(phase)):
        rows = dual.append_row(case["rows"], row, phases)
        assert_agrees((y, case["weights"], rows), expected, bound=1e-6)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), phase=st.integers(0, 7), cuts=st.sets(st.integers(1, 29)), seed=st.integers(0, 99))
def test_any_split_into_calls_is_one_call(kind, phase, cuts, seed):
    case = make_case(kind, T=30, phase=[phase], seed=seed)
    whole = DUAL[kind](**case)
    pieces, state = [], {"weights": case["weights"], "rows": case["rows"], "phase": case["phase"]}
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 30], strict=True):
        tokens = {name: case[name][:, start:end] for name in ("q", "k", "v", "lr")}
        y, state["weights"], state["rows"] = DUAL[kind](**(case | tokens | state))
        state["phase"] = [(p + end - start) % 8 for p in state["phase"]]
        pieces.append(y)
    assert_agrees((mx.concatenate(pieces, axis=1), state["weights"], state["rows"]), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "rounding"), [(mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
def test_half_precision_is_float32_inside(kind, dtype, rounding):
    case = make_case(kind, T=21, phase=[3], dtype=dtype)
    y, weights, rows = DUAL[kind](**case)
    y_expected, weights_expected, rows_expected = REFERENCE[kind](**case)
    assert y.dtype == dtype
    assert {x.dtype for x in (*weights, rows)} == {mx.float32}
    assert_agrees((y_expected, weights, rows), (y_expected, weights_expected, rows_expected))
    assert relative_error(y, y_expected) <= rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("phase", "lengths"), [([0, 0], None), ([2, 2], None), ([1, 4], [9, 6])])
def test_gradients_are_those_of_the_definition(kind, phase, lengths):
    """Differentiate a scalar that every output takes part in, through two commits, in every input."""
    case = make_case(kind, B=2, T=9, H=1, D=4, K=5, phase=phase, lengths=lengths)
    names = ["q", "k", "v", "lr", "t", "gamma", "beta", "rows"]

    def scalar(rule, arrays, weights):
        y, new_weights, rows = rule(**(case | dict(zip(names, arrays, strict=True)) | {"weights": tuple(weights)}))
        return sum(
            (x * mx.sin(mx.arange(x.size, dtype=x.dtype).reshape(x.shape))).sum()
            for x in (counted(y, lengths), *new_weights, rows)
        )

    def gradient(rule, dtype):
        arrays = [case[name].astype(dtype) for name in names]
        weights = [w.astype(dtype) for w in case["weights"]]
        return mx.grad(lambda *args: scalar(rule, *args), argnums=(0, 1))(arrays, weights)

    with mx.stream(mx.cpu):
        expected = gradient(REFERENCE[kind], mx.float64)
    found = gradient(DUAL[kind], mx.float32)
    written = mx.arange(5) < mx.array(phase)[:, None]  # a row that is not written is no input
    for arrays in (found[0], expected[0]):
        arrays[-1] = mx.where(written[:, None, :, None], arrays[-1], 0, stream=mx.cpu)
    labels = [*names, "W1", "b1", "W2", "b2"]
    for name, g, g_expected in zip(labels, (*found[0], *found[1]), (*expected[0], *expected[1]), strict=False):
        assert relative_error(g, g_expected) <= 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_change_nothing(kind):
    case = make_case(kind, T=0, phase=[3])
    y, weights, rows = DUAL[kind](**case)
    assert y.shape == (1, 0, 2, 8)
    assert weights is case["weights"]
    assert rows is case["rows"]
