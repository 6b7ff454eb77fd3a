"""What this machine has, what is missing, and what it would bring. Nothing is computed for it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import TTTError
from ..version import __version__


@dataclass(frozen=True)
class Fact:
    """Something that is there or is not.

    Attributes:
        found: what is there; None: nothing.
        brings: what it is for, said where it is missing.
    """

    name: str
    found: str | None
    brings: str = ""


def facts() -> list[Fact]:
    """All of them."""
    return list(_facts())


def _facts() -> Iterator[Fact]:
    import mlx.core as mx

    from ..backends.cpu import library

    yield Fact("mlx_ttt", __version__)
    yield Fact("Python", platform.python_version())
    yield Fact("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    if sys.platform == "darwin":
        yield Fact("macOS", platform.mac_ver()[0])
    for name in ("mlx", "mlx-lm"):
        yield Fact(name, _version(name))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Fact("processors", f"{os.cpu_count()}, {memory:.1f} GB of memory")
    metal = mx.metal.is_available()
    device = mx.device_info() if metal else {}
    yield Fact("Metal", str(device.get("device_name", "yes")) if metal else None, "a Mac's GPU, and our kernels on it")
    if sys.platform == "linux":
        blas = library.description()
        yield Fact(
            "OpenBLAS", None if "no OpenBLAS" in blas else blas, "several times the speed: apt install libopenblas0"
        )
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    yield Fact("C compiler", compiler, "two to four times the speed on Linux: apt install gcc")
    yield Fact("coremltools", _version("coremltools"), "Core ML packages: pip install 'mlx-ttt[coreml]'")
    yield _core_ai()
    yield Fact("Core ML", _core_ml(), "running packages, on macOS 15 or newer")
    yield Fact("Swift", _first_line("swift", "--version"), "building the Swift code beside a package: Xcode")
    yield Fact("server", _version("uvicorn") if _has("starlette") else None, "serve: pip install 'mlx-ttt[serve]'")
    yield Fact("matplotlib", _version("matplotlib"), "figures: pip install matplotlib")
    yield Fact("datasets", _version("datasets"), "data sets of the Hub: pip install datasets")


def _core_ai() -> Fact:
    """coreai-core; missing, too, where it is another version than the one whose compiler is known."""
    from ..export.coreai import VERSION, require_coreai

    found = _version("coreai-core")
    try:
        require_coreai()
    except TTTError as error:
        what = "bundles for Core AI, and Apple's own runtime as a second opinion on Core ML packages"
        return Fact("coreai-core", None, f"{found or 'nothing'} is here, {VERSION} is wanted, for {what}: {error}")
    return Fact("coreai-core", f"{found}, the version wanted")


def _core_ml() -> str | None:
    version = platform.mac_ver()[0]  # empty elsewhere
    return f"of macOS {version}" if int(version.partition(".")[0] or 0) >= 15 else None


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    """What a program says, if it is there."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip().partition("\n")[0] or None
