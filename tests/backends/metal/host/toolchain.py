"""clang, from the PyPI wheel `ziglang`. Every result is kept by the hash of what it was made of."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .errors import CompileError

_HERE = Path(__file__).parent
_RUNTIME = sorted((_HERE / "runtime").glob("*.cpp"))
_SHIM = [f"-I{_HERE / 'shim'}", f"-I{_HERE / 'shim' / 'include'}"]

_COMMON = ["-std=c++20", "-fPIC", "-fno-exceptions", "-fno-rtti", "-mcpu=baseline"]
_KERNEL = [
    *_COMMON,
    "-w",
    # So that every machine computes the same numbers, and each half operation rounds.
    "-ffp-contract=off",
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
]
# Debug information in a version that debug_lines.py reads.
_LINES = ["-gline-tables-only", "-gdwarf-4"]
_RUN = [
    *_LINES,
    "-O2",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fno-sanitize=undefined",
    # So that uninitialised locals are NaN.
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=array-bounds,integer-divide-by-zero",
    # A call of a hook before each load and store. The hooks are the runtime's, not those of the sanitizer's library.
    "-fsanitize=kernel-address",
    *("-mllvm", "-asan-instrumentation-with-call-threshold=0"),
    # Also where a load and a store of one address follow each other, as in `x += 1`. Else only the first is watched.
    *("-mllvm", "-asan-opt-same-temp=0"),
    *("-mllvm", "-asan-stack=0"),
    *("-mllvm", "-asan-globals=0"),
    *("-mllvm", "-asan-kernel-mem-intrinsic-prefix=1"),
]


def why_unavailable() -> str | None:
    """Returns why kernels cannot be run on this machine, or None if they can."""
    if importlib.util.find_spec("ziglang") is None:
        return "the host harness needs clang: pip install ziglang"
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "the host harness runs on Linux (x86-64 or AArch64)"
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept: $METAL_HOST_CACHE, or a folder of this user in the temporary folder."""
    default = Path(tempfile.gettempdir()) / f"metal-host-{os.getuid()}"
    folder = Path(os.environ.get("METAL_HOST_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def runtime() -> ctypes.CDLL:
    """Returns the runtime library, compiled on first use. Kernels loaded after it find its functions."""
    flags = [*_COMMON, "-O2", "-flto", "-fno-sanitize=all", "-shared"]
    library = _cached(flags, "libmetal_host", ".so", files=_RUNTIME)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def compile_kernel(cpp: str) -> Path:
    """Returns a shared library with `msl_entry`, to be loaded after `runtime()`. Raises CompileError."""
    return _cached([*_KERNEL, *_RUN, "-shared", "-Wl,-z,undefs"], "kernel", ".so", cpp)


def check(cpp: str, rule: str) -> None:
    """Compiles only, with the shim's `rule` on: "ADDRESS_SPACES" or "CONVERSIONS". Raises CompileError."""
    flags = [*_KERNEL, "-std=c++14", f"-DMSL_CHECK_{rule}", "-O0", "-fno-sanitize=all", "-c"]
    _cached(flags, rule.lower(), ".o", cpp)


def compile_thread_sanitizer(cpp: str) -> Path:
    """Returns a program that runs one dispatch of the kernel under ThreadSanitizer. Raises CompileError."""
    # Without built-ins: else the compiler turns the runtime's own copying into calls that the sanitizer watches.
    runtime = [*_COMMON, "-O2", "-fno-builtin", "-fno-sanitize=all", "-DMSL_THREAD_SANITIZER", "-c"]
    sources = [*_RUNTIME, _HERE / "runtime" / "thread_sanitizer" / "main.cpp"]
    objects = [_cached(runtime, source.stem, ".o", files=[source]) for source in sources]
    kernel = [*_KERNEL, *_LINES, "-O1", "-fno-sanitize=undefined", "-fsanitize=thread", "-DMSL_THREAD_SANITIZER", "-c"]
    objects.append(_cached(kernel, "sanitized", ".o", cpp))
    return _cached(["-fsanitize=thread", "-x", "none"], "thread_sanitizer", ".exe", files=objects)


@functools.cache
def _inputs() -> bytes:
    """What every result depends on, besides its flags and source."""
    files = sorted(f for f in [*_HERE.glob("runtime/**/*"), *_HERE.glob("shim/**/*")] if f.is_file())
    return b"".join([importlib.metadata.version("ziglang").encode(), *(f.read_bytes() for f in files)])


def _cached(flags: list[str], stem: str, suffix: str, cpp: str = "", files: Sequence[Path] = ()) -> Path:
    """What the compiler makes of `cpp` or of `files`. The folder that this is in makes no difference to the cache."""
    names = [file.name for file in files]
    digest = hashlib.sha256("\0".join([*flags, *names, cpp]).encode() + _inputs()).hexdigest()[:20]
    result = cache_folder() / f"{stem}-{digest}{suffix}"
    if result.exists():
        return result
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        output = Path(folder) / result.name
        source = [str(file) for file in files]
        if cpp:
            (Path(folder) / "kernel.cpp").write_text(cpp)
            source = [str(Path(folder) / "kernel.cpp")]
        zig = Path(importlib.util.find_spec("ziglang").origin).with_name("zig")
        command = [str(zig), "cc", "-x", "c++", *_SHIM, *flags, *source, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(_readable(done.stderr, folder))
        os.replace(output, result)
    return result


def _readable(stderr: str, folder: str) -> str:
    """clang's diagnostics without the paths of this machine."""
    text = stderr.replace(folder + "/", "").replace(str(_HERE) + "/", "")
    return re.sub(r"\n{2,}", "\n", text).strip()
