"""Products with weights as they lie in memory: every precision, every instruction set that can be had here."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ttt.backends.cpu import library
from mlx_ttt.backends.cpu.weights import CLASSES, Matrix

from .c_code import needs_c

pytestmark = needs_c

BOUND = 2e-6  # of the sum of the terms' sizes
ROWS = [1, 2, 3, 4, 7, 15, 16, 33]  # the last two are multiplied by OpenBLAS
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def linear(out: int, columns: int, bits: int | None, group: int, dtype: mx.Dtype) -> nn.Module:
    layer = nn.Linear(columns, out, bias=False)
    layer.weight = mx.random.normal((out, columns), key=mx.random.key(columns)).astype(dtype)
    if bits:
        layer = nn.QuantizedLinear.from_linear(layer, group, bits)
    layer.__class__ = CLASSES[type(layer)]
    return layer


def matrix(layer: nn.Module) -> np.ndarray:
    """In float64, by MLX. Scales are widened first: else it rounds the matrix to their precision."""
    if "scales" not in layer:
        return np.array(layer.weight.astype(mx.float32), np.float64)
    groups = (layer.scales.astype(mx.float32), layer.biases.astype(mx.float32))
    return np.array(mx.dequantize(layer.weight, *groups, layer.group_size, layer.bits), np.float64)


def assert_product(y, x, layer) -> None:
    w = matrix(layer)
    size = np.abs(x).astype(np.float64) @ np.abs(w).T + np.abs(x).sum(-1, keepdims=True) * np.abs(w).max()
    assert (np.abs(np.array(y) - x @ w.T) <= BOUND * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized(bits, group, dtype, spy):
    for columns in (128, 384, 640):
        layer = linear(37, columns, bits, group, dtype)
        for m in ROWS:
            x = np.random.RandomState(m).standard_normal((m, columns)).astype(np.float32)
            assert_product(layer(mx.array(x)), x, layer)
    assert spy.taken() == {"multiply"}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype, spy):
    for columns in (1, 8, 24, 41, 2736):
        layer = linear(37, columns, None, 0, dtype)
        for m in ROWS:
            x = np.random.RandomState(m).standard_normal((m, columns)).astype(np.float32)
            assert_product(layer(mx.array(x)), x, layer)
    assert spy.taken() == {"multiply"}


def test_rows_of_one_group(spy):
    layer = linear(5, 32, 4, 32, mx.float16)
    x = np.ones((3, 32), np.float32)
    assert_product(layer(mx.array(x)), x, layer)


def test_a_bias_is_added():
    layer = linear(5, 64, 4, 64, mx.float16)
    x = mx.ones((2, 64))
    expected = layer(x) + 3
    layer.bias = mx.full((5,), 3.0)
    assert mx.allclose(layer(x), expected, rtol=1e-6)


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("bits", [None, 4])
def test_gradients(bits, m):
    """Of the input, by C; of half-precision weights, by MLX operations."""
    layer = linear(37, 64, bits, 64, mx.float16)
    x, dy = mx.random.normal((m, 64)), mx.random.normal((m, 37))
    found = mx.grad(lambda x: (layer(x) * dy).sum())(x)
    assert np.allclose(found, np.array(dy) @ matrix(layer), rtol=1e-4, atol=1e-4)
    if bits is None:
        of_weight = nn.value_and_grad(layer, lambda layer: (layer(x) * dy).sum())(layer)[1]["weight"]
        assert np.allclose(of_weight.astype(mx.float32), np.array(dy).T @ np.array(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_matrix_that_is_unpacked_in_parts(bits, spy):
    """And the cotangent of x, which is a sum over the parts."""
    layer = linear(300, 1 << 14, bits, 64, mx.float16)
    x = mx.random.normal((16, 1 << 14), key=mx.random.key(1))
    dy = mx.random.normal((16, 300), key=mx.random.key(2))
    (y,), (dx,) = mx.vjp(layer, [x], [dy])
    assert spy.taken() == {"multiply"}
    assert_product(y, np.array(x), layer)
    w = matrix(layer)
    expected = np.array(dy) @ w
    assert np.abs(np.array(dx) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_wrong_width_is_for_mlx_to_judge():
    for bits in (None, 4):
        with pytest.raises(ValueError):
            mx.eval(linear(5, 64, bits, 64, mx.float16)(mx.ones((2, 60))))


# ---- Other instruction sets ------------------------------------------------------------------------------------------

SETS = {  # the same source: for less than this processor has, or in registers of another width
    "plain C": ("-march=x86-64",),
    "AVX": ("-march=sandybridge",),
    "AVX2 without half precision": ("-mavx2", "-mfma", "-mno-f16c"),
    "16 lanes, as with AVX-512": ("-march=native", "-DWIDTH=16"),
}
EXPORTED = """
#include "weights.c"
size_t room(const struct weights *w, size_t k) { return arranged_size(w, k); }
void multiply(const struct weights *w, size_t m, size_t k, const float *x, float *room, float *y)
{
    arrange(w, m, k, x, room);
    multiply_packed(w, m, k, room, 0, w->n, y);
}
void rows(const struct weights *w, size_t k, float *y) { unpack(w, k, 0, w->n, y); }
"""
C = Path(library.__file__).with_name("c")


@pytest.mark.slow
@pytest.mark.parametrize("options", SETS.values(), ids=SETS)
def test_instruction_sets(options, tmp_path):
    source, made = tmp_path / "exported.c", tmp_path / "weights.so"
    source.write_text(EXPORTED)
    flags = [flag for flag in library._FLAGS if not flag.startswith("-march")]
    subprocess.run(["cc", *flags, *options, f"-I{C}", "-w", str(source), "-o", str(made)], check=True)
    code = ctypes.CDLL(str(made))
    for bits, group in [(None, 0), *itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128))]:
        for dtype, columns in itertools.product(DTYPES[bits is None :], (128, 640)):
            layer = linear(21, columns, bits, group, dtype)
            found = Matrix(layer)
            k, struct = ctypes.c_size_t(columns), ctypes.byref(found.struct)
            w = np.empty((21, columns), np.float32)
            code.rows(struct, k, w.ctypes.data_as(ctypes.c_void_p))
            assert np.allclose(w, matrix(layer), rtol=1e-6, atol=1e-5), (bits, group)
            for m in (1, 2, 3, 7):
                x = np.random.RandomState(m).standard_normal((m, columns)).astype(np.float32)
                room, y = np.empty(m * code.room(struct, k), np.float32), np.empty((m, 21), np.float32)
                code.multiply(struct, ctypes.c_size_t(m), k, *(a.ctypes.data_as(ctypes.c_void_p) for a in (x, room, y)))
                assert_product(y, x, layer)


MAIN = (
    EXPORTED
    + """
#include <stdio.h>
#include <stdlib.h>
static void *numbers(size_t count, size_t size)
{
    void *p = malloc(count * size + 64); /* MLX's arrays have room behind them, too */
    return fread(p, size, count, stdin) == count ? p : (exit(1), p);
}
int main(void)
{
    int given[6]; /* n, kind, bits, group, k, m */
    while (fread(given, sizeof given, 1, stdin)) {
        const size_t n = given[0], bits = given[2], k = given[4], m = given[5], groups = bits ? n * k / given[3] : 0;
        struct weights w = {.n = n, .kind = given[1], .bits = bits, .group = given[3]};
        w.at = bits ? numbers(n * k * bits / 32, 4) : numbers(n * k, 2);
        w.scales = numbers(groups, 2);
        w.biases = numbers(groups, 2);
        const float *x = numbers(m * k, 4);
        float *y = malloc(m * n * 4), *whole = malloc(n * k * 4);
        multiply(&w, m, k, x, malloc(m * room(&w, k) * 4), y);
        rows(&w, k, whole);
        fwrite(whole, 4, n * k, stdout);
        fwrite(y, 4, m * n, stdout);
    }
    return 0;
}
"""
)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no qemu-aarch64: Debian's qemu-user")
def test_on_arm(tmp_path):
    """With NEON's registers, by a processor that is emulated."""
    source, made = tmp_path / "main.c", tmp_path / "main"
    source.write_text(MAIN)
    flags = [flag for flag in library._FLAGS if flag not in ("-march=native", "-shared", "-fPIC")]
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    subprocess.run([*zig, *flags, f"-I{C}", "-w", str(source), "-o", str(made)], check=True)
    cases, given = [], bytearray()
    for bits, group in [(None, 0), *itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128))]:
        for dtype, columns, m in itertools.product((mx.float16, mx.bfloat16), (128, 640), (1, 3, 7)):
            layer = linear(21, columns, bits, group, dtype)
            x = np.random.RandomState(m).standard_normal((m, columns)).astype(np.float32)
            kind = 1 if dtype == mx.float16 else 2
            given += np.array([21, kind, bits or 0, group, columns, m], np.int32).tobytes()
            parts = [layer.weight, *((layer.scales, layer.biases) if bits else ())]
            given += b"".join(bytes(memoryview(p.view(mx.uint8))) for p in parts) + x.tobytes()
            cases.append((layer, x))
    run = subprocess.run(["qemu-aarch64", made], input=bytes(given), capture_output=True, check=True)
    answers = iter(np.frombuffer(run.stdout, np.float32))
    for layer, x in cases:
        w = np.fromiter(answers, np.float32, 21 * x.shape[1]).reshape(21, -1)
        assert np.allclose(w, matrix(layer), rtol=1e-6, atol=1e-5)
        assert_product(np.fromiter(answers, np.float32, 21 * len(x)).reshape(-1, 21), x, layer)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "x86_64-linux-gnu -mcpu=skylake_avx512"])
def test_it_compiles_for_processors_that_are_not_here(target, tmp_path):
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", *target.split()]
    flags = [flag for flag in library._FLAGS if not flag.startswith("-march")]
    subprocess.run([*compiler, *flags, "-w", "-c", str(C / "weights.c"), "-o", str(tmp_path / "weights.o")], check=True)
