"""Wrong arguments are named before anything runs."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_ttt.update import ttt_linear, ttt_linear_step, ttt_mlp, ttt_mlp_step

from .cases import make_case

RULES = {"linear": ttt_linear, "mlp": ttt_mlp}
STEPS = {"linear": ttt_linear_step, "mlp": ttt_mlp_step}


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("q", lambda q: q[0]),
        ("k", lambda k: k[:, :-1]),
        ("v", lambda v: v[..., :-2]),
        ("lr", lambda lr: lr[..., None]),
        ("t", lambda t: t[None]),
        ("t", lambda t: t[:0]),
        ("t", lambda t: t.astype(mx.float16)),
        ("gamma", lambda gamma: gamma[0]),
        ("beta", lambda beta: beta.T),
        ("beta", lambda beta: beta.astype(mx.bfloat16)),
        ("rows", lambda rows: rows[:, :, :-1]),
        ("rows", lambda rows: rows[..., :-1]),
        ("weights", lambda weights: weights[:1]),
        ("W1", lambda weights: (weights[0].swapaxes(1, 2), *weights[1:])),
        ("b1", lambda weights: (weights[0], weights[1].astype(mx.float16), *weights[2:])),
        ("phase", lambda phase: [8, 0]),
        ("phase", lambda phase: [-1, 0]),
        ("phase", lambda phase: [0]),
        ("lengths", lambda lengths: [6, 0]),
        ("lengths", lambda lengths: [1]),
    ],
)
def test_a_wrong_argument_is_named(kind, name, wrong):
    case = make_case(kind, B=2, T=5, H=3, phase=[1, 2], lengths=[5, 4])
    argument = "weights" if name in ("W1", "b1") else name
    with pytest.raises(ValueError, match=f"^{name} (has|is) "):
        RULES[kind](**(case | {argument: wrong(case[argument])}))


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(
    ("name", "T", "change"),
    [
        ("k", 1, {"k": mx.zeros((2, 1, 3, 6))}),
        ("q", 2, {}),
        ("phase", 1, {"phase": mx.array([1])}),
        ("phase", 1, {"phase": mx.array([[1, 2]])}),
        ("phase", 1, {"phase": mx.array([1, 2], mx.uint32)}),
    ],
)
def test_a_wrong_argument_of_the_step_form_is_named(kind, name, T, change):
    case = make_case(kind, B=2, T=T, H=3, phase=[1, 2]) | {"phase": mx.array([1, 2])} | change
    del case["lengths"]
    with pytest.raises(ValueError, match=f"^{name} has "):
        STEPS[kind](**case)


def test_the_other_inner_models_weights_are_refused():
    linear, mlp = make_case("linear", T=1, phase=[0]), make_case("mlp", T=1, phase=[0])
    with pytest.raises(ValueError, match=r"weights has 4 arrays, expected \(W1, b1\)"):
        ttt_linear(**(linear | {"weights": mlp["weights"]}))
