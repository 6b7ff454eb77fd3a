"""The machine and the software that the numbers belong to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from mlx_ttt.backends.cpu import library  # before MLX: OpenBLAS

import mlx.core as mx  # isort: skip

from .protocol import ROOT


def describe(threads: int) -> dict:
    return {
        "device": _device(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": cores(),
        "threads": threads,
        "memory_bytes": _total_memory(),
        "blas": _products(),
        "compiler": _compiler(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "numpy")},
        "commit": _commit(),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def available_memory() -> int:
    """Bytes that can be had without swapping; on a Mac, three quarters of all."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return _total_memory() * 3 // 4
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    free = [int(available.split()[1]) * 1024]
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))  # of a container
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free.append(int(most) - int(used.read_text()))
    return min(free)


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device() -> str:
    if mx.metal.is_available():
        return mx.device_info()["device_name"]
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _products() -> str:
    if sys.platform == "darwin":
        return "Accelerate"
    return library.description()


def _compiler() -> str:
    """What `mx.compile` makes kernels with: on Linux, it runs g++ where there is one."""
    if mx.metal.is_available():
        return "Metal"
    return "g++" if shutil.which("g++") else "none: mx.compile runs operation by operation"


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
