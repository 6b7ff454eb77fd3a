"""What the learner shows, as the kernels give it out: the definition's, and nothing else changes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.backends.metal import rule
from mlx_ttt.network import reference
from mlx_ttt.network.dual import observe, observed_dual_form, update

from ...models import KINDS
from ...network.cases import Sizes, relative_error
from .cases import kernel_case


def check(kernels, case) -> None:
    if kernels is not None:  # the padding of TTT-MLP's workspace is never written, where that is device memory
        D, K = case.tokens.q.shape[-1], case.learner.mini_batch_size
        kernels.allow_unwritten = case.kind == "mlp" and rule._scratch(D, K) > 0
    y, state, signals = observe(*case)
    *_, expected = reference.observe(*case)
    for name, x, x_expected in zip(signals._fields, signals, expected, strict=True):
        assert x.dtype == mx.float32 and relative_error(x, x_expected) <= 1e-5, name
    y_plain, plain = update(*case)
    for x, x_plain in zip((y, *state.weights, state.rows), (y_plain, *plain.weights, plain.rows), strict=True):
        assert np.array_equal(np.array(x.astype(mx.float32)), np.array(x_plain.astype(mx.float32)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "phase"), [(1, [0, 3]), (1, [4, 2]), (2, [3, 4]), (5, [0, 0]), (9, [1, 4])])
def test_every_form_and_phase(kernels, kind, T, phase):
    check(kernels, kernel_case(kind, sizes=Sizes(D=16, K=5), phase=phase, T=T))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[11, 3, 0], [2, 11, 8]])
def test_padding_shows_nothing(kernels, kind, lengths):
    check(kernels, kernel_case(kind, phase=[0, 3, 7], T=11, lengths=lengths))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "K", "dtype"), [(32, 16, mx.float16), (64, 16, mx.bfloat16)])
def test_sizes(kernels, kind, D, K, dtype):
    check(kernels, kernel_case(kind, sizes=Sizes(H=1, D=D, K=K), dtype=dtype, phase=[K - 1], T=K + 3))
    check(kernels, kernel_case(kind, sizes=Sizes(H=1, D=D, K=K), dtype=dtype, phase=[K - 2], T=1))


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", rule.HEAD_DIMENSIONS)
@pytest.mark.parametrize("K", [1, 16, 17, 32])
def test_all_sizes(kernels, kind, D, K, tiles, monkeypatch):
    if kind == "linear" and D == 128 and K > 24 and tiles == 1:
        pytest.skip("does not fit threadgroup memory, and is never used")
    monkeypatch.setattr(rule, "_tiles", lambda variant: tiles)
    check(kernels, kernel_case(kind, sizes=Sizes(H=1, D=D, K=K), phase=[K - 1], T=K + 3))
    if K > 1:
        check(kernels, kernel_case(kind, sizes=Sizes(H=1, D=D, K=K), phase=[K - 2], T=1))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_one_launch(launches, kind):
    for T, form in ((1, "step"), (9, "chunk")):
        mx.eval(observe(*kernel_case(kind, phase=[2], T=T)))
        assert launches.names[-1].startswith(f"ttt_{kind}_{form}_shown")
    assert len(launches.names) - sum("_shown" not in name for name in launches.names) >= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 9])
def test_gradients_are_those_of_mlx_operations(with_scratch, kind, T):
    case = kernel_case(kind, phase=[2], T=T)

    def gradient(rule):
        def of(q, v):
            y, state, signals = rule(*case.changed("q", q).changed("v", v))
            return y.sum() + state.rows.square().sum() + sum(x.sum() for x in signals)

        return mx.grad(of, argnums=(0, 1))(case.tokens.q, case.tokens.v)

    for found, expected in zip(gradient(observe), gradient(observed_dual_form.in_mlx), strict=True):
        assert relative_error(found, expected) <= 1e-5
