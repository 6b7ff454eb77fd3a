"""The update rule in C against the definition, in the spirit of test_dual.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt import update
from mlx_ttt.update import dual, native, reference

from ..native import needs_native
from .cases import assert_agrees, counted, make_case, relative_error

pytestmark = needs_native

PUBLIC = {"linear": update.ttt_linear, "mlp": update.ttt_mlp}
NATIVE = {"linear": native.ttt_linear, "mlp": native.ttt_mlp}
DUAL = {"linear": dual.ttt_linear, "mlp": dual.ttt_mlp}
REFERENCE = {"linear": reference.ttt_linear, "mlp": reference.ttt_mlp}
KINDS = ["linear", "mlp"]
ARRAYS = ["q", "k", "v", "lr", "t", "gamma", "beta", "rows"]


def scalar(y, weights, rows, lengths=None):
    """In which every output takes part."""
    return sum((x * mx.sin(mx.arange(x.size).reshape(x.shape))).sum() for x in (counted(y, lengths), *weights, rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", range(5))
def test_any_number_of_tokens_from_any_phase(kind, phase, spy):
    for T in range(16, 21):
        case = make_case(kind, T=T, K=5, phase=[phase], seed=T)
        assert_agrees(PUBLIC[kind](**case), REFERENCE[kind](**case))
        assert spy.taken() == {"update"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "phase"), [(16, 0), (16, 1), (17, 15), (31, 1), (32, 0), (33, 9), (40, 8)])
def test_around_the_ends_of_mini_batches(kind, T, phase):
    case = make_case(kind, T=T, K=16, phase=[phase], seed=T)
    assert_agrees(PUBLIC[kind](**case), REFERENCE[kind](**case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("H", "D", "K"), [(3, 8, 1), (1, 16, 16), (2, 24, 16), (1, 64, 16), (1, 96, 20)])
def test_sizes(kind, H, D, K):
    case = make_case(kind, B=2, T=37, H=H, D=D, K=K, phase=[K - 1, K // 2])
    assert_agrees(PUBLIC[kind](**case), REFERENCE[kind](**case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [None, [40, 5, 0], [1, 39, 16], [2, 4, 8], [0, 0, 0]])
def test_sequences_in_different_phases_and_of_different_lengths(kind, lengths, spy):
    case = make_case(kind, B=3, T=40, K=16, phase=[0, 3, 15], lengths=lengths)
    assert_agrees(PUBLIC[kind](**case), REFERENCE[kind](**case), lengths)
    assert spy.taken() == {"update"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mini_batch_larger_than_the_stack(kind):
    """Its scores alone take 16 MB."""
    case = make_case(kind, T=2050, H=1, K=2048, phase=[2])
    assert_agrees(PUBLIC[kind](**case), DUAL[kind](**case), bound=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "lengths"), [(16, [3, 16]), (40, [40, 33])])
def test_what_it_is_given_stays_as_it_is(kind, T, lengths):
    """The open mini-batch is filled, once without and once with a commit."""
    case = make_case(kind, B=2, T=T, K=32, phase=[2, 5], lengths=lengths)
    given = [case[name] for name in ARRAYS] + [*case["weights"]]
    before = [np.array(x) for x in given]
    _, weights, rows = PUBLIC[kind](**case)
    kept = [np.array(x) for x in (*weights, rows)]
    PUBLIC[kind](**(case | {"weights": weights, "rows": rows}))
    for x, y in zip([*given, *weights, rows], before + kept, strict=True):
        assert np.array_equal(np.array(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_in_any_layout(kind):
    case = make_case(kind, B=2, T=20, H=3, phase=[1, 4])
    expected = REFERENCE[kind](**case)
    for name in ("q", "k", "v"):
        case[name] = mx.contiguous(case[name].swapaxes(1, 2)).swapaxes(1, 2)
    case["lr"] = mx.concatenate([case["lr"], case["lr"] + 1], axis=2)[..., :3]
    case["gamma"] = mx.contiguous(case["gamma"].T).T
    case["rows"] = mx.contiguous(case["rows"][..., ::-1])[..., ::-1]
    case["weights"] = tuple(mx.contiguous(w.swapaxes(2, 3)).swapaxes(2, 3) for w in case["weights"])
    assert_agrees(PUBLIC[kind](**case), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "rounding"), [(mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
def test_half_precision_is_float32_inside(kind, dtype, rounding, spy):
    case = make_case(kind, T=21, phase=[3], dtype=dtype)
    y, weights, rows = PUBLIC[kind](**case)
    assert spy.taken() == {"update"}
    y_expected, weights_expected, rows_expected = REFERENCE[kind](**case)
    assert y.dtype == dtype
    assert {x.dtype for x in (*weights, rows)} == {mx.float32}
    assert_agrees((y_expected, weights, rows), (y_expected, weights_expected, rows_expected))
    assert relative_error(y, y_expected) <= rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("phase", "lengths"), [([0, 2], None), ([1, 4], [19, 6])])
def test_gradients_are_those_of_the_dual_form(kind, phase, lengths, spy):
    case = make_case(kind, B=2, T=20, H=1, K=5, phase=phase, lengths=lengths)

    def gradients(rule):
        def function(arrays, weights):
            arguments = case | dict(zip(ARRAYS, arrays, strict=True)) | {"weights": tuple(weights)}
            return scalar(*rule(**arguments), lengths)

        value, grads = mx.value_and_grad(function, argnums=(0, 1))([case[n] for n in ARRAYS], list(case["weights"]))
        return [value, *grads[0], *grads[1]]

    found = gradients(PUBLIC[kind])
    assert spy.taken() == {"update"}
    for x, expected in zip(found, gradients(DUAL[kind]), strict=True):
        assert relative_error(x, expected) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_while_it_is_traced_it_is_the_dual_form(kind, spy, tmp_path):
    """By mx.vmap; by mx.compile or, without waiting for a C++ compiler, to be exported."""
    case = make_case(kind, T=20, phase=[3])
    expected = REFERENCE[kind](**case)

    def function(q):
        y, weights, rows = PUBLIC[kind](**(case | {"q": q}))
        return [y, *weights, rows]

    file = str(tmp_path / "update.mlxfn")
    mx.export_function(file, function, case["q"])
    y, *weights, rows = mx.import_function(file)(case["q"])
    assert_agrees((y, weights, rows), expected)
    y = mx.vmap(lambda q: function(q)[0])(mx.stack([case["q"], -case["q"]]))
    assert relative_error(y[0], expected[0]) <= 1e-5
    assert relative_error(y[1], REFERENCE[kind](**(case | {"q": -case["q"]}))[0]) <= 1e-5
    assert not spy.taken()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "D"), [(20, 12), (20, 4), (15, 8), (0, 8)])
def test_few_tokens_and_heads_of_odd_sizes_are_left_to_the_dual_form(kind, T, D, spy):
    case = make_case(kind, T=T, D=D, phase=[3])
    assert_agrees(PUBLIC[kind](**case), DUAL[kind](**case))
    assert not spy.taken()
