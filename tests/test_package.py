"""The wheel and the sdist, outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mlx_ttt

ROOT = Path(__file__).parents[1]
CONTENTS = ("models/shakespeare-ttt-linear/model.safetensors", "models/shakespeare-ttt-linear/tokenizer.json")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT]
    subprocess.run(pip, check=True)
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_holds_everything(wheel):
    assert wheel.name.startswith(f"mlx_ttt-{mlx_ttt.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"mlx_ttt/{name}" for name in CONTENTS} <= names
    kernels = {f"mlx_ttt/metal/{path.name}" for path in (ROOT / "metal").iterdir() if path.is_file()}
    assert kernels
    assert kernels <= names
    assert {f"mlx_ttt/backends/cpu/c/{path.name}" for path in (ROOT / "mlx_ttt/backends/cpu/c").glob("*.[ch]")} <= names
    assert not any("tests" in name or "__pycache__" in name for name in names)
    swift = {
        path.relative_to(ROOT) for kind in ("Sources", "StandIns") for path in (ROOT / "swift" / kind).rglob("*.swift")
    }
    assert {f"mlx_ttt/swift_package/{path.as_posix()}" for path in (Path("Package.swift"), *swift)} <= names
    assert wheel.stat().st_size < 12e6


def test_the_installed_wheel_runs_the_bundled_model(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    program = f"import mlx_ttt.cli; assert mlx_ttt.__file__.startswith({str(site)!r}); mlx_ttt.cli.main()"
    command = [sys.executable, "-c", program, "generate", "--prompt", "ROMEO:", "-m", "20"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 20


def test_the_sdist_builds(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"mlx_ttt/{name}" for name in CONTENTS} <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "generate.py", "convert.py"} <= names
    assert {f"metal/{path.name}" for path in (ROOT / "metal").iterdir() if path.is_file()} <= names
