"""What the tests of the Metal kernels share: cases in which every commit matters, and the bounds."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_ttt.update import dual, metal, reference

from .cases import make_case, relative_error

KINDS = ("linear", "mlp")
KERNEL = {"linear": metal.ttt_linear, "mlp": metal.ttt_mlp}
DUAL = {"linear": dual.ttt_linear, "mlp": dual.ttt_mlp}
DUAL_STEP = {"linear": dual.ttt_linear_step, "mlp": dual.ttt_mlp_step}
STEP = {"linear": metal.ttt_linear_step, "mlp": metal.ttt_mlp_step}
REFERENCE = {"linear": reference.ttt_linear, "mlp": reference.ttt_mlp}
ROUNDING = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # relative error of rounding once
BOUND = 1e-5


def kernel_case(kind: str, **sizes) -> dict:
    """A case whose commits are never without effect, and whose errors e are as small against k as real ones."""
    case = make_case(kind, **sizes)
    K = case["t"].shape[0]
    return case | {"t": mx.maximum(case["t"], 0.5 / K)}


def tokens_of(case: dict, start: int, end: int) -> dict:
    """The case with some of its tokens."""
    return case | {name: case[name][:, start:end] for name in ("q", "k", "v", "lr")}


def assert_matches(kind: str, found, expected, case: dict, y_bound: float = BOUND) -> None:
    """(y, weights, rows) of a kernel against the definition: each part of the state by itself, and y token by token."""
    y, weights, rows = found
    y_expected, weights_expected, rows_expected = expected
    assert y.dtype == case["q"].dtype
    assert {x.dtype for x in (*weights, rows)} == {mx.float32}
    D = y.shape[-1]
    ends = {"linear": [D], "mlp": [D, 5 * D, 9 * D]}[kind]
    for name, w, w_expected in zip(("W1", "b1", "W2", "b2"), weights, weights_expected, strict=False):
        assert relative_error(w, w_expected) <= BOUND, name
    parts = zip(("k", "e1", "x2", "e2"), mx.split(rows, ends, axis=-1), _split(rows_expected, ends), strict=False)
    for name, part, part_expected in parts:
        assert relative_error(part, part_expected) <= BOUND, name
    _assert_same_y(y, y_expected, case, y_bound)


def _split(x: mx.array, ends: list[int]) -> list[mx.array]:
    return mx.split(x, ends, axis=-1, stream=mx.cpu)


def _assert_same_y(y, y_expected, case, bound) -> None:
    """Within one rounding of the dtype, elementwise, besides `bound` in relative L2."""
    lengths = case["lengths"] or [y.shape[1]] * y.shape[0]
    found, expected = (np.array(x.astype(mx.float64, stream=mx.cpu)) for x in (y, y_expected))
    assert np.isfinite(found).all()
    for b, n in enumerate(lengths):
        if n == 0:
            continue
        a, e = found[b, :n], expected[b, :n]
        rounding = ROUNDING[y.dtype] * np.abs(e)
        excess = np.maximum(np.abs(a - e) - rounding, 0)
        assert np.linalg.norm(excess) <= bound * np.linalg.norm(e), f"y of sequence {b}"
