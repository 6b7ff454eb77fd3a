"""Thousands of damaged checkpoints: see fuzz.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .fuzz import KINDS

ROOT = Path(__file__).parents[2]


def run(timeout: int, *arguments: object) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.fuzz", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.splitlines()) == (1 if len(arguments) > 2 else len(KINDS))


@pytest.mark.slow
def test_damaged_checkpoints():
    run(120, 0, 30)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_checkpoints(kind):
    run(600, 1, 4000, kind)
