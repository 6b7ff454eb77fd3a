"""Starts several local processes of MLX's ring, as `mlx.launch` does, and waits for them."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mlx_ttt.distributed.peers import PORT_OFFSET

from . import light_jobs

ROOT = Path(__file__).parents[2]


@dataclass
class Ended:
    status: int
    stdout: str
    stderr: str


def start(folder: Path, size: int, job: str, *arguments: str) -> list[subprocess.Popen]:
    """`size` processes that run a function of light_jobs.py or jobs.py, each knowing its rank."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    module = "light_jobs" if hasattr(light_jobs, job) else "jobs"
    command = [sys.executable, "-m", f"tests.distributed.{module}", job, *arguments]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def wait(processes: list[subprocess.Popen], seconds: float = 300) -> list[Ended]:
    """How they ended. All of them do, within the time."""
    try:
        ended = []
        for process in processes:
            stdout, stderr = process.communicate(timeout=seconds)
            ended.append(Ended(process.returncode, stdout, stderr))
        return ended
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(folder: Path, size: int, job: str, *arguments: str) -> list[str]:
    """What each process printed. All must end well."""
    ended = wait(start(folder, size, job, *arguments))
    assert all(e.status == 0 for e in ended), "\n".join(f"rank {r}: {e.stderr}" for r, e in enumerate(ended))
    return [e.stdout for e in ended]


def free_ports(count: int) -> list[int]:
    """Ports that are free, and those beside them that the watch uses: below those that systems give out themselves."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10_000, 31_000)
        try:
            for used in (port, port + PORT_OFFSET):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", used))
        except OSError:
            continue
        if all(abs(port - other) not in (0, PORT_OFFSET) for other in found):
            found.append(port)
    return found
