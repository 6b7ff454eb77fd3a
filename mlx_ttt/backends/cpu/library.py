"""OpenBLAS and the C code of c/, loaded before MLX.

MLX's Linux wheel carries a reference BLAS. OpenBLAS, where it is installed, is some 30 times faster. It is loaded with
RTLD_GLOBAL before MLX, so MLX finds its symbols first. Where there is a C compiler, too, the functions in c/ are
compiled, once, which takes a second. Some stand in front of OpenBLAS's own, others beside MLX's operations (see
calls.py). MLX's own `mx.compile` does the same on Linux, with a C++ compiler.

This module must not import MLX.
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
import warnings
from importlib.abc import MetaPathFinder
from pathlib import Path

SLOW = (
    "matrix products run on MLX's slow built-in BLAS: install OpenBLAS (Debian, Ubuntu: apt install libopenblas0)"
    " and import mlx_ttt before mlx"
)
NOT_COMPILED = "with a C compiler (Debian, Ubuntu: apt install gcc) this would be two to four times as fast"
# Sums in any order, as with -ffast-math. That itself will not do: gcc before 13 then switches denormals off for the
# whole process, and infinities no longer count.
_MATH = ("-fassociative-math", "-freciprocal-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
_FLAGS = ("-O3", "-march=native", *_MATH, "-shared", "-fPIC", "-pthread")

_openblas: ctypes.CDLL | None = None
_c_code: ctypes.CDLL | None = None
_refusal: str | None = None  # why there is no C code


class _BeforeMLX(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "mlx.core":
            _load()
        # None: the others find it.


def load_before_mlx() -> None:
    """Load OpenBLAS and the C code when MLX is imported, if this is Linux and they are there."""
    if sys.platform != "linux" or any(isinstance(finder, _BeforeMLX) for finder in sys.meta_path):
        return
    if "mlx.core" in sys.modules:
        warnings.warn("mlx was imported first, so it multiplies slowly: import mlx_ttt before it", stacklevel=3)
    sys.meta_path.insert(0, _BeforeMLX())


def _load() -> None:
    global _openblas, _c_code, _refusal
    for name in ("libopenblas.so.0", "libopenblasp.so.0"):
        with contextlib.suppress(OSError):
            _openblas = ctypes.CDLL(name)
            break
    else:
        return
    try:
        _c_code = ctypes.CDLL(str(_compiled()), ctypes.RTLD_GLOBAL)  # before OpenBLAS: the first that MLX finds
    except (OSError, subprocess.SubprocessError) as error:
        _refusal = str(error) if isinstance(error, OSError) else "it failed"
    else:
        theirs = (_openblas.cblas_sgemm, _openblas.openblas_get_num_threads)
        _c_code.mlx_ttt_start(*(ctypes.cast(function, ctypes.c_void_p) for function in theirs))
    ctypes.CDLL(name, ctypes.RTLD_GLOBAL)


def _compiled() -> Path:
    """c/ as a library for this processor, compiled unless it has been before.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, it fails, or there is no place for what it makes.
    """
    if os.environ.get("MLX_TTT_KERNELS") == "0":
        raise FileNotFoundError("MLX_TTT_KERNELS=0")
    sources = sorted(Path(__file__).with_name("c").glob("*.[ch]"))
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))]
    recipe = " ".join([*_FLAGS, *processor[:1]]).encode()
    digest = hashlib.sha256(recipe + b"".join(file.read_bytes() for file in sources)).hexdigest()
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


def c_code() -> ctypes.CDLL | None:
    """The functions in c/; None where they are not loaded."""
    return _c_code


def description() -> str:
    """What multiplies float32 matrices on this Linux machine."""
    if _openblas is None:
        return "MLX's own reference BLAS (no OpenBLAS found)"
    _openblas.openblas_get_config.restype = ctypes.c_char_p
    name = _openblas.openblas_get_config().decode().strip()
    return f"{name}; {'C code of mlx_ttt compiled' if _c_code else f'no C code of mlx_ttt ({_refusal})'}"


def advice() -> str | None:
    """How to make this Linux machine faster; None when there is nothing to be done."""
    if sys.platform != "linux" or _c_code:
        return None
    return SLOW if _openblas is None else f"{NOT_COMPILED} ({_refusal})"
