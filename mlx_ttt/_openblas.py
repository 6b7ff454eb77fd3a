"""On Linux, MLX's wheel carries a reference BLAS; OpenBLAS, where installed, is some 30 times faster.

Loaded with RTLD_GLOBAL before MLX, its symbols are the ones that MLX finds.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

ADVICE = (
    "matrix products run on MLX's slow built-in BLAS: install OpenBLAS (Debian, Ubuntu: apt install libopenblas0)"
    " and import mlx_ttt before mlx"
)
_loaded = False


def load() -> None:
    """Load OpenBLAS if this is Linux, it is installed, and MLX has not been imported yet."""
    global _loaded
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return
    for name in ("libopenblas.so.0", "libopenblasp.so.0"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            _loaded = True
            return


def advice() -> str | None:
    """How to make matrix products faster here; None when they are fast."""
    return None if _loaded or sys.platform != "linux" else ADVICE
