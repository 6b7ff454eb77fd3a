"""The command line, started by MLX's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .processes import ROOT, free_ports

pytestmark = pytest.mark.slow

GENERATE = ["generate", "--prompt", "ROMEO:\n", "--max-tokens", "20"]


def command(*arguments: str, launch: int | None = None) -> subprocess.CompletedProcess:
    """mlx-ttt alone, or as several processes of mlx.launch. (Its exit status is 0 whatever its processes' are.)"""
    program = [sys.executable, "-c", "from mlx_ttt.cli import main; main()", *arguments]
    if launch is not None:
        port = max(free_ports(launch))
        launcher = str(Path(sys.executable).parent / "mlx.launch")
        program = [launcher, "-n", str(launch), "-p", str(port), "--backend", "ring", "--", *program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        program, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100
    )


def test_generate_writes_the_same_text_once():
    alone, several = command(*GENERATE), command(*GENERATE, "-v", launch=2)
    assert alone.stdout == several.stdout != ""
    assert several.stderr.count("generation: 20 tokens") == 1


def test_errors_are_one_line():
    result = command(*GENERATE, launch=3)
    assert result.stdout == ""
    assert "error: 4 heads do not divide over 3 machines" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_state_of_several_machines_is_not_saved(tmp_path):
    result = command(*GENERATE, "--save-state", str(tmp_path / "state"), launch=2)
    assert "error: a state is split over the machines" in result.stderr
    assert not list(tmp_path.iterdir())
