"""When a kernel runs and when MLX operations do, how often, and that gradients go through calls with a kernel."""

from __future__ import annotations

import itertools
import logging

import mlx.core as mx
import pytest

from mlx_ttt.backends.differentiable import Signature
from mlx_ttt.backends.metal import rule
from mlx_ttt.network.dual import dual_form, update
from tests.backends.metal.host import trace_call

from ...models import KINDS
from ...network.cases import Sizes, make_case, relative_error, scalar
from .cases import SMALL, assert_matches, kernel_case, launch_arrays


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_one_launch(launches, kind):
    case = kernel_case(kind, T=21, phase=[3, 6], lengths=[21, 9])
    update(*case)  # probes the kernel
    del launches.names[:]
    update(*case)
    assert launches.names == [f"ttt_{kind}_chunk"]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_writes_weights_only_when_a_mini_batch_is_complete(launches, kind):
    case = kernel_case(kind, T=16, phase=[0])
    state = case.state
    update(*case)
    update(*case.part(0, 1))
    del launches.names[:]
    for n in range(16):
        before = state.weights[0]
        _, state = update(*case.part(n, n + 1)._replace(state=state))
        assert state.phase == [(n + 1) % 8]
        assert (state.weights[0] is before) == (n % 8 < 7)
    assert launches.names == ([f"ttt_{kind}_step"] * 7 + [f"ttt_{kind}_chunk"]) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_depends_on_nothing_but_name_and_template(kernels, kind):
    """MLX keeps one compiled kernel for each of these. Two sources would be compiled in turns, again and again."""
    sources = {}
    for B, T, H, dtype in itertools.product((1, 3, 9), (1, 5, 9), (1, 2, 8), (mx.float32, mx.float16)):
        case = kernel_case(kind, T=T, sizes=Sizes(H, D=16, K=5), phase=[1] * B, dtype=dtype)
        variant = rule._Variant(kind, "chunk", 16, 5, dtype)
        kernel, call = rule._call(rule._Kernel(variant, 1), launch_arrays(case), [1] * B, [T] * B)
        source = trace_call(getattr(kernel, "_kernel", kernel), **call)
        assert sources.setdefault(tuple(call["template"]), source) == source


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_adds_one_row_and_changes_no_other(kernels, kind):
    for phase in ([2, 2], [1, 5]):
        case = kernel_case(kind, T=1, phase=phase)
        before = mx.array(case.state.rows)
        _, state = update(*case)
        assert mx.array_equal(case.state.rows, before)  # the caller's rows are what they were
        for b, p in enumerate(phase):
            others = [i for i in range(8) if i != p]
            assert mx.array_equal(state.rows[b][:, others], before[b][:, others])
            assert mx.abs(state.rows[b][:, p]).min() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", [[4], [0, 6, 3], [n % 7 for n in range(9)]])
def test_the_step_form_with_phases_in_an_array(kernels, kind, phase):
    """One launch, with the same result as the call with integers."""
    case = kernel_case(kind, T=1, phase=phase)
    y, state = update(*case)
    if kernels:
        del kernels.names[:]
    with_array = case.changed("phase", mx.array(phase))
    y_step, state_step = update(*with_array)
    assert mx.array_equal(y_step, y)
    assert mx.array_equal(state_step.rows, state.rows)
    assert state_step.phase.tolist() == state.phase
    if kernels:
        assert kernels.names == [f"ttt_{kind}_step"]
    y_expected, state_expected = dual_form.in_mlx(*with_array)
    assert relative_error(y_step, y_expected) <= 1e-5
    assert relative_error(state_step.rows, state_expected.rows) <= 1e-5


def test_the_step_form_falls_back_to_mlx_operations(kernels):
    case = make_case("linear", T=1, sizes=Sizes(D=24), phase=[2]).changed("phase", mx.array([2]))
    (y, state), (y_expected, state_expected) = update(*case), dual_form.in_mlx(*case)
    assert mx.array_equal(y, y_expected)
    assert mx.array_equal(state.rows, state_expected.rows)


@pytest.mark.parametrize(
    ("sizes", "call"),
    [
        pytest.param(Sizes(D=24), {}, id="head dimension"),
        pytest.param(Sizes(D=16, K=33), {}, id="mini-batch"),
        pytest.param(SMALL, {"dtype": mx.float64}, id="dtype"),
        pytest.param(SMALL, {"T": 0}, id="no tokens"),
    ],
)
def test_what_no_kernel_supports_goes_to_mlx_operations_with_a_debug_log(kernels, caplog, sizes, call):
    with mx.stream(mx.cpu), caplog.at_level(logging.DEBUG, "mlx_ttt.backends.metal.rule"):
        case = make_case("linear", sizes=sizes, phase=[2], **({"T": 3} | call))
        y, _ = update(*case)
        assert mx.array_equal(y, dual_form.in_mlx(*case)[0])
    assert ["no kernel for" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["step", "chunk"])
def test_gradients_are_those_of_mlx_operations(with_scratch, kind, form):
    case = kernel_case(kind, T=1 if form == "step" else 7, phase=[2, 5])

    def gradient(rule):
        return mx.grad(lambda arrays: scalar(*rule(*case.with_arrays(arrays))))(case.arrays)

    for name, g, g_expected in zip(case.names, gradient(update), gradient(dual_form.in_mlx), strict=True):
        assert relative_error(g, g_expected) <= 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", [mx.compile, mx.checkpoint])
def test_the_gradient_survives_compile_and_checkpoint(instead_of_kernels, kind, transform):
    """With operations in the place of the kernel, since launches on the host cannot be traced."""
    case = kernel_case(kind, T=7, phase=[2, 5])

    def operations(*arrays):
        y, state = dual_form.in_mlx(*Signature(*case).arguments(arrays))
        return [y, *state.weights, state.rows]

    def launch(kernel, arrays, phase, lengths):
        if kernel.variant.form == "chunk":
            return operations(*arrays)
        arrays, cotangents = arrays[: len(case.arrays)], arrays[len(case.arrays) :]
        found = mx.vjp(operations, arrays, cotangents)[1]
        shares = [
            mx.broadcast_to(g / (2 * n), (2, 2, g.shape[-1])) for g, n in zip(found[4:7], (2, 1, 1), strict=True)
        ]  # of 2 sequences and 2 heads
        return [*found[:4], mx.concatenate(shares, axis=-1), *found[7:]]

    instead_of_kernels(launch)

    def of(rule, q):
        y, state = rule(*case.changed("q", q))
        return (y * mx.sin(mx.arange(y.size).reshape(y.shape))).sum() + state.weights[0].sum() + state.rows.sum()

    found = mx.grad(transform(lambda q: of(update, q)))(case.tokens.q)
    assert relative_error(found, mx.grad(lambda q: of(dual_form.in_mlx, q))(case.tokens.q)) <= 1e-6


# ---- A device that refuses ------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(kernels, monkeypatch):
    """Makes every launch with one of the given numbers of tiles fail as a device without enough registers does."""
    launch = rule._launch

    def of(*tiles):
        def refusing(kernel, *args):
            if kernel.tiles in tiles:
                raise ValueError("[metal::Device] Thread group size (64) is greater than the maximum allowed")
            return launch(kernel, *args)

        rule._tiles.cache_clear()
        monkeypatch.setattr(rule, "_launch", refusing)

    yield of
    rule._tiles.cache_clear()


@pytest.mark.parametrize("kind", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("T", [1, 7])
def test_a_refused_kernel_runs_with_a_smaller_threadgroup(refuse, kind, T, recwarn):
    refuse(1)
    case = kernel_case(kind, T=T, phase=[2])
    for _ in range(3):
        found = update(*case)
    assert_matches(found, dual_form.in_mlx(*case), case)
    assert [str(w.message).partition(" (")[0] for w in recwarn] == [
        f"Metal kernel ttt_{kind}_{'step' if T == 1 else 'chunk'} for D = 16, K = 8, mlx.core.float32 does not run "
        "on this device: using a smaller threadgroup"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_refused_twice_is_served_by_mlx_operations(refuse, kind, recwarn):
    refuse(1, 2)
    case = kernel_case(kind, T=7, phase=[2])
    for _ in range(3):
        y, _ = update(*case)
    assert mx.array_equal(y, dual_form.in_mlx(*case)[0])
    assert len(recwarn) == 1
    assert "using MLX operations" in str(recwarn[0].message)


# ---- Whether there are kernels at all -------------------------------------------------------------------------------


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert rule.available()
    monkeypatch.setenv("MLX_TTT_KERNELS", "0")
    assert not rule.available()


def test_no_kernels_on_the_cpu(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert not rule.available()


def test_no_kernels_without_metal(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert not rule.available()


def test_the_metal_files_are_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    package = tmp_path / "mlx_ttt"
    module = package / "backends" / "metal" / "rule.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(rule, "__file__", str(module))
    with pytest.raises(FileNotFoundError, match="reinstall mlx-ttt"):
        rule.metal_dir()
    for folder in (tmp_path / "metal", package / "metal"):
        folder.mkdir()
        (folder / "ttt.h").touch()
        assert rule.metal_dir() == folder
