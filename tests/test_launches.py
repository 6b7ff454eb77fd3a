"""The counter of launches: against MLX's own graphs where it can run, else against counts derived from its sources.

Places in MLX's sources are those of benchmarks/launches/rules.py, at the commit named there.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks.launches import decoding, graph
from benchmarks.launches.__main__ import main
from benchmarks.launches.count import Tokens, launches
from benchmarks.launches.decoding import Case
from benchmarks.launches.evaluation import Device, drop, order
from benchmarks.launches.fusion import fused
from benchmarks.launches.gpus import GPUS
from benchmarks.launches.graph import record
from benchmarks.launches.memory import peak
from benchmarks.launches.rules import kernel_name
from benchmarks.models import SIZES, configuration
from mlx_ttt.backends.cpu import library
from mlx_ttt.backends.metal import block, decode_step
from mlx_ttt.text.state import PREFILL_STEP_SIZE

M1, M4_MAX, M5 = GPUS
HALF = mx.float16
TINY = SIZES["tiny"]


def ours(kind: str = "TTT-Linear", mamba: bool = True) -> dict:
    return configuration(kind, TINY) | {"pre_conv": mamba, "share_qk": mamba, "use_gate": mamba}


def launched(function, *inputs: mx.array, gpu=M1) -> Counter[str]:
    """For one call of a function of arrays that others hold, too."""
    device = Device(gpu)
    recorded = fused(record(lambda *x: [function(*x)], inputs))
    device.eval(device.call(recorded, [device.array(x.shape, x.dtype) for x in inputs]))
    return device.launches


def total(function, *inputs: mx.array, gpu=M1) -> int:
    return launched(function, *inputs, gpu=gpu).total()


# ---- Products -------------------------------------------------------------------------------------------------------


def product(M: int, K: int, N: int, dtype=HALF) -> list[int]:
    """Launches of x [M, K] with a Linear's weight [N, K], on each GPU."""
    return [total(lambda x, w: x @ w.T, mx.zeros((M, K), dtype), mx.zeros((N, K), dtype), gpu=gpu) for gpu in GPUS]


def test_one_row_is_a_gemv():
    """matmul.cpp:1545: min(M, N) == 1. The weight's columns lie whole: no copy (line 34)."""
    assert product(1, 768, 768) == [1, 1, 1]


def test_few_rows_split_k_on_an_m1_and_are_a_wide_gemv_later():
    """M1, line 925: 1 * 48 tiles of 16 <= 1024, 48 steps of K >= 8, K >= N: two kernels. From generation 15 on, line
    1520: 8 rows of half precision in two passes of five at most: one kernel."""
    assert product(8, 768, 768) == [2, 1, 1]


def test_k_is_not_split_where_there_are_more_columns():
    """Line 926: K >= max(M, N) fails."""
    assert product(8, 768, 2048) == [1, 1, 1]


def test_float32_has_no_wide_gemv():
    """Line 1332: half precision only. M5, line 948: TF32 on NAX, K >= 3 * 12: split."""
    assert product(8, 768, 12, mx.float32) == [2, 2, 2]
    # M5: neither 768 >= 3 * 768 nor 768 > 2 * 768.
    assert product(8, 768, 768, mx.float32) == [2, 2, 1]


def test_too_many_rows_for_a_wide_gemv():
    """Line 1339: 16 rows are four passes. M5, line 949: 768 = 3 * 256."""
    assert product(15, 768, 256) == [2, 1, 1]
    assert product(16, 768, 256) == [2, 2, 2]


def test_a_max_splits_larger_products():
    """Line 921: 2048 tiles on a Max, 1024 on others. 16 rows, 32000 columns: 2000 tiles."""
    assert product(16, 32000, 32000) == [1, 2, 1]


def test_a_dot_product():
    """Line 1507: parts, their sum (one pass, up to 4096: reduce.cpp:349), a copy to the result's dtype."""
    assert product(1, 768, 1) == [3, 3, 3]


def test_a_matrix_that_lies_neither_in_rows_nor_in_columns_is_copied():
    """matmul.cpp:39: every second element of a row. One copy, one gemv."""
    assert total(lambda x, w: x @ w[:, ::2].T, mx.zeros((1, 8)), mx.zeros((16, 16))) == 2


def quantized(M: int, K: int, N: int, bits: int = 4) -> list[int]:
    x, (w, scales, biases) = mx.zeros((M, K), HALF), mx.quantize(mx.zeros((N, K), HALF), bits=bits)

    def function(x, w, scales, biases):
        return mx.quantized_matmul(x, w, scales, biases, bits=bits)

    return [total(function, x, w, scales, biases, gpu=gpu) for gpu in GPUS]


def test_quantized_products():
    """quantized.cpp:1804: up to the limit of rows, a kernel for vectors."""
    assert quantized(1, 2048, 5504) == [1, 1, 1]
    assert quantized(8, 768, 2048) == [1, 1, 1]  # limits 14, 13, 33


def test_quantized_products_of_few_rows_split_k():
    """M1: from 6 rows on, where a side is longer than 4096 (line 120). 64 tiles of columns: 512 / 64 = 8 parts at most,
    each of whole groups of 64: 5504 = 2 * 43 * 64. Two parts, whose sum is one kernel (reduce.cpp:950). Others: limit
    13."""
    assert quantized(8, 5504, 2048) == [2, 1, 1]
    # 1000 tiles of columns: one part.
    assert quantized(8, 5504, 32000) == [1, 1, 1]


# ---- Updates, donation and what the GPU still runs ------------------------------------------------------------------


ROWS = mx.zeros((4, 16, 64))
ROW = mx.zeros((4, 1, 64))


def updating(at: mx.array | None):
    """rows with a new row: at a place that the device knows, or at 3."""

    def function(rows, row, *place):
        if at is not None:
            return [mx.slice_update(rows, row, place[0], (1,))]
        rows = rows[...]
        rows[:, 3:4] = row
        return [rows]

    return fused(record(function, [ROWS, ROW, *([] if at is None else [at])]))


DYNAMIC, STATIC = updating(mx.array([3])), updating(None)


def update(recorded, device: Device, keep: bool, before=None, running: int = 0) -> int:
    """Launches of an update of rows that the caller keeps or not, and that were read before or not."""
    rows, *rest = [device.array(x.shape, x.dtype) for x in recorded.inputs]
    if before is not None:
        device.eval(device.call(before, [rows]))
        device.wait(running)
    device.launches.clear()
    results = device.call(recorded, [rows, *rest])
    if not keep:
        drop(rows)
    device.eval(results)
    return device.launches.total()


def test_a_dynamic_update_of_an_array_that_nobody_else_holds():
    """gpu/primitives.cpp:110: the copy is donated (copy.cpp:15); offset (slicing.cpp:45), new part."""
    assert update(DYNAMIC, Device(M1), keep=False) == 2


def test_a_dynamic_update_of_an_array_that_is_held():
    """Three: the copy, too."""
    assert update(DYNAMIC, Device(M1), keep=True) == 3


def test_a_static_update():
    """indexing.cpp:733: no offset to compute."""
    assert update(STATIC, Device(M1), keep=False) == 1
    assert update(STATIC, Device(M1), keep=True) == 2


@pytest.mark.parametrize(("recorded", "n"), [(STATIC, 1), (DYNAMIC, 2)], ids=["static", "dynamic"])
def test_what_a_running_command_buffer_has_read_is_copied(recorded, n):
    """eval.cpp:47 to 66: it holds the inputs of its operations, so is_donatable fails (array.h:294)."""
    read = fused(record(lambda rows: [rows.square()], [ROWS]))
    assert update(recorded, Device(M1), keep=False, before=read, running=1) == n + 1
    assert update(recorded, Device(M1), keep=False, before=read, running=0) == n


def test_a_view_holds_nothing():
    """A slice's result lies in the same buffer, so its operation does not hold it (eval.cpp:54)."""
    view = fused(record(lambda rows: [rows[:1]], [ROWS]))
    device = Device(M1)
    rows, row = (device.array(x.shape, x.dtype) for x in STATIC.inputs)
    (part,) = device.call(view, [rows])
    device.eval([part])
    drop(part)
    results = device.call(STATIC, [rows, row])
    drop(rows)
    device.eval(results)
    assert device.launches.total() == 1


def test_a_scatter_copies_what_is_held():
    """indexing.cpp:522."""
    index = mx.zeros((4, 1, 64), mx.int32)
    assert total(lambda rows, i, row: mx.put_along_axis(rows, i, row, axis=1), ROWS, index, ROW) == 2


# ---- Kernels of a user ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ensure", "n"), [(True, 2), (False, 1)])
def test_a_kernel_copies_inputs_that_do_not_lie_in_order(ensure, n):
    """custom_kernel.cpp:35"""
    kernel = mx.fast.metal_kernel(
        name="some", input_names=["x"], output_names=["y"], source=" ", ensure_row_contiguous=ensure
    )

    def function(x):
        return kernel(inputs=[x], output_shapes=[(4,)], output_dtypes=[HALF], grid=(1, 1, 1), threadgroup=(1, 1, 1))[0]

    assert total(lambda x: function(x.T), mx.zeros((4, 8))) == n
    assert total(function, mx.zeros((4, 8))) == 1
    assert total(lambda x: function(x.T), mx.zeros((1, 8))) == 1  # a vector lies in order either way


# ---- Copies, reductions, norms ---------------------------------------------------------------------------------------


def test_concatenation_is_a_copy_of_each_input():
    """slicing.cpp:41"""
    assert total(lambda x, y: mx.concatenate([x, y, x]), ROW, ROW) == 3


def test_reshape_copies_only_what_has_no_view():
    """common/common.cpp:109"""
    x = mx.zeros((4, 8))
    assert total(lambda x: x.reshape(8, 4), x) == 0
    assert total(lambda x: x.T.reshape(4, 8), x) == 1
    assert total(lambda x: x.T.reshape(2, 4, 4), x) == 0  # cuts an axis


def test_contiguous():
    """gpu/primitives.cpp:54: in order, and in a buffer that is at most 16 KB larger."""
    assert total(lambda x: mx.contiguous(x[:, 1:4]), mx.zeros((1, 4, 768), HALF)) == 0
    assert total(lambda x: mx.contiguous(x[:, 1:4]), mx.zeros((8, 4, 768), HALF)) == 1
    assert total(lambda x: mx.contiguous(x[:1]), mx.zeros((32, 768), HALF)) == 1


@pytest.mark.parametrize(
    ("shape", "axis", "n"),
    [
        ((16, 256), None, 1),  # 4096: one threadgroup, reduce.cpp:349
        ((17, 256), None, 2),  # more: two passes, line 361
        ((16, 768), 1, 1),  # rows, line 557
        ((16, 768), 0, 1),  # fewer than 32 to a column, line 950
        ((64, 768), 0, 1),  # up to 256, line 961
        ((300, 768), 0, 2),  # two passes, line 961
        ((1024, 8), 0, 2),  # a long column, line 956
    ],
)
def test_reductions(shape, axis, n):
    x = mx.zeros(shape)
    assert total(lambda x: x.sum() if axis is None else x.sum(axis), x) == n


def test_a_reduction_over_axes_in_no_order_copies_first():
    """common/reduce.cpp:29: the elements between two of an axis are not all other axes in order."""
    assert total(lambda x: x.transpose(1, 0, 2)[:, :, ::2].sum(0), mx.zeros((4, 8, 16))) == 2


def test_norms_copy_rows_that_do_not_lie_whole():
    """normalization.cpp:26"""
    w = mx.zeros(8)
    assert total(lambda x, w: mx.fast.rms_norm(x, w, 1e-5), mx.zeros((4, 8)), w) == 1
    assert total(lambda x, w: mx.fast.rms_norm(x.T, w, 1e-5), mx.zeros((8, 4)), w) == 2
    assert total(lambda x: mx.softmax(x.T, axis=-1), mx.zeros((8, 4))) == 2


def test_attention_takes_two_passes_over_many_keys():
    """scaled_dot_product_attention.cpp:875: from 1024 keys on a Max, from 4096 on others if queries share keys."""
    for tokens, expected in ((1000, [1, 1, 1]), (1024, [1, 2, 1]), (4096, [2, 2, 2])):
        q, k = mx.zeros((1, 8, 1, 64), HALF), mx.zeros((1, 2, tokens, 64), HALF)

        def attend(q, k, v):
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)

        assert [total(attend, q, k, k, gpu=gpu) for gpu in GPUS] == expected


def test_attention_of_many_queries_is_one_kernel():
    """scaled_dot_product_attention.cpp:883. The result's heads lie side by side: no copy to put them into rows."""
    q = mx.zeros((1, 8, 40, 64), HALF)

    def attend(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(0, 2, 1, 3).reshape(1, 40, -1)

    assert total(attend, q, q, q) == 1


def test_an_operation_without_a_rule_is_an_error():
    with pytest.raises(Exception, match=r"Sort: no rule"):
        total(mx.sort, mx.zeros(8))


# ---- Fusion ---------------------------------------------------------------------------------------------------------


def chain(x, n: int):
    for _ in range(n):
        x = mx.sin(x)
    return x


def test_a_compiled_chain_is_one_kernel_of_up_to_eleven():
    """compile.cpp:24"""
    x = mx.zeros((4, 8))
    assert total(lambda x: chain(x, 11), x) == 11
    assert total(lambda x: mx.compile(lambda y: chain(y, 11))(x), x) == 1
    assert total(lambda x: mx.compile(lambda y: chain(y, 12))(x), x) == 2


def names_in_mlx(function, inputs) -> Counter[str]:
    """The operations of MLX's own graph of a call."""
    mx.eval(inputs)
    text = io.StringIO()
    mx.export_to_dot(text, *function(*inputs))
    found = re.findall(r'label ?= ?"([^"]*)", shape=rectangle', text.getvalue())
    return Counter(re.sub(r"^(Sum|Max|Min|Prod)\b.*", "Reduce", name.replace("Rsqrt", "Sqrt")) for name in found)


def names_counted(function, inputs) -> Counter[str]:
    operations = fused(record(function, inputs)).operations
    return Counter("Compiled" + "".join(x.arguments[0]) if x.name == "Compiled" else x.name for x in operations)


@pytest.fixture
def as_on_a_cpu(monkeypatch):
    """Norms are traced as MLX traces them here, so that the graphs can be compared."""
    for name in ("rms_norm", "layer_norm"):
        real = getattr(mx.fast, name)
        monkeypatch.setattr(graph._StandIns, f"_{name}", lambda self, *a, real=real, **k: real(*a, **k))
    monkeypatch.setattr(decode_step, "wanted", lambda: True)
    monkeypatch.setattr(library, "c_code", lambda: None)


def step(case: Case):
    """A token of our model as a function, and arrays for it."""
    model = decoding._model(case)
    named = tree_flatten(model.parameters())
    caches = decoding._caches(model, case)
    state = [x + 0 for x in decoding._arrays(caches)]
    function = decoding._Decode(model, [name for name, _ in named], caches)
    return function, [*(x for _, x in named), mx.zeros((case.batch, 1), mx.int32), *state]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["TTT-Linear", "TTT-MLP"])
def test_a_compiled_decode_step_is_fused_as_mlx_fuses_it(as_on_a_cpu, kind, dtype):
    case = Case(ours(kind), dtype=dtype)
    found, expected = names_counted(*step(case)), names_in_mlx(*step(case))
    assert sum(name.startswith("Compiled") for name in expected.elements()) > 20
    assert found == expected


@pytest.mark.parametrize("kind", ["TTT-Linear", "TTT-MLP"])
def test_a_token_that_completes_a_mini_batch_has_the_operations_of_mlx(as_on_a_cpu, kind):
    """Nothing of it is compiled. Merged is only what needs no launch: views that MLX makes several times."""
    case = Case(ours(kind), offset=15)
    found, expected = names_counted(*step(case)), names_in_mlx(*step(case))
    assert not found - expected
    assert set(expected - found) <= {"Broadcast", "Flatten", "Transpose"}


@pytest.mark.parametrize("seed", range(8))
def test_random_functions_are_fused_as_mlx_fuses_them(seed):
    """Elementwise operations, broadcasts and reductions in no sensible order, some of them results."""
    mx.random.seed(seed)
    steps = mx.random.randint(0, 1000, (60, 3)).tolist()
    inputs = [mx.ones((4, 8)), mx.ones((8,)), mx.ones((4, 1)), mx.ones((4, 8))]

    def function(*x):
        values = list(x)
        for what, i, j in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(
                [
                    lambda a, b: a + b,
                    lambda a, b: mx.sin(a),
                    lambda a, b: a * 2.0,
                    lambda a, b: mx.maximum(a, b),
                    lambda a, b: a - a.mean(-1, keepdims=True),
                    lambda a, b: mx.broadcast_to(b, (4, 8)),
                    lambda a, b: mx.where(a > b, a, b),
                ][what % 7](a, b)
            )
        return [values[-i] * (1.5 + i) for i in (1, 7, 20, 33)]  # MLX does not merge a result with what equals it

    found = names_counted(lambda *x: mx.compile(function)(*x), inputs)
    assert found == names_in_mlx(mx.compile(function), inputs)


def wide_sum(*x: mx.array) -> list[mx.array]:
    """In few steps, of more arrays than a kernel reads: so many that a limit of 23 or 25 would make other kernels."""
    values = list(x)
    while len(values) > 1:
        odd = values[-1:] if len(values) % 2 else []
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=False)] + odd
    return values


def result_of_another_shape(x: mx.array, w: mx.array) -> list[mx.array]:
    y = mx.sin(mx.cos(w))
    return [x + y, y, mx.exp(x * 2)]


@pytest.mark.parametrize(
    ("function", "inputs"),
    [(wide_sum, [mx.ones((4, 8))] * 58), (result_of_another_shape, [mx.ones((4, 8)), mx.ones(8)])],
    ids=["wide sum", "result of another shape"],
)
def test_what_ends_a_kernel(function, inputs):
    inputs = [x + i for i, x in enumerate(inputs)]
    found = names_counted(lambda *x: mx.compile(function)(*x), inputs)
    assert found == names_in_mlx(mx.compile(function), inputs)


# ---- Order ----------------------------------------------------------------------------------------------------------


def test_operations_run_in_breadth_at_most_twenty_wide():
    """transforms.cpp:181. 25 chains that end in one operation. Backwards: that, 20 ends (then the limit), their 20
    beginnings, the other 5 ends, their beginnings. What was found last runs first."""

    def function(*x):
        return [mx.concatenate([mx.sin(mx.cos(y)) for y in x])]

    inputs = [mx.zeros((i + 1, 8)) for i in range(25)]
    device = Device(M1)
    results = device.call(record(function, inputs), [device.array(x.shape, x.dtype) for x in inputs])
    names = [x.call.operation.name for x in order(results)]
    assert names == ["Cos"] * 5 + ["Sin"] * 5 + ["Cos"] * 20 + ["Sin"] * 20 + ["Concatenate"]


@pytest.mark.parametrize(("results", "donated"), [(1, True), (2, False)])
def test_an_input_of_a_kernel_with_several_results_is_not_donated(results, donated):
    """array.cpp:42: each result holds the inputs, so that they have more than one holder (array.h:294)."""

    def function(x):
        return mx.compile(lambda x: [mx.cos(mx.sin(x)), mx.sin(x)][:results])(x)

    device = Device(M1)
    x = device.array(ROWS.shape, ROWS.dtype)
    buffer = x.buffer
    found = device.call(fused(record(function, [ROWS])), [x])
    drop(x)
    device.eval(found)
    assert device.launches.total() == 1
    assert any(y.buffer is buffer for y in found) == donated


# ---- Models ---------------------------------------------------------------------------------------------------------


def test_kinds_of_tokens():
    assert list(decoding.kinds(Case(ours(), batch=1))) == ["open mini-batch", "completes one"]
    offsets = [(x.offset, x.ahead) for x in decoding.kinds(Case(ours(), batch=8)).values()]
    assert offsets == [(4, 0), (15, 0), (4, 11)]  # the last: one sequence has 15 of 16


def worst(case: Case, running: int = 1) -> int:
    tokens = Tokens(case)
    return max(tokens.count(gpu, running).layer.total() for gpu in GPUS)


def test_a_transformer_of_mlx_lm():
    """Two norms, seven products, two rotations, attention, two updates, SwiGLU in one kernel, two residuals. While the
    token before is running, keys and values are copied: attention has read them."""
    config = configuration("Transformer", TINY) | {"hidden_size": 256}  # heads of 64, for which there is attention
    count = Tokens(Case(config)).count(M4_MAX, running=0)
    assert count.layer.total() == 17
    assert count.around == Counter({"gather": 1, "RMSNorm": 1, "gemv [1, 256] x [256, 512]": 1})
    assert worst(Case(config)) == 19


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize(("offset", "form"), [(4, "step"), (15, "chunk")])
def test_ours_runs_its_kernel_once_a_layer(kind, offset, form):
    config = ours({"linear": "TTT-Linear", "mlp": "TTT-MLP"}[kind])
    recorded = decoding.token(Case(config, offset=offset)).graph
    kernels = [kernel_name(x.arguments) for x in recorded.operations if x.name == "CustomKernel"]
    around = ["ttt_conv_norm", "ttt_views_conv", f"ttt_{kind}_{form}", "ttt_gated_norm", "ttt_add_norm"]
    assert kernels == around * TINY.layers


@pytest.mark.parametrize(("batch", "offset", "most"), [(1, 4, 12), (1, 15, 12), (8, 15, 16)])
def test_a_token_of_ours_takes_a_dozen_launches(batch, offset, most):
    assert worst(Case(ours(), batch=batch, offset=offset)) <= most


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("mamba", [True, False])
def test_a_prompt_of_ours_takes_at_most_thirty_launches(mamba, batch):
    assert worst(Case(ours(mamba=mamba), batch=batch, tokens=600)) <= (30 if mamba else 20)


def test_the_memory_of_a_prompt():
    """By hand: nine products and what is between them, all of it or what two operations need at a time."""
    few, more = (decoding.token(Case(ours(), tokens=n)) for n in (512, 1024))
    kept_up, weights = peak(few, keeps_up=True)
    not_begun, same_weights = peak(few, keeps_up=False)
    assert weights == same_weights >= sum(x.nbytes for x in few.parameters) - 16384
    row = 512 * 2 * TINY.hidden  # bytes of 512 tokens in float16
    assert 2 * row < kept_up - weights < not_begun - weights
    # A layer computes at least 14 such arrays, among them those of the convolutions, q, k, v and y.
    assert not_begun - weights > 14 * TINY.layers * row
    assert peak(more, keeps_up=False)[0] - weights < 2.1 * (not_begun - weights)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TTT-Linear", "TTT-MLP"])
def test_a_long_prompt_of_the_largest_model_stays_below_one_and_a_half_gigabytes(kind):
    """Whatever the device does. All layers are alike."""
    size = next(size for name, size in SIZES.items() if name.lower() == "1.3b")
    config = configuration(kind, size) | {"pre_conv": True, "share_qk": True, "use_gate": True}
    besides = []
    for layers in (2, 3):
        call = decoding.token(Case(config | {"num_hidden_layers": layers}, tokens=PREFILL_STEP_SIZE))
        most, weights = peak(call, keeps_up=False)
        besides.append(most - weights)
    assert besides[0] + (size.layers - 2) * (besides[1] - besides[0]) < 1.5e9


def test_a_prompt_of_any_length_is_one_call_of_the_kernel():
    short, long = (launches([decoding.token(Case(ours(), tokens=n))], M1, running=0) for n in (600, 1200))
    assert short["kernel ttt_linear_chunk"] == TINY.layers
    assert short.total() == long.total()


def test_an_operation_more_is_counted(monkeypatch):
    case = Case(ours(mamba=False))
    before = worst(case)
    swiglu = block.swiglu
    monkeypatch.setattr(block, "swiglu", lambda *x: mx.softmax(swiglu(*x), axis=-1))
    assert worst(case) == before + 1


def test_quantized_weights_take_a_kernel_each_and_the_embedding_four():
    config = ours() | {"hidden_size": 256, "intermediate_size": 320}
    plain, quantized = (Tokens(Case(config, bits=bits)).count(M1) for bits in (None, 4))
    assert quantized.layer.total() == plain.layer.total()
    assert sum(n for what, n in quantized.layer.items() if what.startswith("qmv")) == 4
    assert quantized.around["gather"] == 3 and quantized.around["dequantize"] == 1


@pytest.mark.slow
def test_command_line(monkeypatch, capsys):
    options = "--preset tiny --layer linear --backbone transformer --bits 16 --batch 1"
    monkeypatch.setattr("sys.argv", ["launches", *options.split()])
    main()
    lines = capsys.readouterr().out.splitlines()
    counts = [int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("launches a layer: ")]
    assert len(counts) == 4 and counts[-1] == max(counts[:2])  # open, completing, the Transformer, all of ours
    assert any(line.startswith("| **a layer** | **") for line in lines)


@pytest.mark.slow
def test_command_line_of_a_folder(monkeypatch, capsys, tmp_path):
    config = ours() | {"hidden_size": 256, "quantization": {"group_size": 64, "bits": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.argv", ["launches", "--model", str(tmp_path), "--batch", "1", "--brief"])
    main()
    assert "TTT-Linear, Mamba backbone, 8 bits, batch 1 | open mini-batch" in capsys.readouterr().out


def test_command_line_says_what_it_cannot_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["launches", "--model", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_command_line_says_what_cannot_be_counted(monkeypatch, capsys, tmp_path):
    """mlx-lm makes its kernel for Mamba2 only where there is Metal; for a convolution there is no rule."""
    for name, expected in (("Mamba2", "mamba2 cannot be recorded"), ("Mamba", "Convolution: no rule")):
        (tmp_path / "config.json").write_text(json.dumps(configuration(name, TINY)))
        monkeypatch.setattr("sys.argv", ["launches", "--model", str(tmp_path), "--batch", "1"])
        with pytest.raises(SystemExit) as stop:
            main()
        message = capsys.readouterr().err
        assert stop.value.code == 2 and expected in message and message.count("\n") == 1


def test_nothing_is_left_in_place():
    """After a recording MLX is as it was."""
    before = mx.compile, mx.custom_function, mx.contiguous, mx.fast.rms_norm, nn.silu
    launched(nn.silu, mx.zeros(8))
    assert (mx.compile, mx.custom_function, mx.contiguous, mx.fast.rms_norm, nn.silu) == before
