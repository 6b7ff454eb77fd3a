"""mlx-ttt train on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_ttt.loading import bundled_model

from .processes import ROOT, free_ports
from .test_launch import command

pytestmark = pytest.mark.slow


@pytest.fixture
def options(tmp_path) -> list[str]:
    """Completions of uneven lengths, some of them empty for one process."""
    text = "Our revels now are ended. These our actors, as I foretold you, were all spirits and are melted into air."
    lines = [{"prompt": text[: 5 + i], "completion": text[5 + i : 8 + 8 * i]} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "held-out.txt").write_text(text * 4)
    given = {"from": bundled_model(), "data": tmp_path / "data.jsonl", "held-out": tmp_path / "held-out.txt"}
    given |= {"length": 32, "batch-size": 4, "steps": 4, "evaluate-every": 4, "save-every": 2, "lr": 1e-3}
    return [f"--{name}={value}" for name, value in given.items()]


def losses(out: Path) -> list[float]:
    entries = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_losses_are_those_of_one_process(tmp_path, options):
    alone, several = tmp_path / "alone", tmp_path / "several"
    assert command("train", str(alone), *options).returncode == 0
    result = command("train", str(several), *options, launch=2)
    assert "4 steps done" in result.stdout, result.stderr
    assert losses(several) == pytest.approx(losses(alone), abs=1e-4)
    assert len(losses(several)) == 4


def test_a_killed_process_and_resume(tmp_path, options):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command("train", str(whole), *options, launch=2)
    (tmp_path / "hosts").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    program = [sys.executable, "-c", "from mlx_ttt.cli import main; main()", "train", str(killed), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLX_HOSTFILE": str(tmp_path / "hosts")}
    processes = [
        subprocess.Popen(program, env=environment | {"MLX_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    while not (killed / "log.jsonl").exists() or len(losses(killed)) < 3:
        time.sleep(0.05)
    processes[1].kill()
    _, stderr = processes[0].communicate(timeout=60)
    processes[1].communicate()
    assert (processes[0].returncode, stderr.count("error: ")) == (2, 1)
    assert "4 steps done" in command("train", str(killed), "--resume", launch=2).stdout
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
