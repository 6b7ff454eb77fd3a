"""On Linux, MLX's wheel carries a reference BLAS; OpenBLAS, where installed, is some 30 times faster.

Loaded with RTLD_GLOBAL before MLX, its symbols are the ones that MLX finds. Where there is a C compiler, too, `blas.c`
goes in front of it: decoding a token then takes half as long. It is compiled once, in a third of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SLOW = (
    "matrix products run on MLX's slow built-in BLAS: install OpenBLAS (Debian, Ubuntu: apt install libopenblas0)"
    " and import mlx_ttt before mlx"
)
COPIES = "tokens are decoded by OpenBLAS alone: with a C compiler (Debian, Ubuntu: apt install gcc) twice as fast"
_FLAGS = ("-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-pthread")

_openblas: ctypes.CDLL | None = None
_front: ctypes.CDLL | None = None


def load() -> None:
    """Load OpenBLAS, and blas.c in front of it, if this is Linux, they are there, and MLX has not been imported yet."""
    global _openblas, _front
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return
    for name in ("libopenblas.so.0", "libopenblasp.so.0"):
        with contextlib.suppress(OSError):
            _openblas = ctypes.CDLL(name)
            break
    else:
        return
    if os.environ.get("MLX_TTT_KERNELS") != "0":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            _front = ctypes.CDLL(str(_compiled()), ctypes.RTLD_GLOBAL)  # the first one that MLX finds
            theirs = (_openblas.cblas_sgemm, _openblas.openblas_get_num_threads)
            _front.mlx_ttt_start(*(ctypes.cast(function, ctypes.c_void_p) for function in theirs))
    ctypes.CDLL(name, ctypes.RTLD_GLOBAL)


def _compiled() -> Path:
    """blas.c as a library for this processor, compiled unless it has been before.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, it fails, or there is no place for what it makes.
    """
    sources = sorted(Path(__file__).with_name("native").glob("*.[ch]"))
    processor = next((line for line in Path("/proc/cpuinfo").open() if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources) + " ".join([*_FLAGS, processor]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mlx_ttt")
    library = folder / f"native-{digest[:16]}.so"
    if not library.exists():
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise FileNotFoundError("no C compiler")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            made = Path(beside, library.name)
            files = [str(file) for file in sources if file.suffix == ".c"]
            subprocess.run([compiler, *_FLAGS, *files, "-o", str(made)], check=True, capture_output=True)
            made.replace(library)
    return library


def native() -> ctypes.CDLL | None:
    """The C code of native/; None where it is not loaded."""
    return _front


def description() -> str:
    """What multiplies float32 matrices on this Linux machine."""
    if _openblas is None:
        return "MLX's own reference BLAS"
    _openblas.openblas_get_config.restype = ctypes.c_char_p
    name = " ".join(_openblas.openblas_get_config().decode().split()[:2])
    return f"{name}, few rows by blas.c" if _front else name


def advice() -> str | None:
    """How to make matrix products faster here; None when they are fast."""
    if sys.platform != "linux":
        return None
    if _openblas is None:
        return SLOW
    return None if _front else COPIES
