"""What the tests of the Metal kernels share: cases in which every commit matters, and the bounds."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_ttt.backends.differentiable import Signature

from ...network.cases import BOUND, Case, Sizes, make_case, phases, relative_error

ROUNDING = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # relative error of rounding once
SMALL = Sizes(H=2, D=16, K=8)


def kernel_case(kind: str, *, sizes: Sizes = SMALL, **call) -> Case:
    """A case in which every commit changes the weights: t is never near zero."""
    case = make_case(kind, sizes=sizes, **call)
    learner = replace(case.learner, t=mx.maximum(case.learner.t, 0.5 / sizes.K))
    return case._replace(learner=learner)


def launch_arrays(case: Case) -> list[mx.array]:
    """The arrays of a case in the order of a launch."""
    return Signature.arrays(*case)


def assert_matches(found, expected, case: Case, y_bound: float = BOUND) -> None:
    """(y, state) of a kernel against the definition: each part of the state by itself, and y token by token."""
    (y, state), (y_expected, state_expected) = found, expected
    inner, D = case.learner.inner, y.shape[-1]
    assert y.dtype == case.tokens.q.dtype
    assert {x.dtype for x in (*state.weights, state.rows)} == {mx.float32}
    for name, w, w_expected in zip(inner.weight_names, state.weights, state_expected.weights, strict=True):
        assert relative_error(w, w_expected) <= BOUND, name
    ends = np.cumsum(list(inner.row_widths(D).values()))[:-1].tolist()
    rows = (mx.split(x, ends, axis=-1, stream=mx.cpu) for x in (state.rows, state_expected.rows))
    for name, part, part_expected in zip(inner.row_names, *rows, strict=True):
        assert relative_error(part, part_expected) <= BOUND, name
    assert phases(state) == phases(state_expected)
    _assert_same_y(y, y_expected, case.tokens.counts, y_bound)


def _assert_same_y(y: mx.array, y_expected: mx.array, lengths: list[int], bound: float) -> None:
    """Within one rounding of the dtype, elementwise, besides `bound` in relative L2."""
    found, expected = (np.array(x.astype(mx.float64, stream=mx.cpu)) for x in (y, y_expected))
    assert np.isfinite(found).all()
    for b, n in enumerate(lengths):
        if n == 0:
            continue
        a, e = found[b, :n], expected[b, :n]
        rounding = ROUNDING[y.dtype] * np.abs(e)
        excess = np.maximum(np.abs(a - e) - rounding, 0)
        assert np.linalg.norm(excess) <= bound * np.linalg.norm(e), f"y of sequence {b}"
