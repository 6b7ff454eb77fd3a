"""What the update rule shows of its work, against the definition."""

from __future__ import annotations

import itertools

import mlx.core as mx
import pytest

from mlx_ttt.network import reference
from mlx_ttt.network.dual import dual_form, observed_dual_form
from mlx_ttt.network.rule import Signals

from ..models import KINDS
from .cases import BOUND, Sizes, assert_agrees, make_case, relative_error

observe = observed_dual_form.in_mlx


def assert_signals_agree(found: Signals, expected: Signals, bound=BOUND) -> None:
    for name, x, x_expected in zip(Signals._fields, found, expected, strict=True):
        assert x.shape == x_expected.shape and x.dtype == mx.float32, name
        assert relative_error(x, x_expected) <= bound, name


def assert_observed(found, expected, lengths=None, bound=BOUND) -> None:
    assert_agrees(found[:2], expected[:2], lengths, bound)
    assert_signals_agree(found[2], expected[2], bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "phase"), [(1, 0), (1, 4), (3, 1), (5, 0), (11, 3), (12, 4)])
def test_from_any_phase(kind, T, phase):
    case = make_case(kind, T=T, sizes=Sizes(K=5), phase=[phase])
    assert_observed(observe(*case), reference.observe(*case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("H", "D", "K"), [(1, 4, 1), (3, 6, 2), (1, 64, 16)])
def test_sizes(kind, H, D, K):
    case = make_case(kind, T=2 * K + 3, sizes=Sizes(H, D, K), phase=[K - 1, K - 1])
    assert_observed(observe(*case), reference.observe(*case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [None, [20, 5, 0], [1, 19, 8], [0, 0, 0]])
def test_tokens_that_do_not_count_show_nothing(kind, lengths):
    case = make_case(kind, T=20, phase=[0, 3, 7], lengths=lengths)
    _, _, signals = observe(*case)
    assert_signals_agree(signals, reference.observe(*case)[2])
    for b, n in enumerate(lengths or []):
        assert not any(x[b, n:].any().item() for x in signals)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_tokens(kind, dtype):
    """The definition gets the very same rounded views."""
    case = make_case(kind, T=19, phase=[2], dtype=dtype)
    assert_signals_agree(observe(*case)[2], reference.observe(*case)[2])


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_is_one_call(kind):
    case = make_case(kind, T=30, phase=[3])
    *_, expected = observe(*case)
    parts, state = [], case.state
    for start, end in itertools.pairwise([0, 1, 5, 6, 19, 30]):
        _, state, signals = observe(*case.part(start, end)._replace(state=state))
        parts.append(signals)
    assert_signals_agree(Signals.joined(parts), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_nothing(kind):
    case = make_case(kind, T=20, phase=[0, 3], lengths=[20, 11])
    (y, state), (y_seen, state_seen, _) = dual_form.in_mlx(*case), observe(*case)
    for x, x_seen in zip((y, *state.weights, state.rows), (y_seen, *state_seen.weights, state_seen.rows), strict=True):
        assert mx.array_equal(x, x_seen)


def test_an_array_as_phase():
    case = make_case("mlp", T=1, phase=[3])
    assert_signals_agree(observe(*case.changed("phase", mx.array([3])))[2], reference.observe(*case)[2])


def test_no_tokens():
    case = make_case("mlp", T=3, phase=[3]).part(0, 0)
    assert [x.shape for x in observe(*case)[2]] == [x.shape for x in reference.observe(*case)[2]] == [(1, 0, 2)] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_where_the_last_token_factor_is_zero(kind):
    case = make_case(kind, T=9, phase=[0])
    t = mx.concatenate([case.learner.t[:-1], mx.zeros(1)])
    loss, _, write_norm = observe(*case.changed("t", t))[2]
    assert loss.all().item() and not write_norm.any().item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_of_the_weights_is_bounded_by_what_the_tokens_write(kind):
    """By the triangle inequality; with a single token it is that."""
    for K in (1, 6):
        case = make_case(kind, T=K, sizes=Sizes(K=K), phase=[0])
        _, state, signals = observe(*case)
        changes = zip(state.weights, case.state.weights, strict=True)
        change = mx.sqrt(sum((new - old).square().sum((-2, -1)) for new, old in changes))  # [B, H]
        bound = signals.write_norm.sum(1)
        assert (change <= bound * 1.0001).all().item()
        assert K > 1 or mx.allclose(change, bound, rtol=1e-4).item()
