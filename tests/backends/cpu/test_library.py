"""OpenBLAS on Linux and the C code in front of it: used where they are there, and advice where they are not."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.backends.cpu import library

from .c_code import needs_c

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have a fast BLAS")


def run(program: str, **environment) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return result.stdout.strip()


PRODUCT = "import mlx.core as mx; assert (mx.ones((3, 4)) @ mx.ones((4, 5))).sum().item() == 60"
ADVICE = "from mlx_ttt.backends.cpu import library; print(library.advice())"


def test_it_is_loaded_before_mlx():
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        pytest.skip("OpenBLAS is not installed")
    maps = run(f"import mlx_ttt; {PRODUCT}; print(open('/proc/self/maps').read())")
    assert "openblas" in maps
    assert "libopenblas0" not in run(f"import mlx_ttt; {PRODUCT}; {ADVICE}")


def test_without_it_everything_works_and_says_how_to_get_it():
    without = "import ctypes\ndef no(*_): raise OSError\nctypes.CDLL = no\nimport mlx_ttt"
    assert "apt install libopenblas0" in run(f"{without}\n{PRODUCT}\n{ADVICE}")


def test_after_mlx_it_is_too_late():
    assert "import mlx_ttt before mlx" in run(f"{PRODUCT}; import mlx_ttt; {ADVICE}")


def test_the_wrong_order_is_told_once():
    program = "import mlx.core, warnings\nwith warnings.catch_warnings(record=True) as found:\n    import mlx_ttt\n"
    assert run(program + "print(*(w.message for w in found))").endswith("import mlx_ttt before it")
    assert run(program.replace("mlx.core, ", "") + "print(len(found))") == "0"


# The compiler


def test_where_there_is_one_it_is_used():
    """Otherwise all tests of the C code would be skipped, and nobody would know."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if library.advice() == library.SLOW or compiler is None or os.environ.get("MLX_TTT_KERNELS") == "0":
        pytest.skip("no OpenBLAS, no compiler, or switched off")
    assert library.c_code() is not None


@pytest.mark.slow
@needs_c
def test_it_is_compiled_once(tmp_path):
    program = f"import mlx_ttt; {PRODUCT}; {ADVICE}"
    assert run(program, XDG_CACHE_HOME=str(tmp_path)) == "None"
    (file,) = (tmp_path / "mlx_ttt").iterdir()
    made = file.stat().st_mtime_ns
    assert run(program, XDG_CACHE_HOME=str(tmp_path), PATH="") == "None"
    assert [file.stat().st_mtime_ns for file in (tmp_path / "mlx_ttt").iterdir()] == [made]


@needs_c
@pytest.mark.slow
def test_processes_that_start_together_may_all_compile_it(tmp_path):
    program = f"import mlx_ttt; {PRODUCT}; {ADVICE}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        said = list(pool.map(lambda _: run(program, XDG_CACHE_HOME=str(tmp_path)), range(3)))
    assert said == ["None"] * 3
    assert [file.suffix for file in (tmp_path / "mlx_ttt").iterdir()] == [".so"]


def no_compiler(path: Path) -> dict:
    return {"PATH": ""}


def broken_compiler(path: Path) -> dict:
    """Fails after it has written half of the library."""
    compiler = path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho half > "$last"\nexit 1\n')
    compiler.chmod(0o755)
    return {"PATH": f"{compiler.parent}:{os.environ['PATH']}"}


def no_folder(path: Path) -> dict:
    (path / "file").touch()
    return {"XDG_CACHE_HOME": str(path / "file")}


def switched_off(path: Path) -> dict:
    return {"MLX_TTT_KERNELS": "0"}


@pytest.mark.slow
@needs_c
@pytest.mark.parametrize(
    "lack",
    [
        switched_off,
        *(pytest.param(lack, marks=pytest.mark.slow) for lack in (no_compiler, broken_compiler, no_folder)),
    ],
    ids=lambda f: f.__name__,
)
def test_without_a_compiler_everything_works_and_says_how_to_get_it(lack, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")} | lack(tmp_path)
    model = (
        "model = mlx_ttt.load_model()[0]; cache = model.make_cache()\n"
        "model(mx.zeros((1, 20), mx.int32), cache=cache)\n"
        "assert mx.isfinite(model(mx.zeros((1, 1), mx.int32), cache=cache)).all()\n"
        "assert library.c_code() is None and 'no C code' in library.description()"
    )
    assert "apt install gcc" in run(f"import mlx_ttt; {PRODUCT}; {ADVICE}\n{model}", **environment)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.name != "mlx_ttt"]


@needs_c
def test_it_leaves_small_numbers_to_the_process():
    """With -ffast-math, gcc before 13 would switch denormals off for the whole process."""
    assert float(run("import mlx_ttt, numpy; print(numpy.float32(1e-40) * numpy.float32(0.5))")) > 0


# blas.c


def random(*shape, seed=0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def assert_product(y: mx.array, x, w, alpha=1.0, beta=0.0, c=0.0) -> None:
    """y = alpha x w + beta c, within rounding of the terms."""
    x, w, c = (np.array(a, np.float64) for a in (x, w, c))
    bound = np.abs(alpha) * (np.abs(x) @ np.abs(w)) + np.abs(beta * c)
    error = np.abs(np.array(y) - (alpha * (x @ w) + beta * c))
    assert (error <= 2e-6 * bound + 1e-12).all()


SIZES = [(1, 1), (5, 3), (8, 16), (33, 17), (31, 130), (601, 7), (403, 333), (1027, 129), (2, 70001), (70001, 2)]


@pytest.mark.parametrize("m", [*range(1, 10), 12, 15, 16])  # 16: OpenBLAS
@pytest.mark.parametrize("transposed", [True, False])
def test_products_of_few_rows(m, transposed):
    """The last sizes are shared by several threads."""
    for n, k in SIZES:
        x, w = random(m, k), random(n, k, seed=1).T if transposed else random(k, n, seed=1)
        assert_product(x @ w, x, w)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (-1, 0.5), (2.5, -1), (1, 0), (0, 1)])
def test_scaled_and_added(alpha, beta, transposed):
    for m, n, k in [(1, 33, 17), (3, 35, 130), (8, 403, 333)]:
        x, w = random(m, k), random(n, k, seed=1).T if transposed else random(k, n, seed=1)
        c = random(m, n, seed=2)
        assert_product(mx.addmm(c, x, w, alpha=alpha, beta=beta), x, w, alpha, beta, c)


@pytest.mark.parametrize("transposed", [True, False])
def test_in_batches_and_of_parts(transposed):
    for m in (1, 4, 9):
        x, w = random(3, m, 45), random(3, 37, 45, seed=1)
        w = w.swapaxes(1, 2) if transposed else mx.contiguous(w.swapaxes(1, 2))
        assert_product(x @ w, x, w)
        assert_product(x[:, :, 5:38] @ w[:, 5:38, 3:30], x[:, :, 5:38], w[:, 5:38, 3:30])


def test_old_values_of_the_output_do_not_matter():
    """With beta = 0, y is overwritten, even where it was NaN."""
    w = random(33, 17)
    for _ in range(50):
        x = mx.full((2, 33), float("nan"))
        mx.eval(x)
        del x
        y = mx.ones((2, 17)) @ w.T
        assert mx.isfinite(y).all()


@pytest.mark.slow
def test_from_many_threads_at_once():
    """Each on a stream of its own. The products are large enough for several threads each."""
    w = random(600, 301)
    mx.eval(w)

    def product(seed):
        with mx.stream(mx.new_stream(mx.cpu)):
            for i in range(40):
                x = random(1 + (seed + i) % 15, 301, seed=seed)
                assert_product(x @ w.T, x, w.T)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(product, range(4)))


def test_in_two_streams_of_one_thread():
    streams = [mx.new_stream(mx.cpu) for _ in range(2)]
    w, x = random(600, 301), random(3, 301, seed=1)
    mx.eval(w, x)
    found = [mx.matmul(x + i, w.T, stream=streams[i % 2]) for i in range(60)]
    mx.eval(found)
    for i in (0, 1, 30, 59):
        assert_product(found[i], x + i, w.T)


@needs_c
def test_in_a_forked_process():
    """Which has none of its parent's helper threads. MLX itself does not survive a fork, so C is called directly."""
    program = """
import ctypes, os, mlx_ttt, mlx.core, numpy as np
from mlx_ttt.backends.cpu import library, weights
code = library.c_code()
w, x = np.random.randn(600, 301).astype(np.float32), np.random.randn(3, 301).astype(np.float32)
matrix = weights.Weights(n=600, at=w.ctypes.data)
def check():
    y = np.empty((3, 600), np.float32)
    factor = (ctypes.c_size_t * 2)(ctypes.addressof(matrix), y.ctypes.data)
    for _ in range(20):
        code.multiply_few(*map(ctypes.c_size_t, (3, 301, x.ctypes.data)), 1, factor, 4)
        assert np.allclose(y, x @ w.T, atol=1e-3)
check()
child = os.fork()
check()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    assert run(program) == "done"
