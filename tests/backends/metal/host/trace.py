"""The Metal source that MLX generates for a call of an `mx.fast.metal_kernel`, without a GPU.

While MLX exports a function, it records the kernels that the function calls and does not run them. With `verbose=True`
it prints the source that it would compile to the process's standard output, which is caught here.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

_PRINTED = re.compile(rb"Generated source code for `[^`]*`:\n```\n(.*?)\n```", re.S)


def trace(function: Callable, *inputs: mx.array) -> list[str]:
    """Returns the Metal source of each `metal_kernel` that `function(*inputs)` calls with `verbose=True`, in order."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "printed", "w+b") as printed:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(str(Path(folder) / "exported.mlxfn"), function, *inputs)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        printed.seek(0)
        return [source.decode() for source in _PRINTED.findall(printed.read())]


def trace_call(kernel: Callable, inputs: Sequence[mx.array], **call) -> str:
    """Returns the Metal source of one call `kernel(inputs=inputs, **call)`."""
    call["verbose"] = True
    return trace(lambda *arrays: kernel(inputs=list(arrays), **call), *inputs)[0]
