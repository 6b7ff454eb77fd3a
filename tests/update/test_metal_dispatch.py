"""When a kernel runs and when dual.py does, how often, and what a call with a kernel in it is worth to autodiff."""

from __future__ import annotations

import itertools
import logging

import mlx.core as mx
import pytest

from mlx_ttt.update import dual, metal
from tests.metal_host import trace_call

from .cases import make_case, relative_error
from .metal_cases import DUAL, DUAL_STEP, KERNEL, KINDS, STEP, assert_matches, kernel_case, tokens_of


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_one_launch(launches, kind):
    case = kernel_case(kind, B=2, T=21, H=2, D=16, K=8, phase=[3, 6], lengths=[21, 9])
    KERNEL[kind](**case)  # probes the kernel
    del launches.names[:]
    KERNEL[kind](**case)
    assert launches.names == [f"ttt_{kind}_chunk"]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_writes_weights_only_when_a_mini_batch_is_complete(launches, kind):
    case = kernel_case(kind, T=16, H=2, D=16, K=8, phase=[0])
    state = {"weights": case["weights"], "rows": case["rows"]}
    KERNEL[kind](**case)
    KERNEL[kind](**tokens_of(case, 0, 1))
    del launches.names[:]
    for n in range(16):
        before = state["weights"]
        _, state["weights"], state["rows"] = KERNEL[kind](**(tokens_of(case, n, n + 1) | state | {"phase": [n % 8]}))
        assert (state["weights"] is before) == (n % 8 < 7)
    assert launches.names == ([f"ttt_{kind}_step"] * 7 + [f"ttt_{kind}_chunk"]) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_depends_on_nothing_but_name_and_template(kernels, kind):
    """MLX keeps one compiled kernel for each; a second source under the same ones would be compiled again and again."""
    sources = {}
    for B, T, H, dtype in itertools.product((1, 3, 9), (1, 5, 9), (1, 2, 8), (mx.float32, mx.float16)):
        case = kernel_case(kind, B=B, T=T, H=H, D=16, K=5, phase=[1] * B, dtype=dtype)
        variant = metal._Variant(kind, "chunk", 16, 5, dtype)
        arrays = [case[name] for name in ("q", "k", "v", "lr", "t", "gamma", "beta")]
        kernel, call = metal._call(variant, 1, [*arrays, *case["weights"], case["rows"]], [1] * B, [T] * B)
        source = trace_call(getattr(kernel, "_kernel", kernel), **call)
        assert sources.setdefault(tuple(call["template"]), source) == source


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_appends_one_row_and_touches_no_other(kernels, kind):
    for phase in ([2, 2], [1, 5]):
        case = kernel_case(kind, B=2, T=1, H=2, D=16, K=8, phase=phase)
        before = mx.array(case["rows"])
        _, _, rows = KERNEL[kind](**case)
        assert mx.array_equal(case["rows"], before)  # the caller's rows are what they were
        for b, p in enumerate(phase):
            others = [i for i in range(8) if i != p]
            assert mx.array_equal(rows[b][:, others], before[b][:, others])
            assert mx.abs(rows[b][:, p]).min() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", [[4], [0, 6, 3], [n % 7 for n in range(9)]])
def test_the_step_form_with_phases_in_an_array(kernels, kind, phase):
    """One launch, which is given what the same call with integers is given."""
    case = kernel_case(kind, B=len(phase), T=1, H=2, D=16, K=8, phase=phase)
    y, _, rows = KERNEL[kind](**case)
    arguments = {name: x for name, x in case.items() if name != "lengths"} | {"phase": mx.array(phase)}
    if kernels:
        del kernels.names[:]
    y_step, row = STEP[kind](**arguments)
    assert mx.array_equal(y_step, y)
    assert mx.array_equal(dual.append_row(case["rows"], row, phase), rows)
    if kernels:
        assert kernels.names == [f"ttt_{kind}_step"]
    expected = DUAL_STEP[kind](**arguments)
    assert relative_error(y_step, expected[0]) <= 1e-5
    assert relative_error(row, expected[1]) <= 1e-5


def test_the_step_form_falls_back_to_dual(kernels):
    case = make_case("linear", T=1, D=24, phase=[2])
    arguments = {name: x for name, x in case.items() if name != "lengths"} | {"phase": mx.array([2])}
    for found, expected in zip(STEP["linear"](**arguments), DUAL_STEP["linear"](**arguments), strict=True):
        assert mx.array_equal(found, expected)


def test_the_append_is_in_place(monkeypatch):
    """Decoding holds one copy of the rows, as long as only y is evaluated. In the kernel's place: what reads rows."""

    def launch(variant, tiles, arrays, phase, lengths):
        q, rows = arrays[0], arrays[-1]
        return [q + rows[:, :, :1, : q.shape[-1]].swapaxes(1, 2), rows.sum(axis=2, keepdims=True)]

    monkeypatch.setattr(metal, "_launch", launch)
    monkeypatch.setattr(metal, "_tiles", lambda variant: 1)
    case = kernel_case("linear", T=1, H=64, D=128, K=32, phase=[0])
    rows = case.pop("rows")
    for p in range(6):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        y, _, rows = metal.ttt_linear(**(case | {"rows": rows, "phase": [p]}))
        mx.eval(y)
        if p > 0:  # the first token has the test's inputs to evaluate
            assert mx.get_peak_memory() - before < rows.nbytes / 4


@pytest.mark.parametrize(
    "change",
    [{"D": 24}, {"K": 33}, {"dtype": mx.float64}, {"T": 0}],
    ids=["head dimension", "mini-batch", "dtype", "no tokens"],
)
def test_what_no_kernel_supports_goes_to_dual_with_a_debug_log(kernels, caplog, change):
    sizes = {"D": 16, "K": 8, "T": 3} | change
    with mx.stream(mx.cpu), caplog.at_level(logging.DEBUG, "mlx_ttt.update.metal"):
        case = make_case("linear", phase=[2], **sizes)
        y, _, _ = metal.ttt_linear(**case)
        assert mx.array_equal(y, DUAL["linear"](**case)[0])
    assert ["no kernel for" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["step", "chunk"])
def test_gradients_are_those_of_dual(kernels, kind, form):
    T = 1 if form == "step" else 7
    case = kernel_case(kind, B=2, T=T, H=2, D=16, K=8, phase=[2, 5])
    names = ["q", "k", "v", "lr", "t", "gamma", "beta", "rows"]

    def gradient(rule):
        def scalar(arrays, weights):
            y, new, rows = rule(**(case | dict(zip(names, arrays, strict=True)) | {"weights": tuple(weights)}))
            return sum((x * mx.sin(mx.arange(x.size).reshape(x.shape))).sum() for x in (y, *new, rows))

        return mx.grad(scalar, argnums=(0, 1))([case[name] for name in names], list(case["weights"]))

    found, expected = gradient(KERNEL[kind]), gradient(DUAL[kind])
    labels = [*names, "W1", "b1", "W2", "b2"]
    for name, g, g_expected in zip(labels, (*found[0], *found[1]), (*expected[0], *expected[1]), strict=False):
        assert relative_error(g, g_expected) <= 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", [mx.compile, mx.checkpoint])
def test_the_gradient_survives_compile_and_checkpoint(monkeypatch, kind, transform):
    """With operations in the place of the kernel, whose launches on the host cannot be traced."""
    case = kernel_case(kind, B=2, T=7, H=2, D=16, K=8, phase=[2, 5])

    def launch(variant, tiles, arrays, phase, lengths):
        y, weights, rows = DUAL[kind](*arrays[:7], arrays[7:-1], arrays[-1], phase, lengths)
        return [y, *weights, rows]

    monkeypatch.setattr(metal, "_launch", launch)
    monkeypatch.setattr(metal, "_tiles", lambda variant: 1)

    def scalar(rule, q):
        y, weights, rows = rule(**(case | {"q": q}))
        return (y * mx.sin(mx.arange(y.size).reshape(y.shape))).sum() + weights[0].sum() + rows.sum()

    found = mx.grad(transform(lambda q: scalar(KERNEL[kind], q)))(case["q"])
    assert relative_error(found, mx.grad(lambda q: scalar(DUAL[kind], q))(case["q"])) <= 1e-6


# ---- A device that refuses ------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(kernels, monkeypatch):
    """Makes every launch with one of the given numbers of tiles fail as a device without enough registers does."""
    launch = metal._launch

    def of(*tiles):
        def refusing(variant, n, *args):
            if n in tiles:
                raise ValueError("[metal::Device] Thread group size (64) is greater than the maximum allowed")
            return launch(variant, n, *args)

        metal._tiles.cache_clear()
        monkeypatch.setattr(metal, "_launch", refusing)

    yield of
    metal._tiles.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 7])
def test_a_refused_kernel_runs_with_a_smaller_threadgroup(refuse, kind, T, recwarn):
    refuse(1)
    case = kernel_case(kind, T=T, H=2, D=16, K=8, phase=[2])
    for _ in range(3):
        found = KERNEL[kind](**case)
    assert_matches(kind, found, DUAL[kind](**case), case)
    assert [str(w.message).partition(" (")[0] for w in recwarn] == [
        f"Metal kernel ttt_{kind}_{'step' if T == 1 else 'chunk'} for D = 16, K = 8, mlx.core.float32 does not run "
        "on this device: using a smaller threadgroup"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_refused_twice_is_served_by_dual(refuse, kind, recwarn):
    refuse(1, 2)
    case = kernel_case(kind, T=7, H=2, D=16, K=8, phase=[2])
    for _ in range(3):
        y, _, _ = KERNEL[kind](**case)
    assert mx.array_equal(y, DUAL[kind](**case)[0])
    assert len(recwarn) == 1
    assert "using MLX operations" in str(recwarn[0].message)


# ---- Whether there are kernels at all -------------------------------------------------------------------------------


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert metal.available()
    monkeypatch.setenv("MLX_TTT_KERNELS", "0")
    assert not metal.available()


def test_no_kernels_on_the_cpu(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert not metal.available()


def test_no_kernels_without_metal(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert not metal.available()


def test_the_metal_files_are_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    package = tmp_path / "mlx_ttt"
    (package / "update").mkdir(parents=True)
    monkeypatch.setattr(metal, "__file__", str(package / "update" / "metal.py"))
    with pytest.raises(FileNotFoundError, match="reinstall mlx-ttt"):
        metal.metal_dir()
    for folder in (tmp_path / "metal", package / "metal"):
        folder.mkdir()
        (folder / "ttt.h").touch()
        assert metal.metal_dir() == folder
