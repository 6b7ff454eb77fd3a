"""The kernels around the update rule of one token, against the formulas of network/model.py in float32 and more."""

from __future__ import annotations

import re
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ttt.backends.metal import layer, rule
from mlx_ttt.backends.metal.layer import Part
from mlx_ttt.network.model import TTT, Conv, LayerNorm, RMSNorm
from tests.backends.metal.host import CompileError, HostKernel, KernelError, check_source, trace_call
from tests.backends.metal.host.lint import lint

from ...models import configuration
from .cases import ROUNDING

NAMES = ("conv_norm", "add_norm", "gated_norm", "views", "views_conv", "turned", "turned_conv")
T = 11  # tokens of a prompt


class Case:
    """A call of a kernel: its layers with random parameters, and arrays."""

    def __init__(self, name: str, *, H: int = 2, D: int = 16, K: int = 8, N: int = 3, B: int = 2, dtype=mx.float32):
        self.name, self.H, self.D, self.K, self.N, self.B, self.dtype = name, H, D, K, N, B, dtype
        flags = "111" if name not in ("views", "turned") else "000"
        sizes = {"hidden_size": H * D, "num_attention_heads": H, "mini_batch_size": K, "conv_kernel": N + 1}
        args = configuration("linear", flags, **sizes)
        self.key = mx.random.key(7)
        self.layers: dict = {"ttt": TTT(args), "conv": Conv(args), "norm": RMSNorm(H * D, eps=1e-3)}
        self.layers["layer_norm"] = LayerNorm(H * D, eps=1e-2)
        for module in self.layers.values():
            kept = ("learnable_", "ttt_norm")
            for path, x in _flat(module):
                value = self.normal(*x.shape) * (0.5 if x.ndim > 1 else 0.3) + ("norm" in path and "bias" not in path)
                _put(module, path, value if path.startswith(kept) else value.astype(dtype))

    def normal(self, *shape: int) -> mx.array:
        self.key, key = mx.random.split(self.key)
        return mx.random.normal(shape, key=key)

    def arrays(self, phase: list[int]) -> dict[str, mx.array]:
        """What a call reads. Products lie side by side in one array, in an order of their own."""
        C = self.H * self.D
        shapes = {"x": (self.B, 1, C), "added": (self.B, 1, C), "history": (self.B, self.N, C)}
        shapes["products"] = (self.B, 1, 3 * C)
        shapes |= {"q": (self.B, T + self.N * (self.name == "turned_conv"), C), "k": (self.B, T, C)}
        found = {name: self.normal(*shape).astype(self.dtype) for name, shape in shapes.items()}
        return found | {"phase": mx.array(phase + [0] * max(rule.SMALL - len(phase), 0), mx.int32)}

    def call(self, arrays: dict[str, mx.array]) -> list[mx.array]:
        C, of = self.H * self.D, self.layers
        if self.name == "conv_norm":
            return layer.conv_norm(arrays["x"], arrays["history"], of["conv"], of["norm"])
        if self.name == "add_norm":
            return layer.add_norm(arrays["x"], arrays["added"], of["norm"])
        if self.name == "gated_norm":
            return [layer.gated_norm(arrays["x"], Part(arrays["products"], C, 2 * C), of["layer_norm"])]
        if self.name.startswith("turned"):
            k = arrays["k"] if self.name == "turned" else None
            return list(layer.turned(of["ttt"], arrays["q"], k, arrays["phase"][: self.B].tolist()))
        parts = [Part(arrays["products"], i * C, (i + 1) * C) for i in (1, 0, 2)]
        history = arrays["history"] if self.name == "views_conv" else None
        tokens, t, history = layer.views(of["ttt"], arrays["x"], parts, history, arrays["phase"])
        return [tokens.q, tokens.k, tokens.v, tokens.lr, t, *([] if history is None else [history])]

    def expected(self, arrays: dict[str, mx.array]) -> list[np.ndarray]:
        """The same by numpy in float64, from the formulas."""
        of, exact = self.layers, {name: _exact(x) for name, x in arrays.items()}
        x, C = exact["x"], self.H * self.D
        if self.name == "conv_norm":
            conv = of["conv"]
            inputs = np.concatenate([exact["history"], _rounded(_rms(x, conv.norm), self.dtype)], axis=1)
            x = x + _conv(inputs, conv.conv)
            return [x, _rms(_rounded(x, self.dtype), of["norm"]), inputs[:, 1:]]
        if self.name == "add_norm":
            x = x + exact["added"]
            return [x, _rms(_rounded(x, self.dtype), of["norm"])]
        if self.name == "gated_norm":
            norm, gate = of["layer_norm"], exact["products"][..., C : 2 * C]
            centred = x - x.mean(-1, keepdims=True)
            scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps)
            y = centred * scale * _exact(norm.weight) + _exact(norm.bias)
            return [y * gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))]
        if self.name.startswith("turned"):
            return self._expected_turned(exact)
        return self._expected_views(exact)

    def _expected_turned(self, exact: dict[str, np.ndarray]) -> list[np.ndarray]:
        ttt, q, k = self.layers["ttt"], exact["q"], exact["k"]
        if self.name == "turned_conv":
            windows = [q[:, i : i + self.N + 1] for i in range(T)]
            q, k = (np.concatenate([_conv(w, conv) for w in windows], axis=1) for conv in (ttt.conv_q, ttt.conv_k))
        phase = (exact["phase"][: self.B, None] + np.arange(T)) % self.K
        return [self._rotated(q, phase), self._rotated(k, phase)]

    def _rotated(self, z: np.ndarray, phase: np.ndarray) -> np.ndarray:
        """z [B, T, C] by the phases [B, T]: [B, T, H, D]"""
        angles = phase[..., None] * 500.0 ** (-np.arange(0, self.D, 2) / self.D)  # [B, T, D / 2]
        z = z.reshape(*phase.shape, self.H, self.D // 2, 2)
        z = (z[..., 0] + 1j * z[..., 1]) * np.exp(1j * angles)[:, :, None]
        return np.stack([z.real, z.imag], axis=-1).reshape(*phase.shape, self.H, self.D)

    def _expected_views(self, exact: dict[str, np.ndarray]) -> list[np.ndarray]:
        ttt, (C, H, D) = self.layers["ttt"], (self.H * self.D, self.H, self.D)
        k, q, v = (exact["products"][..., i * C : (i + 1) * C] for i in range(3))
        histories = []
        if self.name == "views_conv":
            inputs = np.concatenate([exact["history"], q], axis=1)
            q, k, histories = _conv(inputs, ttt.conv_q), _conv(inputs, ttt.conv_k), [inputs[:, 1:]]
        phase = exact["phase"][: self.B, None]
        gate = exact["x"] @ _exact(ttt.learnable_ttt_lr_weight)[:, 0].T + _exact(ttt.learnable_ttt_lr_bias)[:, 0]
        t = np.maximum(1 / np.arange(1, self.K + 1) + _exact(ttt.learnable_token_idx), 0)
        lr = 0.7 / D / (1 + np.exp(-gate))
        return [self._rotated(q, phase), self._rotated(k, phase), v.reshape(self.B, 1, H, D), lr, t, *histories]


def _flat(module) -> list:
    return tree_flatten(module.parameters())


def _put(module, path: str, value: mx.array) -> None:
    *way, name = path.split(".")
    for step in way:
        module = module[step]
    module[name] = value


def _exact(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _rounded(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return _exact(mx.array(x.astype(np.float32)).astype(dtype))


def _rms(x: np.ndarray, norm) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * _exact(norm.weight)


def _conv(inputs: np.ndarray, conv) -> np.ndarray:
    return (inputs * _exact(conv.weight)[..., 0].T).sum(1, keepdims=True) + _exact(conv.bias)


def check(case: Case, phase: list[int] | None = None) -> None:
    arrays = case.arrays(phase or [(3 * b + 5) % case.K for b in range(case.B)])
    found, expected = case.call(arrays), case.expected(arrays)
    assert len(found) == len(expected)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        of_tokens = case.name.startswith("views") and i in (3, 4)  # learning rates, token factors
        assert x.dtype == (mx.float32 if of_tokens else case.dtype)
        assert x.shape == y.shape
        # One rounding of the dtype, or two where what was rounded is read again, whose error a norm spreads.
        rounding = 0.0 if of_tokens else 2.01 * ROUNDING[case.dtype]
        assert (np.abs(_exact(x) - y) <= rounding * np.abs(y) + (rounding + 2e-6) * np.abs(y).max()).all(), i


@pytest.mark.parametrize("name", NAMES)
def test_formulas(kernels, name):
    check(Case(name))


SIZES = [
    {"H": 3, "D": 32, "K": 1, "N": 1, "B": 1},
    {"H": 9, "D": 64, "K": 16, "N": 3, "B": 9, "dtype": mx.float16},
    {"H": 12, "D": 64, "K": 16, "N": 3, "B": 1, "dtype": mx.bfloat16},
    {"H": 3, "D": 96, "K": 32, "N": 7, "B": 3, "dtype": mx.float16},
    {"H": 16, "D": 96, "K": 16, "N": 3, "B": 1, "dtype": mx.bfloat16},
    {"H": 1, "D": 16, "K": 5, "N": 2, "B": 3},
    {"H": 17, "D": 128, "K": 32, "N": 3, "B": 1, "dtype": mx.float16},
    {"H": 33, "D": 128, "K": 16, "N": 3, "B": 1},  # more than 4096 channels: the threads hold more than four each
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_sizes_and_dtypes(kernels, name, sizes):
    check(Case(name, **sizes))


def test_every_phase(kernels):
    for phase in range(8):
        check(Case("views", B=1), [phase])


def test_half_precision(kernels):
    check(Case("conv_norm", dtype=mx.float16))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formulas_in_mlx(kernels, monkeypatch, name):
    case = Case(name)
    arrays = case.arrays([2, 5])
    phase = arrays.pop("phase")
    arrays = {name: x for name, x in arrays.items() if name[0] not in "qk" or case.name.startswith("turned")}

    def of(arrays: dict[str, mx.array]) -> mx.array:
        outputs = case.call(arrays | {"phase": phase})
        return sum((x * mx.sin(mx.arange(x.size).reshape(x.shape))).sum() for x in outputs)

    found = mx.grad(of)(arrays)
    monkeypatch.setattr(layer, "_runs", lambda *call: False)  # so the twins
    for which, expected in mx.grad(of)(arrays).items():
        assert mx.allclose(found[which], expected, rtol=1e-4, atol=1e-5), which


def test_a_refused_kernel_is_computed_by_mlx_operations(kernels, monkeypatch, recwarn):
    def refusing(*call):
        raise RuntimeError("[metal::Device] Unable to load kernel")

    layer._runs.cache_clear()
    monkeypatch.setattr(layer, "_launch", refusing)
    for _ in range(2):
        check(Case("add_norm"))
    assert [str(w.message).partition(" (")[0] for w in recwarn] == [
        "Metal kernel ttt_add_norm for C = 32, mlx.core.float32 does not run on this device: using MLX operations"
    ]
    layer._runs.cache_clear()


# ---- The source ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch) -> Callable[[Case], tuple]:
    """The kernel and the arguments of a case's call, which is not made."""

    def of(case: Case) -> tuple:
        calls: list = []

        def put(call, arrays, outputs):
            calls.append(layer._arguments(call, arrays, outputs))
            return [mx.zeros(x.shape, x.dtype) for x in outputs]

        monkeypatch.setattr(layer, "_runs", lambda *call: True)
        monkeypatch.setattr(layer, "_launch", put)
        case.call(case.arrays([1] * case.B))
        return calls[0]

    return of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"D": 16, "K": 5, "dtype": mx.float16}, marks=pytest.mark.slow),
        pytest.param({"H": 12, "D": 64, "K": 16, "B": 1}, marks=pytest.mark.slow),
        {"H": 9, "D": 128, "K": 32, "N": 7, "dtype": mx.bfloat16},
    ],
    ids=str,
)
def test_metal_would_accept_it(recorded, name, sizes):
    kernel, call = recorded(Case(name, **sizes))
    source = trace_call(getattr(kernel, "_kernel", kernel), **call)
    check_source(source)
    assert lint(source) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_source_depends_on_nothing_but_name_and_template(recorded, name):
    """MLX keeps one compiled kernel for each of these. Two sources would be compiled in turns, again and again."""
    sources: dict = {}
    for B in (1, 3, 9):
        for H in (1, 2, 8):
            for dtype in (mx.float32, mx.float16):
                kernel, call = recorded(Case(name, H=H, B=B, dtype=dtype))
                source = trace_call(getattr(kernel, "_kernel", kernel), **call)
                assert sources.setdefault(tuple(call["template"]), source) == source


# What changes, in which kernel, from, to, and which occurrence.
MUTATIONS = {
    "no barrier in a sum": ("conv_norm", "threadgroup_barrier(mem_flags::mem_threadgroup);", ";", 0),
    "no barrier in a sum over heads": ("views", "threadgroup_barrier(mem_flags::mem_threadgroup);", ";", 0),
    "no barrier in a sum of a gated norm": ("gated_norm", "threadgroup_barrier(mem_flags::mem_threadgroup);", ";", 0),
    "no barrier in a sum of a residual": ("add_norm", "threadgroup_barrier(mem_flags::mem_threadgroup);", ";", 0),
    "two sums in one place": ("conv_norm", "memory + Row::SIMDGROUPS, simdgroup", "memory, simdgroup", 0),
    "two sums of a gated norm in one place": (
        "gated_norm",
        "memory + Row::SIMDGROUPS, simdgroup",
        "memory, simdgroup",
        1,
    ),
    "eps of the other norm": ("conv_norm", "eps[1]", "eps[0]", 0),
    "no residual": ("conv_norm", "T(values[i] + convolved", "T(convolved", 0),
    "taps in reverse": ("conv_norm", "float(taps[j])", "float(taps[N - 1 - j])", 0),
    "history of the next token": ("conv_norm", "history[(j + 1) * stride]", "history[j * stride]", 0),
    "no bias": ("views_conv", "float(conv_k_bias[c])", "0.0f", 0),
    "k as q": ("views_conv", "conv_k + c * (N + 1)", "conv_q + c * (N + 1)", 0),
    "rotated the other way": ("views", "float2(x.y, x.x) * sin", "-float2(x.y, x.x) * sin", 0),
    "phase of another sequence": ("views", "p = phase[sequence]", "p = phase[sequence ^ 1]", 0),
    "gate of another head": ("views", "lr_weight += size_t(head) * C", "lr_weight += size_t(head ^ 1) * C", 0),
    "no bias of the learning rate": ("views", "(gate + lr_bias[head])", "(gate)", 0),
    "a token factor below zero": ("views", "max(1.0f / (i + 1) + token_idx[i], 0.0f)", "1.0f / (i + 1)", 0),
    "variance about zero": ("gated_norm", "values[i] -= mean", "values[i] -= 0 * mean", 0),
    "no gate": ("gated_norm", "* gelu(float(gate[c])).value", "", 0),
    "a prompt's phase": ("turned", "(phase[sequence] + token) % K", "token % K", 0),
    "a prompt's phase past a mini-batch": (
        "turned",
        "(phase[sequence] + token) % K",
        "min(phase[sequence] + token, K - 1)",
        0,
    ),
    "a prompt's keys by the queries' taps": ("turned_conv", "C, conv_k + channel", "C, conv_q + channel", 0),
    "a token later in a prompt": ("turned_conv", "length + token) * C;  // of", "length + token + 1) * C;  // of", 0),
    "another sequence of a prompt": ("turned", "size_t(sequence) * tokens + token", "size_t(0) * tokens + token", 0),
    "nothing added": ("add_norm", "float(x[c]) + float(added[c])", "float(x[c])", 0),
}
FAST = ("no barrier in a sum", "rotated the other way")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MUTATIONS])
def test_what_is_wrong_is_caught(kernels, monkeypatch, name):
    """Rows of 160 channels are two simdgroups wide, so that sums cross simdgroups."""
    if kernels is None:
        pytest.skip("the host compiles mutants; a device need not")
    kernel, old, new, occurrence = MUTATIONS[name]
    original = rule.metal_source
    source = original("ttt_token.metal")
    at = [m.start() for m in re.finditer(re.escape(old), source)][occurrence]
    mutant = source[:at] + new + source[at + len(old) :]
    monkeypatch.setattr(rule, "metal_source", lambda file: mutant if file == "ttt_token.metal" else original(file))
    layer._compiled.cache_clear()
    layer._runs.cache_clear()
    try:
        check(Case(kernel, H=10))
    except CompileError:
        raise
    except (AssertionError, KernelError):
        return
    finally:
        layer._compiled.cache_clear()
        layer._runs.cache_clear()
    pytest.fail("not caught")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_schedule_gives_the_same_bits(launches, name):
    """The harness also reports a race under each of them."""
    case = Case(name, H=10)
    arrays, results = case.arrays([1, 4]), []
    for launches.seed in range(6):
        results.append([np.array(x).tobytes() for x in case.call(arrays)])
    launches.seed = 0
    assert all(result == results[0] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_thread_sanitizer_reports_nothing(recorded, name):
    kernel, call = recorded(Case(name, H=10))
    host = HostKernel.from_mlx(getattr(kernel, "_kernel", kernel), **call)
    for seed in range(3):
        assert host.thread_sanitizer(seed=seed) == []
