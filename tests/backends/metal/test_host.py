"""The host harness for Metal kernels: each of its rules is broken once, and correct kernels give numpy's numbers."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from tests.backends.metal.host import (
    CompileError,
    DataRace,
    DivergentBarrier,
    DivisionByZero,
    HostCall,
    HostKernel,
    Misaligned,
    OutOfBounds,
    ReadOnlyWrite,
    ThreadgroupMemory,
    Traffic,
    UninitializedRead,
    UnwrittenOutput,
    host_metal,
    why_unavailable,
)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

HEADER = "#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
PRECISION = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


def mostly_slow(values, fast: int) -> list:
    """The first few values as they are, the others for the slow tests: each is a kernel to compile."""
    values = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*v, marks=() if i < fast else pytest.mark.slow) for i, v in enumerate(values)]


NAMES = """
    uint i = thread_position_in_grid.x;
    uint lane = thread_index_in_simdgroup;
    uint simdgroup = simdgroup_index_in_threadgroup;
"""


def make(source: str, inputs=(), shapes=((64,),), dtypes=None, header=HEADER, **call) -> HostCall:
    """A kernel with inputs x0, x1, … and outputs y0, y1, …; by default one threadgroup of 64 threads."""
    kernel = mx.fast.metal_kernel(
        name="tested",
        input_names=[f"x{i}" for i in range(len(inputs))],
        output_names=[f"y{i}" for i in range(len(shapes))],
        header=header,
        source=NAMES + source,
    )
    call = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1)} | call
    call |= {"output_shapes": list(shapes), "output_dtypes": list(dtypes or [mx.float32] * len(shapes))}
    return HostKernel.from_mlx(kernel, [mx.array(x) for x in inputs], **call)


def run(source: str, inputs=(), **call) -> list[np.ndarray]:
    outputs, _ = make(source, inputs, **call).run()
    return [to_float(y) if mx.issubdtype(y.dtype, mx.floating) else np.array(y) for y in outputs]


def to_float(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- Races -------------------------------------------------------------------------------------------------------

EXCHANGE = """
    threadgroup float tile[64];
    tile[i] = x0[i];
    {between}
    y0[i] = tile[{reads}];
"""


@pytest.mark.parametrize("seed", range(4))
def test_missing_barrier_is_a_race_under_every_schedule(seed):
    kernel = make(EXCHANGE.format(between="", reads="63 - i"), [normal(64)])
    with pytest.raises(DataRace, match=r"'tile', byte \d+") as error:
        kernel.run(seed=seed)
    assert "`tile[i] = x0[i];`" in str(error.value)
    assert "`y0[i] = tile[63 - i];`" in str(error.value)


def test_the_schedule_depends_on_the_seed_alone():
    kernel = make(EXCHANGE.format(between="", reads="63 - i"), [normal(64)])

    def message(seed: int) -> str:
        with pytest.raises(DataRace) as error:
            kernel.run(seed=seed)
        return str(error.value)

    assert message(1) == message(1)
    assert len({message(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("between", "reads", "races"),
    mostly_slow(
        [
            ("threadgroup_barrier(mem_flags::mem_threadgroup);", "63 - i", False),
            ("threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);", "63 - i", False),
            ("threadgroup_barrier(mem_flags::mem_none);", "63 - i", True),
            ("threadgroup_barrier(mem_flags::mem_device);", "63 - i", True),
            ("simdgroup_barrier(mem_flags::mem_threadgroup);", "i ^ 31", False),
            ("simdgroup_barrier(mem_flags::mem_threadgroup);", "63 - i", True),
            ("simdgroup_barrier(mem_flags::mem_none);", "i ^ 31", True),
            ("float s = simd_sum(1.0f);", "i ^ 31", True),
            ("", "i", False),
        ],
        fast=1,
    ),
)
def test_which_barrier_orders_which_accesses(between, reads, races):
    x = normal(64)
    kernel = make(EXCHANGE.format(between=between, reads=reads), [x])
    if races:
        with pytest.raises(DataRace):
            kernel.run()
    else:
        (y,), _ = kernel.run(seed=3)
        order = np.arange(64)
        np.testing.assert_array_equal(to_float(y), x[eval(reads, {"i": order})])


@pytest.mark.slow
def test_reading_is_done_before_the_next_round_writes():
    source = """
        threadgroup float tile[64];
        float sum = 0;
        for (int round = 0; round < 3; round++) {
          tile[i] = round;
          threadgroup_barrier(mem_flags::mem_threadgroup);
          sum += tile[63 - i];
          END_OF_ROUND
        }
        y0[i] = sum;
    """
    with pytest.raises(DataRace, match=r"read by .*write by"):
        make(source.replace("END_OF_ROUND", "")).run()
    (y,) = run(source.replace("END_OF_ROUND", "threadgroup_barrier(mem_flags::mem_threadgroup);"))
    np.testing.assert_array_equal(y, 3)


def test_adding_in_place_reads_and_writes():
    source = """
        threadgroup float sum[1];
        if (i == 0) sum[0] = 0;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (i == 3 || i == FROM) sum[0] += 1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        y0[i] = sum[0];
    """
    _, stats = make(source.replace("FROM", "3")).run()
    assert (stats.threadgroup_read, stats.threadgroup_written) == (65 * 4, 2 * 4)
    with pytest.raises(DataRace, match=r"write by .*write by"):
        make(source.replace("FROM", "40")).run()


@pytest.mark.slow
def test_two_writers_race_even_with_the_same_value():
    with pytest.raises(DataRace, match=r"write by .*write by"):
        make("y0[i / 2] = 1;", shapes=[(32,)]).run()


@pytest.mark.slow
def test_a_third_reader_is_not_forgotten():
    """A write races with a reader of another simdgroup though later readers were ordered before it."""
    source = """
        threadgroup float tile[1];
        if (i == 0) tile[0] = 1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float first = i == 40 || i == 1 || i == 2 ? tile[0] : 0;
        if (simdgroup == 0) {
          simdgroup_barrier(mem_flags::mem_threadgroup);
          if (i == 3) tile[0] = 2;
        }
        y0[i] = first;
    """
    for seed in range(6):
        with pytest.raises(DataRace, match=r"thread 40"):
            make(source).run(seed=seed)


@pytest.mark.slow
def test_threadgroups_are_never_ordered():
    source = "if (i % 64 == 0) y0[0] = i; y1[i] = 0;"
    with pytest.raises(DataRace, match=r"'y0'.*different threadgroups"):
        make(source, shapes=[(1,), (128,)], grid=(128, 1, 1)).run()


@pytest.mark.slow
def test_halves_of_a_word_do_not_race():
    source = """
        threadgroup half tile[64];
        tile[i] = i;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        y0[i] = tile[i ^ 1];
    """
    (y,) = run(source, dtypes=[mx.float16])
    np.testing.assert_array_equal(y, np.arange(64) ^ 1)


@pytest.mark.slow
def test_thread_sanitizer_agrees():
    kernel = EXCHANGE.format(between="BARRIER", reads="63 - i")
    good = make(kernel.replace("BARRIER", "threadgroup_barrier(mem_flags::mem_threadgroup);"), [normal(64)])
    bad = make(kernel.replace("BARRIER", ""), [normal(64)])
    for seed in (0, 1):
        assert good.thread_sanitizer(seed=seed) == []
        reports = bad.thread_sanitizer(seed=seed)
        assert reports and all("`tile[i] = x0[i];`" in r and "`y0[i] = tile[63 - i];`" in r for r in reports)


# ---- Barriers that not all threads reach ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    mostly_slow(
        [
            "if (i < 40) threadgroup_barrier(mem_flags::mem_none); y0[i] = 0;",
            "y0[i] = 0; if (i == 63) return; threadgroup_barrier(mem_flags::mem_none);",
            "if (lane < 16) simdgroup_barrier(mem_flags::mem_none); y0[i] = 0;",
            "y0[i] = lane < 8 ? simd_sum(1.0f) : 0;",
            "y0[i] = 0; mem_flags n = mem_flags(0); if (i < 32) threadgroup_barrier(n);\nelse threadgroup_barrier(n);",
            "for (uint n = 0; n < 2 + simdgroup; n++) threadgroup_barrier(mem_flags::mem_none); y0[i] = 0;",
        ],
        fast=1,
    ),
)
def test_divergence_is_an_error_at_its_line(source):
    for seed in (0, 1):
        with pytest.raises(DivergentBarrier, match=r"kernel.metal:\d+ `.*(barrier|simd_sum).*`"):
            make(source).run(seed=seed)


@pytest.mark.slow
def test_a_fragment_needs_a_whole_simdgroup():
    source = "simdgroup_float8x8 a(1.0f), b(1.0f); simdgroup_multiply(a, a, b); y0[i] = 0;"
    with pytest.raises(DivergentBarrier, match="simdgroup of 16 threads"):
        make(source, shapes=[(48,)], grid=(48, 1, 1)).run()


@pytest.mark.slow
def test_simdgroups_may_diverge_from_each_other():
    (y,) = run("y0[i] = simdgroup ? simd_sum(1.0f) : simd_max(float(i));")
    np.testing.assert_array_equal(y, np.repeat([31, 32], 32))


# ---- Bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "complaint"),
    mostly_slow(
        [
            ("y0[i] = x0[i + 1];", r"reads bytes 256 to 259 of buffer 'x0', which has 256 bytes"),
            ("y0[i] = x0[int(i) - 1];", r"reads bytes -4 to -1 of buffer 'x0'"),
            ("y0[i] = x0[i - 1];", r"reads .*memory|reads bytes"),
            ("y0[i + 1] = 0;", r"writes bytes 256 to 259 of buffer 'y0'"),
            ("y0[i] = x1[i % 4];", r"of buffer 'x1', which has 12 bytes"),
            ("y0[i] = (&x2)[1];", r"of buffer 'x2', which has 4 bytes"),
            ("y0[i] = x0_shape[i % 2];", r"of buffer 'x0_shape', which has 4 bytes"),
            ("auto v = (const device float4*)x0; y0[i] = v[i / 4 + 1].x;", r"reads bytes 256 to 2\d\d of buffer 'x0'"),
            ("threadgroup float t[64]; t[i + i / 63] = 0; y0[i] = 0;", r"outside an array|threadgroup array 't'"),
            (
                "threadgroup float t[64]; threadgroup float* p = t; p[i + i / 63] = 0; y0[i] = 0;",
                r"threadgroup array 't'",
            ),
            ("float local[4] = {0}; y0[i] = local[i & 7];", r"index \d outside an array"),
            ("simdgroup_float8x8 m; simdgroup_load(m, x0 + 1); y0[i] = 0;", r"buffer 'x0'.*`simdgroup_float8x8 m;"),
            ("simdgroup_float8x8 m(0.0f); simdgroup_store(m, y0, 9);", r"writes bytes 256.* of buffer 'y0'"),
        ],
        fast=1,
    ),
)
def test_out_of_bounds(source, complaint):
    with pytest.raises(OutOfBounds, match=complaint):
        make(source, [normal(64), normal(3), np.float32(1)]).run()


@pytest.mark.slow
def test_misaligned_vectors():
    source = "y0[i] = dot(float4(1), ((const device float4*)(x0 + OFFSET))[0]);"
    (y,) = run(source.replace("OFFSET", "4"), [np.arange(64, dtype=np.float32)])
    np.testing.assert_array_equal(y, 4 + 5 + 6 + 7)
    with pytest.raises(Misaligned, match="reads 16 bytes"):
        make(source.replace("OFFSET", "2"), [normal(64)]).run()
    with pytest.raises(Misaligned, match="writes 8 bytes"):
        make("((device float2*)(y0 + 1))[0] = float2(0);").run()


@pytest.mark.slow
def test_integer_division_by_zero():
    with pytest.raises(DivisionByZero, match=r"kernel.metal:\d+"):
        make("y0[i] = 7 % i;").run()


@pytest.mark.slow
def test_inputs_are_read_only():
    with pytest.raises(ReadOnlyWrite, match="'x0'"):
        make("const_cast<device float*>(x0)[i] = 1; y0[i] = 0;", [normal(64)]).run()


@pytest.mark.slow
def test_threadgroup_memory_ends_at_32_kilobytes():
    source = "threadgroup float a[4096], b[N]; a[i] = b[i] = 0; y0[i] = a[i] + b[i];"
    _, stats = make(source, template=[("N", 4096)]).run()
    assert stats.threadgroup_memory == 32768
    with pytest.raises(ThreadgroupMemory, match=r"'b' .* 32772 bytes"):
        make(source, template=[("N", 4097)]).run()


# ---- After an error -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("y0[i] = simd_sum(x0[i == 5 ? 100 : i]);", OutOfBounds),  # lanes 0 to 4 wait in the sum
        ("y0[i] = i == 5 ? 0 : simd_sum(x0[i]);", DivergentBarrier),
    ],
)
def test_a_failed_dispatch_does_not_change_the_next(source, error):
    x = normal(64)
    kernel = make("y0[i] = simd_sum(x0[i]);", [x])
    (expected,), _ = kernel.run()
    with pytest.raises(error):
        make(source, [x]).run()
    (y,), _ = kernel.run()
    assert mx.array_equal(y, expected)


# ---- What nobody wrote ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "where"),
    mostly_slow(
        [
            ("threadgroup float t[64]; if (i) t[i] = 0; y0[i] = t[i];", r"byte 0 of threadgroup array 't'"),
            ("y0[i] += 1;", r"of buffer 'y0'"),
            (
                "threadgroup float t[64]; simdgroup_float8x8 m; simdgroup_load(m, t); y0[i] = 0;",
                "threadgroup array 't'",
            ),
        ],
        fast=1,
    ),
)
def test_uninitialized_memory(source, where):
    with pytest.raises(UninitializedRead, match=where):
        make(source).run()


@pytest.mark.slow
def test_threadgroup_memory_does_not_outlive_the_threadgroup():
    source = "threadgroup float t[64]; if (i < 64) t[i] = 0; y0[i] = t[i % 64];"
    with pytest.raises(UninitializedRead):
        make(source, shapes=[(128,)], grid=(128, 1, 1)).run()


def test_unwritten_output():
    kernel = make("if (i < 60) y0[i] = i;")
    with pytest.raises(UnwrittenOutput, match="16 of 256 bytes of output 'y0'"):
        kernel.run()
    (y,), _ = kernel.run(allow_unwritten=True)
    np.testing.assert_array_equal(np.isnan(to_float(y)), np.arange(64) >= 60)


@pytest.mark.slow
def test_init_value_is_a_value():
    (y,) = run("if (i < 60) y0[i] += i;", init_value=2)
    np.testing.assert_array_equal(y, np.where(np.arange(64) < 60, np.arange(64) + 2, 2))


@pytest.mark.slow
def test_locals_and_fragments_start_as_nan():
    y, z = run(
        "simdgroup_float8x8 m; y0[i] = m.thread_elements()[1]; float a[4]; a[i & 1] = 0; y1[i] = a[(i & 1) + 2];",
        shapes=[(64,), (64,)],
    )
    assert np.isnan(y).all() and np.isnan(z).all()


# ---- What clang rejects --------------------------------------------------------------------------------------------


def test_compile_errors_name_the_line():
    with pytest.raises(CompileError, match=r"kernel.metal:\d+:\d+: error: .*undeclared_thing"):
        make("y0[i] = undeclared_thing;").run()


MIXED = {
    "device_to_threadgroup": "threadgroup float* p = y0;",
    "threadgroup_argument": "takes_device(t);",
    "unqualified_parameter": "takes_any(x0);",
    "thread_argument": "float a[4]; takes_device(a);",
    "constant_as_device": "reads_device(x1);",
    "cast": "auto p = reinterpret_cast<threadgroup float*>(y0);",
    "const_dropped": "device float* p = x0;",
    "load_from_constant": "simdgroup_float8x8 m; simdgroup_load(m, x1);",
}
HELPERS = """
void takes_device(device float* p) { p[0] = 0; }
float takes_any(const float* p) { return p[0]; }
float reads_device(const device float* p) { return p[0]; }
template <typename P> float reads(P p) { return p[0]; }
struct Pair { float a, b; };
"""


@pytest.mark.parametrize("statement", mostly_slow(MIXED.values(), fast=1), ids=MIXED)
def test_mixed_address_spaces(statement):
    source = f"threadgroup float t[64]; t[i] = 0; {statement} y0[i] = 0;"
    kernel = make(source, [normal(64), normal(3)], header=HEADER + HELPERS)
    with pytest.raises(CompileError, match=r"kernel.metal:\d+"):
        kernel.check_address_spaces()


@pytest.mark.slow
def test_correct_address_spaces():
    source = """
        threadgroup float t[64];
        threadgroup Pair pairs[2];
        t[i] = reads(x0 + i) + reads(x1) + x1[0];
        if (i == 0) pairs[0].a = 1;
        threadgroup float* p = t + i;
        const device float4* v = (const device float4*)x0;
        auto w = reinterpret_cast<const device half*>(x0);
        simdgroup_float8x8 m;
        simdgroup_load(m, x0, 4);
        simdgroup_store(m, t, 4);
        thread auto& e = m.thread_elements();
        e[0] += v[0].x + float(w[0]) + p[0] + metal::max(t[0], x1[1]);
        y0[i] = e[0];
    """
    make(source, [normal(64), normal(3)], header=HEADER + HELPERS).check_address_spaces()


@pytest.mark.parametrize(
    ("statement", "accepted"),
    mostly_slow(
        [
            (
                "y0[i] = T(2.0f * x0[i]); y0[i] = x0[i] * x0[i]; float f = x0[i]; f += x0[i];"
                " y0[i] = static_cast<T>(f);",
                True,
            ),
            (
                "simdgroup_matrix<T, 8, 8> m; simdgroup_load(m, x0, 4); y0[i] = m.thread_elements()[0] + exp(x0[i]);",
                True,
            ),
            ("y0[i] = 2.0f * x0[i];", False),
            ("y0[i] = 0.5f;", False),
            ("T a = float(x0[i]);", False),
        ],
        fast=1,
    ),
)
def test_only_casts_make_a_bfloat(statement, accepted):
    x = mx.zeros((64,), mx.bfloat16)
    kernel = make(statement, [x], dtypes=[mx.bfloat16], template=[("T", mx.bfloat16)])
    if accepted:
        kernel.check_conversions()
    else:
        with pytest.raises(CompileError, match=r"kernel\.metal"):
            kernel.check_conversions()


@pytest.mark.slow
def test_lines_follow_line_directives():
    header = '#line 1 "maths.metal"\ninline float twice(const device float* p) {\n  return p[0] + p[64];\n}\n'
    with pytest.raises(OutOfBounds, match=re.escape("maths.metal:2 `return p[0] + p[64];`")):
        make('#line 7 "body.metal"\ny0[i] = twice(x0 + i);', [normal(64)], header=header).run()


# ---- Right numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", mostly_slow(FLOATS, fast=1), ids=str)
def test_fragment_products(dtype):
    """C = A B and Cᵀ by fragments, [16, 24] by [24, 8], stored plainly and transposed."""
    source = """
        for (int r = 0; r < 2; r++) {
          simdgroup_matrix<T, 8, 8> a, b;
          simdgroup_float8x8 c(0.0f);
          for (int k = 0; k < 3; k++) {
            simdgroup_load(a, x0, 24, ulong2(8 * k, 8 * r));
            simdgroup_load(b, x1 + 8 * k, 24, 0, true);
            simdgroup_multiply_accumulate(c, a, b, c);
          }
          if (simdgroup == 0) simdgroup_store(c, y0 + 64 * r, 8);
          else simdgroup_store(c, y1 + 8 * r, 16, 0, true);
        }
    """
    a, b = mx.array(normal(16, 24)).astype(dtype), mx.array(normal(8, 24, seed=1)).astype(dtype)  # b is Bᵀ
    c, ct = run(source, [a, b], shapes=[(16, 8), (8, 16)], template=[("T", dtype)])
    expected = to_float(a).astype(np.float64) @ to_float(b).astype(np.float64).T
    np.testing.assert_allclose(c, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ct, c.T)


@pytest.mark.slow
def test_fragment_layout():
    """A lane holds (row, col) and (row, col + 1): row = (lane/4 & 4) + lane/2 % 4, col = (lane/4 & 2)·2 + lane%2·2."""
    source = """
        simdgroup_float8x8 m;
        simdgroup_load(m, x0);
        y0[2 * i] = m.thread_elements()[0];
        y0[2 * i + 1] = m.thread_elements()[1];
    """
    (y,) = run(source, [np.arange(64, dtype=np.float32)], grid=(32, 1, 1), threadgroup=(32, 1, 1))
    lane = np.arange(32)
    row = (lane // 4 & 4) + lane // 2 % 4
    column = (lane // 4 & 2) * 2 + lane % 2 * 2
    np.testing.assert_array_equal(y.reshape(32, 2), np.stack([8 * row + column, 8 * row + column + 1], axis=1))
    (y,) = run("simdgroup_float8x8 m(3.0f); if (simdgroup == 0) simdgroup_store(m, y0);")
    np.testing.assert_array_equal(y.reshape(8, 8), 3 * np.eye(8))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reductions(dtype):
    x = mx.array(normal(64)).astype(dtype)
    exact = to_float(x).reshape(2, 32)
    names = ["simd_sum", "simd_max", "simd_min", "simd_prefix_inclusive_sum", "simd_prefix_exclusive_sum", "quad_sum"]
    source = "".join(f"y{n}[i] = {name}(x0[i]);" for n, name in enumerate(names))
    sums, most, least, running, before, quad = run(source, [x], shapes=[(2, 32)] * 6, dtypes=[dtype] * 6)
    tolerance = {"rtol": 0, "atol": 40 * PRECISION[dtype]}
    np.testing.assert_allclose(sums, np.broadcast_to(exact.sum(1, keepdims=True), (2, 32)), **tolerance)
    np.testing.assert_array_equal(most, np.broadcast_to(exact.max(1, keepdims=True), (2, 32)))
    np.testing.assert_array_equal(least, np.broadcast_to(exact.min(1, keepdims=True), (2, 32)))
    np.testing.assert_allclose(running, exact.cumsum(1), **tolerance)
    np.testing.assert_allclose(before, exact.cumsum(1) - exact, **tolerance)
    np.testing.assert_allclose(quad, np.repeat(exact.reshape(2, 8, 4).sum(2), 4, axis=1), **tolerance)


@pytest.mark.slow
def test_shuffles():
    expressions = {
        "simd_shuffle(i, (lane * 7) % 32)": lambda n: n * 7 % 32,
        "simd_shuffle_xor(i, 13)": lambda n: n ^ 13,
        "simd_shuffle_up(i, 3)": lambda n: np.where(n < 3, n, n - 3),
        "simd_shuffle_down(i, 3)": lambda n: np.where(n + 3 > 31, n, n + 3),
        "simd_shuffle_rotate_up(i, 3)": lambda n: (n - 3) % 32,
        "simd_shuffle_rotate_down(i, 3)": lambda n: (n + 3) % 32,
        "simd_broadcast(i, 9)": lambda n: 0 * n + 9,
        "simd_broadcast_first(i)": lambda n: 0 * n,
        "quad_shuffle_xor(i, 2)": lambda n: n ^ 2,
        "quad_broadcast(i, 3)": lambda n: n | 3,
        "simd_shuffle_xor(float2(i, 0), 1).x": lambda n: n ^ 1,
    }
    source = "".join(f"y{n}[i] = {e};" for n, e in enumerate(expressions))
    outputs = run(source, shapes=[(64,)] * len(expressions), dtypes=[mx.int32] * len(expressions))
    for (expression, expected), y in zip(expressions.items(), outputs, strict=True):
        n = np.arange(32)
        np.testing.assert_array_equal(y, np.concatenate([expected(n), expected(n) + 32]), err_msg=expression)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mathematics(dtype):
    x = mx.array(np.abs(normal(64)) + 0.1).astype(dtype)
    exact = to_float(x).astype(np.float64)
    functions = {
        "exp(x)": np.exp(exact),
        "precise::tanh(x)": np.tanh(exact),
        "fast::log(x)": np.log(exact),
        "rsqrt(x)": exact**-0.5,
        "metal::precise::rsqrt(x)": exact**-0.5,
        "sqrt(x)": exact**0.5,
        "abs(-x)": exact,
        "fma(x, x, x)": exact * exact + exact,
        "clamp(x, T(0.5), T(1.0))": np.clip(exact, 0.5, 1),
        "max(x, T(1.0))": np.maximum(exact, 1),
        "min(x, T(1.0))": np.minimum(exact, 1),
        "select(x, T(0), x < T(1))": np.where(exact < 1, 0, exact),
        "floor(x)": np.floor(exact),
        "pow(x, T(2))": exact**2,
    }
    source = "T x = x0[i];" + "".join(f"y{n}[i] = {f};" for n, f in enumerate(functions))
    outputs = run(
        source, [x], shapes=[(64,)] * len(functions), dtypes=[dtype] * len(functions), template=[("T", dtype)]
    )
    for (function, expected), y in zip(functions.items(), outputs, strict=True):
        np.testing.assert_allclose(y, expected, rtol=PRECISION[dtype], atol=1e-7, err_msg=function)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_every_half_operation_rounds(dtype):
    """Casts, and a product and a sum that are each rounded; ties, subnormals, infinities and NaN included."""
    edges = [0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e-39, 6e-8, 65504, 65520, 3e38]
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11]
    odd_nan = np.array([0x7F800001], np.uint32).view(np.float32)
    x = np.concatenate([np.array(edges + ties, np.float32), odd_nan, normal(49)])
    y, z = run(
        "y0[i] = T(x0[i]); y1[i] = T(x0[i]) * T(x0[63 - i]) + T(x0[i]);",
        [x],
        shapes=[(64,)] * 2,
        dtypes=[dtype] * 2,
        template=[("T", dtype)],
    )
    a, b = mx.array(x).astype(dtype), mx.array(x[::-1].copy()).astype(dtype)
    np.testing.assert_array_equal(y, to_float(a))
    np.testing.assert_array_equal(z, to_float(a * b + a))


@pytest.mark.slow
def test_vectors():
    source = """
        float4 a = float4(x0[0], float2(x0[1], x0[2]), x0[3]);
        float4 b = 2;
        half2 h = half2(a.xy);
        y0[0] = dot(a, b);
        y0[1] = a.zyx[0] + a.w;
        y0[2] = mix(a, b, 0.25f * b)[3];
        y0[3] = h.y + vec<float, 2>(1, 2)[1];
        y0[4] = select(a, b, a < b)[1];
        y0[5] = as_type<float>(as_type<uint>(x0[5]));
        y0[6] = sizeof(1.0) + sizeof(1e-6);
        y0[7] = exp(float2(0))[1] + float3(a.xyz).z;
    """
    x = normal(8)
    (y,) = run(source, [x], shapes=[(8,)], grid=(1, 1, 1))
    a = x[:4]
    half = np.float16(x[1]).astype(np.float32)
    expected = [2 * a.sum(), a[2] + a[3], a[3] / 2 + 1, half + 2, min(a[1], 2) if a[1] >= 2 else 2, x[5], 8, 1 + a[2]]
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.slow
def test_positions_in_a_grid_with_ragged_edges():
    source = """
        uint3 p = thread_position_in_grid, l = thread_position_in_threadgroup, g = threadgroup_position_in_grid;
        uint at = (p.z * 5 + p.y) * 70 + p.x;
        y0[at] = (g.z * 100 + g.y * 10 + g.x) * 1000 + thread_index_in_threadgroup;
        y1[at] = lane * 100 + simdgroup;
        y2[at] = l.x + 100 * l.y + 10000 * threads_per_threadgroup.x;
        y3[at] = threadgroups_per_grid.x + 10 * threadgroups_per_grid.y + 100 * threads_per_grid.x;
    """
    shape, size = (2, 5, 70), (40, 2, 1)
    outputs = run(source, shapes=[shape] * 4, dtypes=[mx.int32] * 4, grid=shape[::-1], threadgroup=size)
    z, y, x = np.indices(shape)
    width, height = np.where(x < 40, 40, 30), np.where(y < 4, 2, 1)
    index = y % 2 * width + x % 40
    np.testing.assert_array_equal(outputs[0], (z * 100 + y // 2 * 10 + x // 40) * 1000 + index)
    np.testing.assert_array_equal(outputs[1], index % 32 * 100 + index // 32)
    np.testing.assert_array_equal(outputs[2], x % 40 + 100 * (y % 2) + 10000 * width)
    np.testing.assert_array_equal(outputs[3], 2 + 30 + 7000)
    assert height.min() == 1


@pytest.mark.slow
def test_shapes_strides_and_ndim_of_inputs():
    source = "y0[i] = x0_shape[1] + 10 * x0_strides[0] + 100 * x1_ndim + 1000 * x1_shape[2] + x0[i];"
    (y,) = run(source, [np.ones((8, 9), np.int32), np.ones((2, 3, 4), np.float32)], dtypes=[mx.int32])
    np.testing.assert_array_equal(y, 9 + 90 + 300 + 4000 + 1)


@pytest.mark.slow
def test_traits_and_element_offsets():
    source = """
        int64_t at = elem_to_loc(i, x0_shape, x0_strides, x0_ndim);
        y0[i] = x0[at] + 100 * is_same_v<T, half> + 200 * is_floating_point_v<int>;
        if constexpr (is_integral_v<T>) y0[i] = -1;
    """
    x = np.arange(64, dtype=np.float32).reshape(4, 2, 8)
    (y,) = run(source, [x], template=[("T", mx.float16)])
    np.testing.assert_array_equal(y, np.arange(64) + 100)


@pytest.mark.slow
def test_a_metal_file_with_several_kernels():
    source = """
        #include <metal_stdlib>
        using namespace metal;
        constant constexpr int lanes = 2;  // names that the shim must not take
        float apply(float x) { return lanes * x; }
        kernel void other(device float* x [[buffer(0)]]) { x[0] = 1; }
        template <typename T, int N>
        [[kernel]] void wanted(
            device const T* x [[buffer(0)]], constant float& scale [[buffer(1)]], device T* y [[buffer(2)]],
            uint i [[thread_position_in_grid]], ushort2 l [[thread_position_in_threadgroup]]) {
          y[i] = apply(x[i]) * scale + N + l.x;
        }
    """
    kernel = HostKernel(source, "wanted", "<float, 100>")
    x, y = normal(8), np.zeros(8, np.float32)
    stats = kernel.run({"x": x, "scale": np.float32([3]), "y": y}, grid=(8, 1, 1), threadgroup=(4, 1, 1), seed=1)
    np.testing.assert_allclose(y, 6 * x + 100 + np.arange(8) % 4, rtol=1e-6)
    assert stats.threadgroups == 2
    with pytest.raises(ValueError, match="no array for buffer 'y'"):
        kernel.run({"x": x, "scale": np.float32([3])}, grid=(8, 1, 1), threadgroup=(4, 1, 1))
    with pytest.raises(ValueError, match="1 to 1024 threads"):
        kernel.run({"x": x, "scale": np.float32([3]), "y": y}, grid=(2000, 1, 1), threadgroup=(1025, 1, 1))


# ---- Counts --------------------------------------------------------------------------------------------------------


def test_counts():
    source = """
        threadgroup float tile[128];
        tile[i] = x0[i % 256];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float sum = tile[(i % 128) ^ 1] * x1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum += simd_shuffle_xor(sum, 1) + simd_sum(sum) + float(x0[0]);
        simdgroup_barrier(mem_flags::mem_none);
        simdgroup_float8x8 a(1.0f), b(2.0f), c;
        simdgroup_multiply(c, a, b);
        simdgroup_multiply_accumulate(c, a, b, c);
        y0[i] = sum + c.thread_elements()[0];
    """
    source = source.replace("tile[i]", "tile[i % 128]")
    x = mx.array(normal(256)).astype(mx.float16)
    _, stats = make(source, [x, np.float32(2)], shapes=[(256,)], grid=(256, 1, 1), threadgroup=(128, 1, 1)).run(seed=2)
    assert stats.buffers == {
        "x0": Traffic(read=256 * 2 + 256 * 2, written=0, fetched=256 * 2 + 2 * 2, stored=0),
        "x1": Traffic(read=256 * 4, written=0, fetched=2 * 4, stored=0),
        "y0": Traffic(read=0, written=256 * 4, fetched=0, stored=256 * 4),
    }
    assert (stats.device_read, stats.device_written) == (2048, 1024)
    assert (stats.device_fetched, stats.device_stored) == (524, 1024)
    assert (stats.threadgroup_read, stats.threadgroup_written, stats.threadgroup_memory) == (1024, 1024, 512)
    assert (stats.threadgroups, stats.barriers, stats.barriers_per_thread) == (2, 4, 2)
    assert (stats.simdgroup_barriers, stats.shuffles, stats.reductions, stats.multiplies) == (8, 8, 8, 16)


@pytest.mark.slow
def test_fragment_traffic():
    source = """
        threadgroup float t[64];
        simdgroup_float8x8 m;
        simdgroup_load(m, x0, 8);
        simdgroup_store(m, t, 8);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_load(m, t, 8, 0, true);
        simdgroup_store(m, y0, 8);
    """
    x = normal(64)
    kernel = make(source, [x], grid=(32, 1, 1), threadgroup=(32, 1, 1))
    (y,), stats = kernel.run()
    np.testing.assert_array_equal(to_float(y).reshape(8, 8), x.reshape(8, 8).T)
    assert stats.buffers["x0"].read == stats.buffers["y0"].written == 256
    assert stats.threadgroup_read == stats.threadgroup_written == 256


# ---- Code that calls mx.fast.metal_kernel --------------------------------------------------------------------------


def doubling_kernel():
    source = "uint i = thread_position_in_grid.x; y[i] = 2.0f * x[i];"
    return mx.fast.metal_kernel(name="double", input_names=["x"], output_names=["y"], source=source)


def double_on_metal(kernel, x: mx.array, dtype: mx.Dtype) -> mx.array:
    grid = {"grid": (x.size, 1, 1), "threadgroup": (32, 1, 1)}
    (y,) = kernel(inputs=[x], **grid, output_shapes=[x.shape], output_dtypes=[dtype])
    return y


@pytest.mark.slow
def test_host_metal_is_transparent():
    """One kernel object, called with several dtypes and with arrays that MLX puts into device and constant memory."""
    real, real_available = mx.fast.metal_kernel, mx.metal.is_available
    with host_metal(seed=1, available=True) as dispatches:
        assert mx.metal.is_available()
        kernel = doubling_kernel()
        for rows in (5, 1):
            for dtype in (mx.float32, mx.float16):
                for out in (mx.float32, mx.float16):
                    x = np.arange(7 * rows, dtype=np.float32).reshape(rows, 7)
                    y = double_on_metal(kernel, mx.array(x).astype(dtype), out)
                    assert y.dtype == out
                    np.testing.assert_array_equal(to_float(y), 2 * x)
    assert dispatches.names == ["double"] * 8
    assert [d.device_written for d in dispatches.stats] == [140, 70, 140, 70, 28, 14, 28, 14]
    assert mx.fast.metal_kernel is real and mx.metal.is_available is real_available


def test_another_dtype_needs_another_trace():
    call = make("y0[i] = x0[i];", [normal(64)])
    with pytest.raises(ValueError, match=r"input 0 is .*float16"):
        call.run([mx.zeros((64,), mx.float16)])


@pytest.mark.slow
def test_host_metal_under_a_custom_gradient():
    @mx.custom_function
    def double(x):
        return double_on_metal(doubling_kernel(), x, x.dtype)

    @double.vjp
    def double_vjp(x, cotangent, output):
        return 2 * cotangent

    with host_metal():
        value, gradient = mx.value_and_grad(lambda x: (double(x * x) ** 2).sum())(mx.arange(32) / 8.0)
    x = np.arange(32) / 8
    np.testing.assert_allclose(value.item(), (4 * x**4).sum(), rtol=1e-6)
    np.testing.assert_allclose(np.array(gradient), 16 * x**3, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_published_kernels(dtype, monkeypatch):
    """mlx-lm's gated-delta kernels, as they are, against the same rule in array operations."""
    from mlx_lm.models import gated_delta

    B, T, Hk, Hv, Dk, Dv = 1, 5, 1, 2, 128, 8
    mx.random.seed(0)
    q, k = ((0.1 * mx.random.normal((B, T, Hk, Dk))).astype(dtype) for _ in range(2))
    v = mx.random.normal((B, T, Hv, Dv)).astype(dtype)
    g, beta = mx.random.uniform(0.8, 1, (B, T, Hv)), mx.random.uniform(0, 1, (B, T, Hv)).astype(dtype)
    state = 0.1 * mx.random.normal((B, Hv, Dv, Dk))
    with host_metal(seed=3, available=True) as dispatches:
        monkeypatch.setattr(gated_delta, "_gated_delta_kernel", gated_delta._make_gated_delta_kernel())
        monkeypatch.setattr(gated_delta, "_gated_delta_kernel_packed", gated_delta._make_gated_delta_packed_kernel())
        packed = gated_delta.gated_delta_kernel(q, k, v, g, beta, state)
        plain = gated_delta.gated_delta_kernel_unpacked(q, k, v, g, beta, state)
    expected = gated_delta.gated_delta_ops(*(x.astype(mx.float32) for x in (q, k, v, g, beta)), state)
    assert len(dispatches.names) == 2
    for y, end in (packed, plain):
        np.testing.assert_allclose(to_float(y), to_float(expected[0]), atol=PRECISION[dtype], rtol=PRECISION[dtype])
        np.testing.assert_allclose(to_float(end), to_float(expected[1]), atol=1e-6)
