"""OpenBLAS on Linux: used where it is installed, missed with advice where it is not."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have a fast BLAS")


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return result.stdout.strip()


PRODUCT = "import mlx.core as mx; assert (mx.ones((3, 4)) @ mx.ones((4, 5))).sum().item() == 60"
ADVICE = "from mlx_ttt import _blas; print(_blas.advice())"


def test_it_is_loaded_before_mlx():
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        pytest.skip("OpenBLAS is not installed")
    maps = run(f"import mlx_ttt; {PRODUCT}; print(open('/proc/self/maps').read())")
    assert "openblas" in maps
    assert run(f"import mlx_ttt; {PRODUCT}; {ADVICE}") == "None"


def test_without_it_everything_works_and_says_how_to_get_it():
    without = "import ctypes\ndef no(*_): raise OSError\nctypes.CDLL = no\nimport mlx_ttt"
    assert "apt install libopenblas0" in run(f"{without}\n{PRODUCT}\n{ADVICE}")


def test_after_mlx_it_is_too_late():
    assert "import mlx_ttt before mlx" in run(f"{PRODUCT}; import mlx_ttt; {ADVICE}")
