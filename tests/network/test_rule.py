"""Wrong arguments of the update rule are named before anything runs."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_ttt.network.dual import update

from ..models import KINDS
from .cases import Sizes, make_case

THREE_HEADS = Sizes(H=3)


@pytest.mark.parametrize("kind", KINDS)
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
        ("W1", lambda W1: W1.swapaxes(1, 2)),
        ("b1", lambda b1: b1.astype(mx.float16)),
        ("phase", lambda phase: [8, 0]),
        ("phase", lambda phase: [-1, 0]),
        ("phase", lambda phase: [0]),
        ("lengths", lambda lengths: [6, 0]),
        ("lengths", lambda lengths: [1]),
    ],
)
def test_a_wrong_argument_is_named(kind, name, wrong):
    case = make_case(kind, T=5, sizes=THREE_HEADS, phase=[1, 2], lengths=[5, 4])
    with pytest.raises(ValueError, match=f"^{name} (has|is) "):
        update(*case.changed(name, wrong(case.value(name))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "T", "change"),
    [
        ("k", 1, {"k": mx.zeros((2, 1, 3, 6))}),
        ("q", 2, {}),
        ("q", 1, {"lengths": [1, 1]}),
        ("phase", 1, {"phase": mx.array([1])}),
        ("phase", 1, {"phase": mx.array([[1, 2]])}),
        ("phase", 1, {"phase": mx.array([1, 2], mx.uint32)}),
    ],
)
def test_a_wrong_argument_beside_an_array_as_phase_is_named(kind, name, T, change):
    case = make_case(kind, T=T, sizes=THREE_HEADS, phase=[1, 2]).changed("phase", mx.array([1, 2]))
    for field, value in change.items():
        case = case.changed(field, value)
    with pytest.raises(ValueError, match=f"^{name} has "):
        update(*case)


def test_the_other_inner_models_weights_are_refused():
    linear, mlp = (make_case(kind, T=1, phase=[0]) for kind in KINDS)
    with pytest.raises(ValueError, match=r"weights has 4 arrays, expected \(W1, b1\)"):
        update(*linear.changed("weights", mlp.state.weights))
